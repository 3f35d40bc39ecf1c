"""The tables of `pinfer eval`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from pinfer.cli.console import console, printable
from pinfer.quality import Estimate, NeuronCounts, Perplexity, SparseSummary, Summary

LAYERS_A_LINE = 10
DEFINITIONS = {
    "nonzero": "truly active: neurons whose activation is not zero",
    "top_k": "truly active: of each token the neurons of largest |h|·‖d‖, as many as were computed for it",
}


def print_summary(summary: Summary, about: Mapping[str, Any]) -> None:
    """The conditions, dense against sparse, and the layers. about: as `pinfer eval --json` names it."""
    out = console()
    tokens = f"{summary.windows} windows of {about['window_tokens']} tokens, stride {about['stride_tokens']}"
    out.print(printable(f"{Path(about['model']).name} on {about['text']}: {tokens}, {summary.tokens} scored"))
    out.print(_losses(summary, about["method"]))
    if summary.sparse is None:
        return
    _print_distance(summary.sparse, out.print)
    out.print(_layers(summary.sparse.layers, summary.sparse.neurons, about["truly_active"] == "nonzero"))
    out.print(DEFINITIONS[about["truly_active"]])


def _losses(summary: Summary, method: str) -> Table:
    table = Table("", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    titles = ("perplexity", "nats a token", "added nats (paired)")
    for title in titles if summary.sparse is not None else titles[:2]:
        table.add_column(title, justify="right")
    table.add_row("dense", *_loss_cells(summary.dense))
    if summary.sparse is not None:
        added = summary.sparse.added
        table.add_row(method, *_loss_cells(summary.sparse.perplexity), f"{'+' * (added.value >= 0)}{_nats(added)}")
    return table


def _loss_cells(perplexity: Perplexity) -> tuple[str, str]:
    error = _error(f"{perplexity.perplexity_standard_error:.2f}")
    return f"{perplexity.perplexity:.2f}{error}", _nats(Estimate(perplexity.nll, perplexity.standard_error))


def _nats(estimate: Estimate) -> str:
    """The value and its standard error; what four digits would show as 0 in powers of ten."""
    value, error = (f"{x:.0e}" if 0 < abs(x) < 5e-5 else f"{x:.4f}" for x in (estimate.value, estimate.standard_error))
    return value + _error(error)


def _error(shown: str) -> str:
    """± the standard error, where there is one."""
    return "" if shown == "nan" else f" ± {shown}"


def _print_distance(sparse: SparseSummary, say: Callable[[str], None]) -> None:
    def share(estimate: Estimate) -> str:
        error = _error(f"{100 * estimate.standard_error:.1f}")
        return f"{100 * estimate.value:.1f}{error} %"

    high = _nats(Estimate(sparse.kl_p99, math.nan))
    say(f"KL(dense ‖ sparse): {_nats(sparse.kl)} nats, 99th percentile {high}")
    say(
        f"same argmax: {share(sparse.argmax_agreement)}; argmax in dense top 5: {share(sparse.argmax_in_dense_top5)}; "
        f"of the top 5 shared: {share(sparse.top5_overlap)}"
    )


def _layers(layers: Sequence[NeuronCounts], overall: NeuronCounts, nonzero: bool) -> Table:
    """A column a layer, LAYERS_A_LINE of them side by side; the first is all layers together."""
    named = [("all", overall), *((str(layer), counts) for layer, counts in enumerate(layers))]
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    for _ in range(min(len(named), LAYERS_A_LINE + 1) + 1):
        table.add_column(justify="right")
    for start in range(0, len(named), LAYERS_A_LINE + 1):
        here = named[start : start + LAYERS_A_LINE + 1]
        table.add_row("layer", *(name for name, _ in here))
        for title, cell in _rows(nonzero):
            table.add_row(title, *(cell(counts) for _, counts in here))
        table.add_row()
    return table


def _rows(nonzero: bool) -> list[tuple[str, Callable[[NeuronCounts], str]]]:
    rows: list[tuple[str, Callable[[NeuronCounts], str]]] = [
        ("density %", lambda counts: f"{100 * counts.density:.1f}"),
        ("recall %", lambda counts: f"{100 * counts.recall:.1f}"),
        ("weighted recall %", lambda counts: f"{100 * counts.weighted_recall:.1f}"),
    ]
    if nonzero:  # else it is 1 by definition
        rows.append(("computed / active", lambda counts: _ratio(counts.over_prediction)))
    return rows


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
