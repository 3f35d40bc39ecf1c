"""Perplexity of any GGUF under the methods that need no training, against the same model dense.

    python -m experiments.thresholds --model gemma.gguf

Thresholds are calibrated on pinfer's own calibration text, the loss is measured on another text.
Prints a markdown table and writes every figure to experiments/results/thresholds/<model>.json,
after each row, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from experiments.environment import environment
from experiments.files import write_json
from pinfer import sparsify
from pinfer.config import Method, RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.text import CALIBRATION_TEXT
from pinfer.ffn import SparseFFN
from pinfer.input_sparse_ffn import InputSparseFFN
from pinfer.quality import Perplexity, perplexity, windows

HERE = Path(__file__).parent
METHODS: tuple[Method, ...] = ("gate_threshold", "weighted_threshold", "shift_threshold", "input_threshold")
SPARSITIES = (0.3, 0.5, 0.7)
DENSE: tuple[Method, None] = ("dense", None)


def measure(run: RunConfig, text: str, length: int, count: int) -> dict[str, Any]:
    """One row of the table: the model under `run` over `count` windows of `length` tokens spread over the text."""
    engine = load_engine(run)
    pieces = spread_windows(engine, text, length, count)
    sparsify.reset_activity(engine.model)
    with engine.computing():
        results: list[Perplexity] = [perplexity(engine.model, [piece]) for piece in pieces]
    return {
        "method": engine.method,
        "nominal_sparsity": run.sparsity,
        "nll_by_window": [result.nll for result in results],
        "nll": fmean(result.nll for result in results),
        "tokens": sum(result.tokens for result in results),
        "density": sparsify.density(engine.model),
        "density_by_layer": [round(layer.density, 4) for layer in sparsify.layer_densities(engine.model)],
        "bytes_share": bytes_share(engine),
    }


def bytes_share(engine: Engine) -> float:
    """FFN bytes that a token reads, predictor included, over those of gate and up in the file and `down` by neuron.

    Counts whole gates for the methods that compute the gate, and the rows of up and down that are kept; for
    input_threshold the kept rows of all three, whose gate and up may have grown as they were transposed.
    """
    dense = read = 0.0
    densities = sparsify.layer_densities(engine.model)
    for layer, ffn in enumerate(engine.model.ffns()):
        if isinstance(ffn, InputSparseFFN):
            read += _bytes_read(ffn)
            of_file = [engine.file.tensor(f"blk.{layer}.ffn_{name}.weight") for name in ("gate", "up")]
            dense += ffn.weights.down.nbytes + sum(matrix.nbytes for matrix in of_file)
            continue
        parts = [module for module in ffn.modules() if isinstance(module, SparseFFN)]
        if not parts:
            return 1.0
        for part in parts:
            kept = densities[layer].density * (part.weights.down.nbytes + part.weights.up.nbytes)
            read += part.weights.gate.nbytes + kept + part.predictor.own_bytes
            dense += part.weights.gate.nbytes + part.weights.up.nbytes + part.weights.down.nbytes
    return read / dense


def _bytes_read(ffn: InputSparseFFN) -> float:
    """FFN bytes that a token reads of a gated InputSparseFFN."""
    weights, inputs, hidden = ffn.weights, ffn.activity.inputs, ffn.activity.hidden
    of_inputs, of_hidden = (int(kept) / int(tokens) for kept, tokens in (inputs, hidden))  # rows a token
    rows = [(of_inputs, weights.gate), (of_inputs, weights.up), (of_hidden, weights.down)]
    return sum(kept * matrix.nbytes / matrix.rows for kept, matrix in rows)


def spread_windows(engine: Engine, text: str, length: int, count: int) -> list[Any]:
    tokenizer = engine.tokenizer
    bos = tokenizer.bos_id if tokenizer.add_bos else None
    pieces = [piece for piece in windows(tokenizer.encode(text, add_bos=False), length, bos) if len(piece) == length]
    if count > len(pieces):
        raise ValueError(f"the text fills {len(pieces)} windows of {length} tokens, not {count}")
    return [pieces[i * len(pieces) // count] for i in range(count)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: method, sparsity reached, FFN bytes read, perplexity, and nats added to the dense model."""
    dense, *others = rows
    lines = [
        "| method | sparsity asked | reached | FFN bytes read | perplexity | added nats |",
        "|---|---|---|---|---|---|",
        f"| dense | – | 0 % | 100 % | {math.exp(dense['nll']):.2f} | – |",
    ]
    for row in others:
        lines.append(
            f"| {row['method']} | {100 * row['nominal_sparsity']:.0f} % | {100 * (1 - row['density']):.1f} % "
            f"| {100 * row['bytes_share']:.0f} % | {math.exp(row['nll']):.2f} | {added_nats(row, dense)} |"
        )
    return "\n".join(lines)


def added_nats(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """What a row adds to the dense one's nats a token: mean and standard error of the paired differences by window."""
    added = [own - its for own, its in zip(row["nll_by_window"], dense["nll_by_window"], strict=True)]
    error = stdev(added) / math.sqrt(len(added)) if len(added) > 1 else math.nan
    return f"{fmean(added):+.3f} ± {error:.3f}"


def parse(arguments: list[str] | None, name: str = "thresholds", doc: str = __doc__) -> argparse.Namespace:
    """The command line of an experiment of that name, which evaluates a model over windows of a text."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{name}", description=doc.splitlines()[0])
    parser.add_argument("--model", required=True, help="GGUF file")
    parser.add_argument("--text", type=Path, default=HERE / "data" / "heldout.txt", help="UTF-8 text to evaluate")
    parser.add_argument("--window", type=int, default=512, help="tokens a window, BOS included")
    parser.add_argument("--windows", type=int, default=12, help="windows, spread over the text")
    parser.add_argument("--output", type=Path, default=HERE / "results" / name, help="folder for the JSON")
    parser.add_argument("--again", action="store_true", help="measure what is on record as well")
    return parser.parse_args(arguments)


def settings_of(args: argparse.Namespace, text: str) -> dict[str, Any]:
    """What rows on record must share with a run to be taken for its own."""
    return {
        "model": Path(args.model).name,
        "model_bytes": Path(args.model).stat().st_size,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "calibration_sha256": hashlib.sha256(CALIBRATION_TEXT.read_bytes()).hexdigest(),
        "window": args.window,
        "windows": args.windows,
    }


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    path = args.output / f"{Path(args.model).stem}.json"
    try:
        text = args.text.read_text(encoding="utf-8")
        settings = settings_of(args, text) | {"text": args.text.name}
        known = {} if args.again else measured(path, settings)
        rows = []
        for method, sparsity in (DENSE, *product(METHODS, SPARSITIES)):
            run = RunConfig(
                model=args.model, method=method, sparsity=sparsity, context=max(args.window, 1024), precision="float32"
            )
            row = known.pop((method, sparsity), None)
            if row is None:
                row = measure(run, text, args.window, args.windows) | {"environment": environment()}
            rows.append(row)
            print(f"{method} {sparsity}: {math.exp(row['nll']):.3f}", file=sys.stderr)
            write_json(path, settings | {"rows": [*rows, *known.values()]})
    except (ValueError, OSError) as error:
        print(f"thresholds: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def measured(path: Path, settings: dict[str, Any]) -> dict[tuple[str, float | None], dict[str, Any]]:
    """The rows of an earlier run under the same settings, by method and sparsity."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if any(record.get(name) != value for name, value in settings.items()):
        return {}
    return {(row["method"], row["nominal_sparsity"]): row for row in record["rows"]}


if __name__ == "__main__":
    sys.exit(main())
