"""Perplexity of any GGUF under gate_threshold (CATS) against the same model dense.

    python -m experiments.gate_threshold --model gemma.gguf

Thresholds are calibrated on pinfer's own calibration text, the loss is measured on another text.
Prints a markdown table and writes every figure to experiments/results/gate_threshold/<model>.json.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

from experiments.environment import environment
from experiments.files import write_json
from pinfer import sparsify
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.quality import Perplexity, perplexity, windows

HERE = Path(__file__).parent
SPARSITIES = (0.0, 0.3, 0.5, 0.7)


def measure(run: RunConfig, text: str, length: int, count: int) -> dict[str, Any]:
    """One row of the table: the model under `run` over `count` windows of `length` tokens spread over the text."""
    engine = load_engine(run)
    pieces = spread_windows(engine, text, length, count)
    sparsify.reset_activity(engine.model)
    with engine.computing():
        result: Perplexity = perplexity(engine.model, pieces)
    return {
        "method": engine.method,
        "nominal_sparsity": run.sparsity,
        "nll": result.nll,
        "standard_error": result.standard_error,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
        "density": sparsify.density(engine.model),
        "density_by_layer": [round(layer.density, 4) for layer in sparsify.layer_densities(engine.model)],
    }


def spread_windows(engine: Engine, text: str, length: int, count: int) -> list[Any]:
    tokenizer = engine.tokenizer
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    pieces = [piece for piece in windows(tokenizer.encode(text, add_bos=False), length, bos) if len(piece) == length]
    if count > len(pieces):
        raise ValueError(f"the text fills {len(pieces)} windows of {length} tokens, not {count}")
    return [pieces[i * len(pieces) // count] for i in range(count)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: nominal and reached sparsity, perplexity, and nats added to the dense model."""
    dense = rows[0]["nll"]
    lines = ["| sparsity asked | reached | perplexity | added nats |", "|---|---|---|---|"]
    for row in rows:
        asked = "dense" if row["nominal_sparsity"] is None else f"{100 * row['nominal_sparsity']:.0f} %"
        reached = f"{100 * (1 - row['density']):.1f} %"
        lines.append(f"| {asked} | {reached} | {row['perplexity']:.2f} | {row['nll'] - dense:+.3f} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.gate_threshold", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "heldout.txt", help="UTF-8 text to evaluate")
    parser.add_argument("--window", type=int, default=512, help="tokens a window, BOS included")
    parser.add_argument("--windows", type=int, default=12, help="windows, spread over the text")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "gate_threshold", help="folder for the JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    try:
        text = args.text.read_text(encoding="utf-8")
        rows = []
        for sparsity in (None, *SPARSITIES):
            method = "dense" if sparsity is None else "gate_threshold"
            run = RunConfig(
                model=args.model, method=method, sparsity=sparsity, context=max(args.window, 1024), precision="float32"
            )
            rows.append(measure(run, text, args.window, args.windows))
            print(f"{method} {sparsity}: {rows[-1]['perplexity']:.3f}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"gate_threshold: {error}", file=sys.stderr)
        return 2
    for row in rows:
        row["added_nats"] = row["nll"] - rows[0]["nll"]
    print(table(rows))
    finite = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    record = {
        "model": Path(args.model).name,
        "text": args.text.name,
        "window": args.window,
        "windows": args.windows,
        "environment": environment(),
        "rows": finite,
    }
    write_json(args.output / f"{Path(args.model).stem}.json", record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
