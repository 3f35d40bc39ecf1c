"""The report of a profile: one HTML file that holds its plots, for people; nothing reads it back."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from pinfer.cli import profile_plots
from pinfer.engine.profile import Profile
from pinfer.files import write_atomically
from pinfer.kernels.activation import ZERO_BELOW_ZERO

REPORT = "report.html"
COLUMNS = ("layer", "density", "80 % of firings on", "80 % of contribution on", "halves agree")
MEANING = {
    "density": "neurons that fire on a token, of all",
    "80 % of firings on": "the hottest neurons that make up 80 % of all firings, of all",
    "80 % of contribution on": "the same for Σ |h| ‖d‖, what neurons add to the layer's output",
    "halves agree": "the hottest 20 % by contribution in the first half of the tokens that are so in the second too; chance is 20 %",
}
FIRES = "A neuron fires on a token where its activation is not zero."
COUNTS = "A neuron counts as firing on a token if it is among the fewest that hold 80 % of Σ |h| ‖d‖ there."
CAPTIONS = {
    "curves.png": "The steeper a curve rises, the fewer neurons a GPU must hold for most of the work.",
    "heat.png": "Rows are layers; neurons are sorted in each by how often they fire.",
    "convergence.png": "Low bars: the ranking depends on the text. More tokens help, or a text nearer to the use.",
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0 } th, td { padding: .25em .9em; text-align: right; border-bottom: 1px solid #ddd }
th { vertical-align: bottom } img { max-width: 100% } figure { margin: 1.5em 0 } figcaption, dd { color: #555 }
dt { font-weight: 600 }
"""


def rows(profile: Profile) -> list[tuple[str, ...]]:
    """The table's cells, a line a layer."""
    return [
        (str(number), *(_percent(value) for value in (one.density, one.hot_share(), one.mass_share(), one.convergence)))
        for number, one in enumerate(profile.layers)
    ]


def write_report(folder: Path, model: str, text: str, profile: Profile) -> tuple[list[Path], str | None]:
    """Write the report and the plots into a folder; the files, and what is missing if there are no plots."""
    problem = None
    try:
        plots = profile_plots.draw(profile.layers)
    except ImportError as error:
        plots = {}
        missing = (error.name or "matplotlib").partition(".")[0]
        problem = f"no plots: {missing} is not installed (pip install 'pinfer[plots]')"
    page = _page(model, text, profile, plots, problem)
    files = {**plots, REPORT: page.encode()}
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files], problem


def _page(model: str, text: str, profile: Profile, plots: Mapping[str, bytes], problem: str | None) -> str:
    title = f"Profile of {escape(model)}"
    settings = profile.settings
    intro = (
        f"{profile.figures['tokens']:,} tokens of {escape(text)}; activation {escape(settings['activation'])}; "
        f"{'int8' if settings['int8'] else 'float32'} activations; density {_percent(profile.figures['density'])}. "
        f"{FIRES if settings['activation'] in ZERO_BELOW_ZERO else COUNTS}"
    )
    body = [f"<h1>{title}</h1>", f"<p>{intro}</p>", _table(COLUMNS, rows(profile)), "<dl>"]
    body += [f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in MEANING.items()]
    body.append("</dl>")
    body += [_figure(name, png) for name, png in plots.items()]
    if problem:
        body.append(f"<p>{escape(problem)}</p>")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _figure(name: str, png: bytes) -> str:
    caption = CAPTIONS[name]
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
