"""The roofline: bytes touched against time of every timed cell, with the line of the measured bandwidth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.candidates import FFN
from bench.gpu.store import Record


def draw_roofline(path: Path, records: Sequence[Record], gpu: str, dry: bool) -> str | None:
    """Write the plot; why there is none, as text, an empty text when it was drawn, None with nothing to draw."""
    timed = [r for r in records if r["kind"] == "cell" and r["passed"] and r["config"]["task"] == FFN]
    if not timed:
        return None
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "matplotlib is not installed"
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    for provider in dict.fromkeys(record["config"]["provider"] for record in timed):
        mine = [record for record in timed if record["config"]["provider"] == provider]
        axes.scatter([r["bytes"] / 1e6 for r in mine], [r["us_p50"] for r in mine], s=18, alpha=0.75, label=provider)
    limits = [min(r["bytes"] for r in timed) / 1e6, max(r["bytes"] for r in timed) / 1e6]
    for way in ("copy", "read"):
        rates = [r["gb_per_s"] for r in records if r["kind"] == "bandwidth" and r["config"]["way"].startswith(way)]
        if rates:
            times = [megabytes * 1e3 / max(rates) for megabytes in limits]
            axes.plot(limits, times, "--" if way == "copy" else ":", color="black", lw=1)
            axes.annotate(f"{way} {max(rates):.0f} GB/s", (limits[1], times[1]), fontsize=8, ha="right", va="top")
    axes.set(xscale="log", yscale="log", xlabel="bytes touched, MB", ylabel="time a launch, µs (p50)")
    axes.set_title(f"FFN, {gpu}" + (" (dry run: times mean nothing)" if dry else ""), fontsize=10)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=130, bbox_inches="tight", format="png")
    pyplot.close(figure)
    os.replace(temporary, path)
    return ""
