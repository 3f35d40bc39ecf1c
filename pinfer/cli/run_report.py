"""The table of --stats: what each layer's placement came to in a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save as save_safetensors

from pinfer.cli.console import note
from pinfer.engine.run_stats import LayerRun, RunStatistics
from pinfer.files import write_atomically

COLUMNS = ("layer", "home", "hot", "hits", "density", "recall", "GPU busy", "CPU busy", "over")


def report_run(statistics: RunStatistics, save: str | None, quiet: bool) -> None:
    """Print the table to stderr, unless quiet, and write what was gathered where asked."""
    if not quiet:
        print_layers(statistics.layers())
    if save is not None:
        content = save_safetensors({name: one.contiguous() for name, one in statistics.tensors().items()})
        write_atomically(Path(save), content)
        note(f"statistics of the run are in {save}")


def print_layers(layers: Sequence[LayerRun]) -> None:
    """One line a layer, on stderr beside the run's other figures."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in COLUMNS:
        table.add_column(title, justify="left" if title == "home" else "right")
    for one in layers:
        shares = (one.hot, one.hot_hits, one.density, one.recall, one.gpu_busy, one.cpu_busy)
        table.add_row(str(one.layer), one.attention, *map(_percent, shares), str(one.transfer_bytes))
    Console(file=sys.stderr, highlight=False, soft_wrap=True).print(table)
    note(
        "home: where its attention is; hits: named neurons that are hot; over: bytes a token takes to the CPU and back"
    )
    tokens = f"{layers[0].samples} token{'' if layers[0].samples == 1 else 's'}"
    note(f"recall and busy shares are of {tokens} each, hits and density of all decoded ones")


def layer_figures(layers: Sequence[LayerRun]) -> list[dict[str, Any]]:
    """The same for --json."""
    return [dataclasses.asdict(one) for one in layers]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
