"""An evaluation as plain data: one flat object of all figures, and a long table of one record a figure.

The long table is JSON Lines. Its first line describes the run (`"kind": "run"`); every other one is a
figure (`"kind": "figure"`): metric, unit, layer (null: all layers, or none is meant), window (its
number; null: all windows), value, standard_error over windows (null where there is none) and tokens.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pinfer.files import write_atomically
from pinfer.quality.compare import SparseSummary, Summary, WindowScores
from pinfer.quality.losses import Estimate, Perplexity, over_windows
from pinfer.quality.neurons import NeuronCounts

FORMAT = 1
UNITS = {"dense_nll": "nats", "sparse_nll": "nats", "added": "nats", "kl": "nats", "kl_p99": "nats"}
NEURON_METRICS = ("density", "recall", "weighted_recall", "over_prediction")


def figures(summary: Summary) -> dict[str, Any]:
    """All figures of a text under names with units. `perplexity` and `nll_nats` are the sparse run's where there is one."""
    sparse = summary.sparse
    flat: dict[str, Any] = {"windows": summary.windows, "scored_tokens": summary.tokens}
    flat |= _of_perplexity("", summary.dense if sparse is None else sparse.perplexity)
    flat |= _of_perplexity("dense_", summary.dense)
    if sparse is None:
        return flat
    for name, estimate in _estimates(sparse).items():
        name = f"{name}_nats" if name in UNITS else name
        flat |= {name: estimate.value, f"{name}_standard_error": _finite(estimate.standard_error)}
    flat["kl_p99_nats"] = sparse.kl_p99
    flat |= neuron_figures(sparse.neurons)
    flat["layers"] = [{"layer": i, **neuron_figures(counts)} for i, counts in enumerate(sparse.layers)]
    return flat


def neuron_figures(counts: NeuronCounts) -> dict[str, float | None]:
    """The shares of `NeuronCounts` by name."""
    return {name: None if (value := getattr(counts, name)) is None else _finite(value) for name in NEURON_METRICS}


def records(summary: Summary, scores: Sequence[WindowScores]) -> Iterator[dict[str, Any]]:
    """One record a figure: of the whole text, of each layer, of each window, of each layer in each window."""
    runs = {"dense": summary.dense} | ({} if summary.sparse is None else {"sparse": summary.sparse.perplexity})
    for name, run in runs.items():
        yield _record(f"{name}_perplexity", run.perplexity, summary.tokens, error=run.perplexity_standard_error)
        yield _record(f"{name}_nll", run.nll, summary.tokens, error=run.standard_error)
    if summary.sparse is not None:
        for name, estimate in _estimates(summary.sparse).items():
            yield _record(name, estimate.value, summary.tokens, error=estimate.standard_error)
        yield _record("kl_p99", summary.sparse.kl_p99, summary.tokens)
        yield from _of_neurons(summary.sparse.neurons, summary.tokens)
        for layer, counts in enumerate(summary.sparse.layers):
            yield from _of_neurons(counts, summary.tokens, layer=layer)
    for number, one in enumerate(scores):
        yield from _of_window(number, one)


def _of_window(number: int, scores: WindowScores) -> Iterator[dict[str, Any]]:
    values = dict(scores.tokens)
    if "sparse_nll" in values:
        values["added"] = values["sparse_nll"] - values["dense_nll"]
    n_tokens = scores.window.scored
    for name, of_tokens in values.items():
        yield _record(name, over_windows([of_tokens]).value, n_tokens, window=number)
    for layer, counts in enumerate(scores.layers):
        yield from _of_neurons(counts, n_tokens, layer=layer, window=number)


def _of_neurons(
    counts: NeuronCounts, n_tokens: int, *, layer: int | None = None, window: int | None = None
) -> Iterator[dict[str, Any]]:
    for name, value in neuron_figures(counts).items():
        yield _record(name, value, n_tokens, layer=layer, window=window)


def _record(
    metric: str,
    value: float | None,
    tokens: int,
    *,
    layer: int | None = None,
    window: int | None = None,
    error: float = math.nan,
) -> dict[str, Any]:
    return {
        "kind": "figure",
        "metric": metric,
        "unit": UNITS.get(metric, "1"),
        "layer": layer,
        "window": window,
        "value": None if value is None else _finite(value),
        "standard_error": _finite(error),
        "tokens": tokens,
    }


def _estimates(sparse: SparseSummary) -> dict[str, Estimate]:
    names = ("added", "kl", "argmax_agreement", "argmax_in_dense_top5", "top5_overlap")
    return {name: getattr(sparse, name) for name in names}


def _of_perplexity(prefix: str, perplexity: Perplexity) -> dict[str, float | None]:
    return {
        f"{prefix}perplexity": perplexity.perplexity,
        f"{prefix}perplexity_standard_error": _finite(perplexity.perplexity_standard_error),
        f"{prefix}nll_nats": perplexity.nll,
        f"{prefix}nll_nats_standard_error": _finite(perplexity.standard_error),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check_writable(path: Path) -> None:
    """FileNotFoundError, IsADirectoryError or PermissionError if `write_records` could not write there.

    ValueError for what is no regular file, such as a device: it would be replaced.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent}: cannot be written")


def write_records(path: Path, run: Mapping[str, Any], rows: Iterator[dict[str, Any]]) -> None:
    """Write the long table, `run` (plain data) first; the file appears whole or not at all."""
    lines = (
        json.dumps(row, ensure_ascii=False, allow_nan=False)
        for row in ({"kind": "run", "format": FORMAT, **run}, *rows)
    )
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
