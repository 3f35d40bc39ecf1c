"""pinfer profile: which neurons of a model fire, and how much they contribute, over a calibration text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.cli.generate import ActivationOption, Threads
from pinfer.cli.profile_report import COLUMNS, REPORT, rows, write_report
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.generate import peak_rss_bytes
from pinfer.engine.measure import Estimate, estimate_profile
from pinfer.engine.profile import DEFAULT_TOKENS, Profile, Watcher, profile
from pinfer.engine.solved import Solved
from pinfer.engine.text import Text, cut
from pinfer.placement.statistics import LayerStatistics

Output = Annotated[
    str | None,
    typer.Option("-o", "--output", help="Directory to write; the model's name with .pinfer here if left out."),
]
TextFile = Annotated[str | None, typer.Option("--text", help="UTF-8 text to run; the shipped one if left out.")]
Tokens = Annotated[int, typer.Option("--tokens", help="Tokens of it, taken from all over.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure one layer, say what all will take, write nothing.")]


def profile_command(
    model: options.Model = None,
    output: Output = None,
    text: TextFile = None,
    tokens: Tokens = DEFAULT_TOKENS,
    threads: Threads = None,
    activation: ActivationOption = None,
    dry_run: DryRun = False,
    json: options.Json = False,
) -> None:
    """Measure which neurons fire over a text; goes on where an interrupted run stopped."""
    calibration = Text.read(text)
    engine = load_engine(RunConfig(model=model, threads=threads, activation=activation, method="dense"), note)
    for remark in engine.notes:
        note(remark)
    sequences = cut(engine.tokenizer, calibration, tokens, engine.model.context)
    found = sum(len(one) for one in sequences)
    if found < 0.9 * tokens:
        note(f"{calibration.name} has {found} tokens for this model: all of them are used, not {tokens}")
    if dry_run:
        _tell(estimate_profile(engine, sequences), json)
        return
    solved = Solved.open_or_create(output or f"{engine.path.name.removesuffix('.gguf')}.pinfer", engine.gguf)
    started = time.perf_counter()
    result = _run(engine, solved, calibration, sequences)
    seconds = time.perf_counter() - started
    files, problem = write_report(solved.path, engine.path.name, calibration.name, result)
    if problem:
        note(problem)
    if json:
        emit_json(_figures(engine, solved, result, files, seconds))
    else:
        _print(engine, solved, result, calibration)


def _run(engine: Engine, solved: Solved, text: Text, sequences: list[torch.Tensor]) -> Profile:
    try:
        with _watching() as watcher:
            return profile(engine, solved, text, sequences, watcher)
    except KeyboardInterrupt:
        note(f"{solved.path} keeps the layers that are done: the same command goes on from there")
        raise


class _Lines(Watcher):
    """A line a layer, where stderr is no terminal."""

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        self._n_layers, self._first, self._started = n_layers, layers_done, time.perf_counter()

    def layer(self, number: int, found: LayerStatistics) -> None:
        each_s = (time.perf_counter() - self._started) / (number + 1 - self._first)
        left = duration(each_s * (self._n_layers - number - 1))
        note(f"layer {number}, {number + 1} of {self._n_layers}: density {100 * found.density:.1f} %; {left} left")

    def note(self, text: str) -> None:
        note(text)


class _Bar(Watcher):
    """A progress bar with the time left, on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        # Its speed is that of this run: what an earlier one did is not counted.
        self._n_layers, self._layer = n_layers, layers_done
        self._task = self._progress.add_task(self._title(), total=(n_layers - layers_done) * n_sequences)

    def _title(self) -> str:
        return f"layer {min(self._layer + 1, self._n_layers)} of {self._n_layers}"

    def sequence(self) -> None:
        self._progress.advance(self._task)

    def layer(self, number: int, found: LayerStatistics) -> None:
        self._layer = number + 1
        self._progress.update(self._task, description=self._title())

    def note(self, text: str) -> None:
        self._progress.console.print(f"pinfer: {text}", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _watching() -> Iterator[Watcher]:
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("sequences"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), transient=True) as progress:
        yield _Bar(progress)


def duration(seconds: float) -> str:
    """Time as people say it."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _tell(found: Estimate, json: bool) -> None:
    if json:
        emit_json({
            "dry_run": True, "tokens": found.tokens, "layers": found.layers, "layer_s": found.layer_s,
            "total_s": found.total_s, "peak_rss_bytes": found.peak_rss_bytes, "disk_bytes": found.disk_bytes,
        })  # fmt: skip
        return
    print(
        f"a layer takes {duration(found.layer_s)} for {found.tokens} tokens; all {found.layers} layers about "
        f"{duration(found.total_s)}, {size(found.peak_rss_bytes)} of memory at the peak and "
        f"{size(found.disk_bytes)} of disk while it runs. Nothing was written."
    )


def _figures(engine: Engine, solved: Solved, result: Profile, files: list[Path], seconds: float) -> dict[str, Any]:
    return {
        "directory": str(solved.path),
        "model": str(engine.path),
        **result.settings,
        **result.figures,
        "files": [str(path) for path in files],
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _print(engine: Engine, solved: Solved, result: Profile, text: Text) -> None:
    out = console()
    out.print(printable(f"{engine.path.name}: {result.figures['tokens']} tokens of {text.name}"))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in COLUMNS:
        table.add_column(title.replace(" on", "\non"), justify="right")
    for cells in rows(result):
        table.add_row(*cells)
    out.print(table)
    out.print(f"density {100 * result.figures['density']:.1f} % over all layers")
    out.print(printable(f"{solved.path}: statistics, and {REPORT} with the plots explained"))
