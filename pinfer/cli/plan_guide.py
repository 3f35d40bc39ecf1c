"""The tables of PowerInfer's guide beside the simulator's figures, in the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from itertools import groupby

from rich import box
from rich.table import Table

from pinfer.cli.console import console, emit_json
from pinfer.placement.guide import Row


def show_guide(rows: list[Row], json: bool) -> None:
    """A table for each of the guide's, or all rows as one JSON object."""
    if json:
        emit_json({"guide": [dataclasses.asdict(row) for row in rows]})
        return
    out = console()
    out.print("verdict: on the guide's figure, by pinfer's")
    for title, group in groupby(rows, key=lambda row: row.table):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", title_style="bold")
        for name in ("", "the guide", "pinfer", "verdict", "because"):
            table.add_column(name, overflow="fold")
        for row in group:
            table.add_row(row.item, row.guide, f"{row.ours:.3g} {row.unit}", row.verdict, row.why)
        out.print(table)
