"""The plots of a profile as PNG bytes; they need matplotlib, which is optional."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from pinfer.placement.statistics import HOTTEST, LayerStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
NAMED_LAYERS = 10  # more are told apart by a colour bar
PERCENTILES = 100
LEAST, RARE = 0.1, 15  # % of tokens: what a logarithmic scale goes down to, and the median below which it is one


def draw(layers: tuple[LayerStatistics, ...]) -> dict[str, bytes]:
    """PNG files by name. ImportError without matplotlib."""
    figures = {"curves.png": _curves, "heat.png": _heat, "convergence.png": _convergence}
    return {name: _png(figure(layers)) for name, figure in figures.items()}


def _curves(layers: tuple[LayerStatistics, ...]) -> Figure:
    """Per layer, the share of firings on the hottest neurons, with the point that holds 80 %."""
    figure, axes = _figure(7.2, 4.8)
    colours = _colours(len(layers))
    for number, layer in enumerate(layers):
        firings = np.sort(layer.fired.numpy())[::-1].astype(np.float64)
        held = np.cumsum(firings) / max(firings.sum(), 1)
        share = np.arange(1, len(firings) + 1) / len(firings)
        at = layer.hot_share()
        axes.plot(100 * share, 100 * held, color=colours[number], linewidth=1.4, label=f"{number}: {100 * at:.0f} %")
        axes.plot(100 * at, 80, "o", color=colours[number], markersize=4.5, markeredgecolor="white", zorder=3)
    axes.axhline(80, color="0.35", linewidth=0.8, linestyle="--")
    axes.set(xlabel="neurons, hottest first, %", ylabel="firings that they make up, %", xlim=(0, 100), ylim=(0, 101))
    axes.set_title("How few neurons make up the firings of a layer", loc="left")
    if len(layers) <= NAMED_LAYERS:
        axes.legend(title="layer: neurons for 80 %", loc="lower right", frameon=False)
    else:
        _colour_bar(figure, axes, len(layers))
    return figure


def _heat(layers: tuple[LayerStatistics, ...]) -> Figure:
    """Layers by neurons from the hottest on: on how many tokens they fire."""
    from matplotlib.colors import LogNorm, Normalize

    rates = 100 * np.stack([_by_percentile(layer) for layer in layers])
    rare = np.median(rates) < RARE
    norm = LogNorm(LEAST, 100) if rare else Normalize(0, 100)
    figure, axes = _figure(7.2, min(8.0, 2.6 + 0.22 * len(layers)))
    image = axes.imshow(
        np.maximum(rates, LEAST), aspect="auto", cmap="inferno", interpolation="nearest", norm=norm,
        extent=(0, 100, len(layers) - 0.5, -0.5),
    )  # fmt: skip
    for number, layer in enumerate(layers):
        axes.plot([100 * layer.hot_share()] * 2, [number - 0.5, number + 0.5], color="white", linewidth=1.2)
    _count_layers(axes.yaxis)
    axes.set(xlabel="neurons, hottest first, %", ylabel="layer")
    axes.set_title("How often neurons fire (white: those to its left make up 80 %)", loc="left")
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("tokens on which they fire, %")
    if rare:
        bar.set_ticks([LEAST, 1, 10, 100], labels=[f"≤ {LEAST}", "1", "10", "100"])
    return figure


def _convergence(layers: tuple[LayerStatistics, ...]) -> Figure:
    """Per layer, how far both halves of the text agree on the hottest neurons."""
    figure, axes = _figure(7.2, 3.6)
    numbers = np.arange(len(layers))
    axes.bar(numbers, [100 * layer.convergence for layer in layers], color="#3b6ea5", width=0.7)
    axes.axhline(100 * HOTTEST, color="#b3452c", linewidth=1, linestyle="--", label="chance")
    axes.set(xlabel="layer", ylabel="agreement, %", ylim=(0, 100), xlim=(-0.6, len(layers) - 0.4))
    axes.set_title("Hottest 20 % by contribution: first half of the tokens against the second", loc="left")
    _count_layers(axes.xaxis)
    axes.legend(loc="upper right", frameon=True, framealpha=0.9)
    return figure


def _by_percentile(layer: LayerStatistics) -> np.ndarray:
    """[PERCENTILES]: the mean share of tokens on which each percent of the neurons fires, the hottest first."""
    rates = np.sort(layer.fired.numpy())[::-1] / int(layer.tokens)
    owned = np.repeat(rates, PERCENTILES)  # every neuron as 100 equal parts, so that any N is divided evenly
    return owned.reshape(PERCENTILES, -1).mean(axis=1)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure without pyplot: no display, no state that outlives it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(count: int) -> list[tuple[float, ...]]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.88 * number / max(1, count - 1)) for number in range(count)]


def _colour_bar(figure: Figure, axes: Axes, count: int) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(-0.5, count - 0.5), ListedColormap(_colours(count)))
    _count_layers(figure.colorbar(scale, ax=axes, pad=0.02, label="layer").ax.yaxis)


def _count_layers(axis: object) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # type: ignore[attr-defined]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})  # the same bytes from every version
    return buffer.getvalue()
