"""Calibration to a target: what is chosen on the shipped text, and what that costs on texts never seen.

    python -m experiments.calibration --model gemma.gguf --method shift_threshold --quality 0.99 --density 0.5 0.3

Predictors are fitted, searched for and validated on three parts of pinfer's own calibration text. Prints a
markdown table and writes every measurement to experiments/results/calibration/<model>-<method>.json as soon
as it is made, so that a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from experiments.environment import environment
from experiments.files import write_json
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.fitting import FitSettings, fit_predictors
from pinfer.engine.prepared import Prepared
from pinfer.engine.text import CALIBRATION_TEXT, EVALUATION_TEXT, Text, cut
from pinfer.quality import Calibration, Loss, Passage, Refit, Target, Trials, allocate, calibrate, windows
from pinfer.solve.parts import Parts
from pinfer.sparsify import THRESHOLDED, resolve_method

HERE = Path(__file__).parent
TEXTS = (EVALUATION_TEXT, HERE / "data" / "heldout.txt")
SEQUENCE, WINDOW = 256, 512
ALL_TOKENS = 1 << 17  # more than the calibration text has


class Record:
    """The measurements of one model and method, written down one by one."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._content = path, settings | {"rows": [], "measurements": {}}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if all(found.get(name) == value for name, value in settings.items()):
                self._content = found

    @property
    def measurements(self) -> dict[str, Any]:
        return self._content["measurements"]

    def keep(self, name: str, found: Any, left_s: float | None = None) -> None:
        self.measurements[name] = found
        left = "" if left_s is None else f", {left_s:.0f} s left at most"
        print(f"{name}: {found}{left}", file=sys.stderr)
        write_json(self._path, self._content)

    def finish(self, rows: list[dict[str, Any]]) -> None:
        write_json(self._path, self._content | {"rows": rows, "environment": environment()})


class Unseen:
    """A text that nothing was fitted to, of which every `stride`-th token of some windows is scored."""

    def __init__(self, engine: Engine, path: Path, count: int, stride: int) -> None:
        self.name, tokenizer = path.name, engine.tokenizer
        bos = tokenizer.bos_id if tokenizer.add_bos else None
        ids = tokenizer.encode(path.read_text(encoding="utf-8"), add_bos=False)
        length = min(WINDOW, engine.config.context_length)
        whole = [one for one in windows(ids, length, bos) if len(one) == length]
        count = min(count, len(whole))
        self._sequences = [whole[number * len(whole) // count] for number in range(count)]
        self._model, self._stride = engine.model, stride
        self._passage: Passage | None = None

    def loss(self, record: Record, trials: Trials, densities: list[float]) -> Loss:
        """At these densities, measured or on record."""
        name = f"{self.name} at {', '.join(map(repr, densities))}"
        if name not in record.measurements:
            self._passage = self._passage or Passage(self._model, self._sequences, self._stride)
            record.keep(name, asdict(trials.whole(self._passage, densities)))
        return Loss(**record.measurements[name])


def row(calibration: Calibration, unseen: list[Unseen], trials: Trials, record: Record) -> dict[str, Any]:
    """What one calibration chose, and what that and the uniform allocation cost on the texts."""
    level = calibration.figures["density"]
    allocations = {
        "sensitivity": allocate(calibration.curves, level),
        "uniform": [level] * len(calibration.curves),
    }
    losses = {
        text.name: {name: asdict(text.loss(record, trials, one)) for name, one in allocations.items()}
        for text in unseen
    }
    return {"densities": calibration.densities, "figures": calibration.figures, "unseen": losses}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each target and allocation, with KL and added nats on the validation part and each text."""
    texts = list(rows[0]["unseen"])
    heads = ["target", "allocation", "mean density", *(f"{text}: KL, added" for text in ("validation", *texts))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for one in rows:
        figures = one["figures"]
        target = " ".join(f"{name} {figures['target'][name]}" for name in figures["target"])
        for name in ("sensitivity", "uniform"):
            chosen = f"**{name}**" if figures["allocation"] == name else name
            losses = (figures[name], *(one["unseen"][text][name] for text in texts))
            cells = (
                f"{loss['kl']:.4f}, {loss['added']:+.4f} ± {loss['added_error']:.4f} ({100 * loss['density']:.1f} %)"
                for loss in losses
            )
            lines.append(f"| {target} | {chosen} | {figures['density']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.calibration", description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="GGUF file; the shipped model if left out")
    parser.add_argument("--method", default="auto", help="of the predictors")
    parser.add_argument("--rank", type=int, default=128, help="of low_rank")
    parser.add_argument("--quality", type=float, nargs="*", default=[], help="targets: shares of perplexity to keep")
    parser.add_argument("--density", type=float, nargs="*", default=[], help="targets: mean densities")
    parser.add_argument("--tokens", type=int, default=ALL_TOKENS, help="of the calibration text; all if left out")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens, from each text never seen")
    parser.add_argument("--stride", type=int, default=1, help="score every so many-th token of those texts")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "calibration", help="folder for the JSON")
    return parser.parse_args(arguments)


def dealt(sequences: list[torch.Tensor]) -> Parts:
    """Three, two and five of ten sequences to fit, search and validate on: more to validate than `pinfer solve` takes."""
    of = {0: 0, 3: 0, 7: 0, 1: 1, 5: 1}
    parts = Parts([], [], [])
    for number, tokens in enumerate(sequences):
        parts[of.get(number % 10, 2)].append(tokens)
    return parts


def settings_of(args: argparse.Namespace, engine: Engine, method: str, parts: Parts) -> dict[str, Any]:
    return {
        "model": engine.path.name,
        "model_bytes": engine.file.nbytes,
        "method": method,
        "rank": args.rank if method == "low_rank" else None,
        "int8": engine.int8,
        "calibration_sha256": hashlib.sha256(CALIBRATION_TEXT.read_bytes()).hexdigest(),
        "texts_sha256": {text.name: hashlib.sha256(text.read_bytes()).hexdigest() for text in TEXTS},
        "tokens": {name: sum(map(len, part)) for name, part in parts._asdict().items()},
        "windows": args.windows,
        "stride": args.stride,
    }


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all targets."""
    engine = load_engine(RunConfig(model=args.model, method="dense", threads=1))
    method = resolve_method(args.method, engine.config, 0.5 if args.method in ("auto", *THRESHOLDED) else None)
    text = Text.read(None)
    parts = dealt(cut(engine.tokenizer, text, args.tokens, engine.config.context_length, SEQUENCE))
    settings = settings_of(args, engine, method, parts)
    record = Record(args.output / f"{engine.path.stem}-{method}.json", settings)
    unseen = [Unseen(engine, path, args.windows, args.stride) for path in TEXTS]
    downs, rows = Prepared(engine.file, engine.config).downs(), []
    with engine.computing():
        how = FitSettings(method, args.rank)
        how.check(engine.config)
        refit = Refit(lambda sequences: fit_predictors(engine.model, how, sequences), parts.fit)
        predictors = refit.fit(parts.fit)
        trials = Trials(engine.model, predictors, downs)
        for target in (*map(of_quality, args.quality), *map(Target, args.density)):
            found = calibrate(
                engine.model, predictors, parts.search, parts.validation, target, downs, refit,
                known=record.measurements, measured=record.keep,
            )  # fmt: skip
            rows.append(row(found, unseen, trials, record))
    record.finish(rows)
    return rows


def of_quality(quality: float) -> Target:
    return Target(quality=quality)


def main(arguments: list[str] | None = None) -> int:
    try:
        print(table(run(parse(arguments))))
    except (ValueError, OSError) as error:
        print(f"calibration: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
