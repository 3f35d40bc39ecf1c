"""`python -m experiments.synthetic --shape llama-2-7b --layers 4 --type q4_0 --density 0.1`: write one model.

The file is an ordinary `llama` GGUF: llama.cpp loads it and runs it densely, pinfer may skip what does not fire.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from experiments.synthetic.build import GATE_SPREAD, Builder, LayerReport
from experiments.synthetic.recipe import SHAPES, Recipe, default_vocab
from experiments.synthetic.sink import GGUFSink
from pinfer.formats.type_mix import TYPES

PROGRAM = "experiments.synthetic"


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: {message}\n")


def parse(arguments: list[str] | None) -> tuple[Recipe, Path, bool]:
    """The checked recipe, the file to write and whether to print JSON; exits with 2 where something is wrong."""
    parser = Parser(
        prog=f"python -m {PROGRAM}",
        description="Write a GGUF model of a real shape with random weights and planted FFN sparsity.",
        epilog="The same seed gives the same bytes on one machine with one number of threads.",
    )
    add = parser.add_argument
    add("--shape", required=True, choices=SHAPES)
    add("--layers", type=int, help="(default: the shape's own)")
    add(
        "--type",
        required=True,
        type=str.lower,
        choices=TYPES,
        help="of all matrices, or a llama.cpp mix; norms are F32",
    )
    add("--density", type=float, default=0.1, help="mean share of neurons that fire (default %(default)s)")
    add("--skew", choices=("powerlaw", "uniform"), default="powerlaw", help="powerlaw: about 80 %% of firings on 26 %%")
    add("--activation", choices=GATE_SPREAD, default="relu", help="(default %(default)s)")
    add("--vocab", type=int, help="(default: the real one scaled by layers / real layers, at least 512, so that the "
        "head keeps its true share of the bytes in a model cut to a few layers)")  # fmt: skip
    add("--gate-rank", type=int, default=64, help="rank of the gates: what a predictor of that rank can learn")
    add("--seed", type=int, default=0)
    add("-o", "--output", type=Path, help="(default: <shape>-<layers>l-<type>-<activation>.gguf)")
    add("--json", action="store_true", help="print the summary as one JSON object")
    options = parser.parse_args(arguments)
    shape = SHAPES[options.shape]
    layers = shape.n_layers if options.layers is None else options.layers
    vocab = default_vocab(shape, layers) if options.vocab is None else options.vocab
    chosen = (options.type, options.density, options.skew, options.activation, vocab, options.gate_rank, options.seed)
    try:
        recipe = Recipe(options.shape, layers, *chosen)
        return recipe, _target(options.output or Path(recipe.file_name)), options.json
    except ValueError as error:
        parser.error(str(error))


def _target(path: Path) -> Path:
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: there is no folder {path.parent}")
    return path


def build(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Write the model and return the summary; progress goes to stderr."""
    started = time.perf_counter()
    layers: list[LayerReport] = []
    with torch.inference_mode(), GGUFSink(path, recipe) as sink:
        builder = Builder(recipe, sink)
        builder.embed()
        for index in range(recipe.n_layers):
            layers.append(builder.layer(index))
            note = f"layer {index + 1} of {recipe.n_layers}: density {layers[-1].density:.3f}"
            print(f"{PROGRAM}: {note}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        builder.finish()
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "seconds": round(time.perf_counter() - started, 1),
        "density": _mean([layer.density for layer in layers]),
        "density_by_layer": [round(layer.density, 4) for layer in layers],
        "share_for_80": _mean([layer.share_for_80 for layer in layers]),
        "silent_share": _mean([layer.silent for layer in layers]),
        "asked_density": recipe.density,
        "skew": recipe.skew,
        "exponent": round(builder.exponent, 4),
        "activation": recipe.activation,
        "gate_rank": recipe.gate_rank,
        "vocab": recipe.vocab_size,
        "seed": recipe.seed,
    }


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 4)


def summary(figures: dict[str, Any]) -> str:
    """The figures in words."""
    layers = " ".join(f"{density:.3f}" for density in figures["density_by_layer"])
    lines = [
        f"{figures['path']}: {figures['bytes']:,} bytes in {figures['seconds']} s, seed {figures['seed']}",
        f"density on fresh tokens {figures['density']:.3f}, asked {figures['asked_density']:g}; by layer {layers}",
        f"{figures['skew']}, exponent {figures['exponent']:g}: 80 % of firings on {100 * figures['share_for_80']:.1f} % "
        "of the neurons",
    ]
    if figures["activation"] == "silu":
        lines.append(f"neurons that do not fire hold {100 * figures['silent_share']:.2f} % of Σ |act|")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code: 1 where writing failed, 130 when interrupted."""
    recipe, path, as_json = parse(arguments)
    try:
        figures = build(recipe, path)
    except OSError as error:
        print(f"{PROGRAM}: cannot write {path}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(figures) if as_json else summary(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
