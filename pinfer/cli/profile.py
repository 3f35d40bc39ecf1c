"""pinfer profile: which neurons of a model fire, and how much they contribute, over a calibration text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.cli.generate import ActivationOption, Threads
from pinfer.cli.profile_report import COLUMNS, REPORT, rows, write_report
from pinfer.cli.progress import Told, duration, layers
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
    engine.config.without_experts("a profile")
    for remark in engine.notes:
        note(remark)
    sequences = cut(engine.tokenizer, calibration, tokens, engine.model.context)
    found = sum(len(one) for one in sequences)
    if found < 0.9 * tokens:
        note(f"{calibration.name} has {found} tokens for this model: all of them are used, not {tokens}")
    if dry_run:
        _tell(estimate_profile(engine, sequences), json)
        return
    solved = Solved.open_or_create(output or f"{engine.path.name.removesuffix('.gguf')}.pinfer", engine.file)
    started = time.perf_counter()
    result = run_profile(engine, solved, calibration, sequences)
    seconds = time.perf_counter() - started
    files, problem = write_report(solved.path, engine.path.name, calibration.name, result)
    if problem:
        note(problem)
    if json:
        emit_json(_figures(engine, solved, result, files, seconds))
    else:
        _print(engine, solved, result, calibration)


def run_profile(engine: Engine, solved: Solved, text: Text, sequences: list[torch.Tensor]) -> Profile:
    """Profile with its progress told; Ctrl-C says how to go on."""
    try:
        with layers() as progress:
            return profile(engine, solved, text, sequences, _Watcher(progress))
    except KeyboardInterrupt:
        note(f"{solved.path} keeps the layers that are done: the same command goes on from there")
        raise


class _Watcher(Told, Watcher):
    def layer(self, number: int, found: LayerStatistics) -> None:
        self.progress.layer(number, f"density {100 * found.density:.1f} %")


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
