"""A plan as a PNG: where each layer's bytes lie, and what it takes; needs matplotlib, which is optional."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from pinfer.cli.plan_draw import PARTS, device_s, layer_bytes
from pinfer.placement.plan import Plan
from pinfer.placement.problem import LayerTime, Problem

DPI = 110
NAMES = ("attention, GPU", "keys and values, GPU", "predictor, GPU", "hot neurons, GPU",
         "cold neurons, CPU", "predictor, CPU", "keys and values, CPU", "attention, CPU")  # fmt: skip
COLOURS = ("#3b7d4f", "#59a5a9", "#8d5a97", "#b3452c", "#9db7d5", "#c9b3ce", "#b9dcdd", "#a8cdb3")


def plot(problem: Problem, plan: Plan, times: Sequence[LayerTime], title: str) -> bytes:
    """The PNG. ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 6.4), dpi=DPI, layout="constrained")
    memory, time = figure.subplots(2, 1, sharex=True)
    numbers, bottom = np.arange(len(times)), np.zeros(len(times))
    parts = np.array(layer_bytes(problem, plan), dtype=np.float64).reshape(len(times), len(PARTS)) / 1e6
    for at, (name, colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        if parts[:, at].any():
            memory.bar(numbers, parts[:, at], bottom=bottom, width=1.0, color=colour, label=name)
            bottom += parts[:, at]
    memory.set(ylabel="MB", xlim=(-0.5, len(times) - 0.5))
    memory.set_title(title, loc="left")
    for place, colour in (("gpu", "#b3452c"), ("cpu", "#3b6ea5")):
        taken = [1e3 * device_s(one, plan, layer, place) for layer, one in enumerate(times)]
        time.step(numbers, taken, where="mid", color=colour, label=place.upper())
    time.step(numbers, [1e3 * one.total_s for one in times], where="mid", color="0.35", linestyle="--", label="layer")
    time.set(xlabel="layer", ylabel="ms a token", ylim=(0, None))
    for axes in (memory, time):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": ""})  # the same bytes from every version
    return buffer.getvalue()
