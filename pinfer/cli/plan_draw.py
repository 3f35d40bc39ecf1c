"""Draws a plan in the terminal: a bar a layer with where its bytes lie, and what it takes on either device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil

from rich.text import Text

from pinfer.placement.memory import placed_items
from pinfer.placement.plan import Plan
from pinfer.placement.problem import LayerTime, Problem

MOST_BARS = 20  # more layers are drawn in groups of neighbours
WIDTH = 60
# In the order of a bar: device, items of memory, sign, colour.
PARTS = (
    ("gpu", ("attention",), "A", "green"),
    ("gpu", ("kv",), "K", "cyan"),
    ("gpu", ("predictor", "compensation"), "P", "magenta"),
    ("gpu", ("neurons",), "█", "red"),
    ("cpu", ("neurons",), "░", "blue"),
    ("cpu", ("predictor", "compensation"), "p", "magenta"),
    ("cpu", ("kv",), "k", "cyan"),
    ("cpu", ("attention",), "a", "green"),
)
LEGEND = "A attention, K keys and values, P predictor, █ hot neurons; on the CPU: ░ cold neurons, p, k, a"


def layer_bytes(problem: Problem, plan: Plan) -> list[list[int]]:
    """Bytes of every layer in the order of PARTS."""
    rows = []
    for layer, one in zip(problem.shape.layers, plan.layers, strict=True):
        where = layer, one.attention, one.predictor, one.n_hot
        gpu, cpu = placed_items(*where, "gpu", problem.context), placed_items(*where, "cpu", problem.context)
        rows.append([sum((gpu if place == "gpu" else cpu)[name] for name in names) for place, names, _, _ in PARTS])
    return rows


def draw(problem: Problem, plan: Plan, times: Sequence[LayerTime]) -> Iterator[Text]:
    """The lines of the drawing."""
    rows, each = layer_bytes(problem, plan), max(1, ceil(len(times) / MOST_BARS))
    yield Text(f"bytes of {'a layer' if each == 1 else f'{each} layers'}: {LEGEND}")
    yield Text(f"{'layer':>7} {'':{WIDTH}} {'hot':>7} {'GPU ms':>8} {'CPU ms':>8}")
    for first in range(0, len(times), each):
        last = min(first + each, len(times)) - 1
        group = range(first, last + 1)
        line = Text(f"{first if first == last else f'{first}-{last}':>7} ")
        sizes = [sum(rows[layer][part] for layer in group) for part in range(len(PARTS))]
        for (_, _, sign, colour), cells in zip(PARTS, share_out(sizes, WIDTH), strict=True):
            line.append(sign * cells, style=colour)
        hot = sum(plan.layers[layer].n_hot for layer in group) / max(
            1, sum(plan.layers[layer].hot.numel() for layer in group)
        )
        on_gpu, on_cpu = (
            1e3 * sum(device_s(times[layer], plan, layer, place) for layer in group) for place in ("gpu", "cpu")
        )
        line.append(f" {100 * hot:5.1f} % {on_gpu:8.3f} {on_cpu:8.3f}")
        yield line


def device_s(time: LayerTime, plan: Plan, layer: int, place: str) -> float:
    """Seconds that a layer takes on one device."""
    one = plan.layers[layer]
    home = one.attention if one.predictor == "split" else one.predictor
    seconds = time.gpu_s if place == "gpu" else time.cpu_s
    return seconds + (time.attention_s if one.attention == place else 0) + (time.predictor_s if home == place else 0)


def share_out(sizes: Sequence[int], cells: int) -> list[int]:
    """`cells` cells divided as `sizes` are, by the largest remainders; all zero where the sizes are."""
    if not (total := sum(sizes)):
        return [0] * len(sizes)
    found = [size * cells // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda at: -(sizes[at] * cells % total))
    for at in by_remainder[: cells - sum(found)]:
        found[at] += 1
    return found
