"""The acceptance lines: what the kernels are to reach, what was measured, and PASS, FAIL or not measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.gpu.candidates import FFN
from bench.gpu.store import Record

HALVES = ("F16", "BF16")


@dataclass(frozen=True)
class Line:
    """One promise: `figure` None where nothing was measured; `where` names the cell that gave it."""

    promise: str
    figure: float | None
    at_least: float
    where: str = ""

    @property
    def status(self) -> str:
        if self.figure is None:
            return "not measured"
        return "PASS" if self.figure >= self.at_least else "FAIL"


def verdict(records: Sequence[Record]) -> list[Line]:
    """All lines over the records of one environment, after `report.derive`."""
    ours = [r for r in records if r["kind"] == "cell" and r["passed"] and _is(r, task=FFN, provider="pinfer")]
    lines = []
    for shape, sparsity, at_least in (("7B", 90, 4.5), ("7B", 50, 1.6), ("70B", 90, 6.0)):
        for type in HALVES:
            found = [r for r in ours if _is(r, shape=shape, type=type, tokens=1, sparsity_percent=sparsity)]
            lines.append(_least(f"{shape} {type} at {sparsity} %: × best dense", found, "speedup", at_least))
    for type in HALVES:
        found = [r for r in ours if _is(r, shape="70B", type=type, tokens=1, sparsity_percent=90)]
        lines.append(_least(f"70B {type} at 90 %: share of copy bandwidth", found, "share_of_copy", 0.85))
    for scheme in ("teal", "deja-vu"):
        for sparsity in (90, 50):
            found = [r for r in ours if _is(r, type="F16", tokens=1, sparsity_percent=sparsity)]
            promise = f"F16 at {sparsity} %: × {scheme}, the least of the shapes"
            lines.append(_against(promise, found, records, scheme, 1.3))
    near_dense = [r for r in ours if r["config"]["sparsity_percent"] <= 10]
    for batch, tokens in (("batch 1", (1,)), ("batches 4 and 16", (4, 16))):
        found = [r for r in near_dense if r["config"]["tokens"] in tokens]
        lines.append(_least(f"At most 10 % sparsity, {batch}: × best dense, the least of all", found, "speedup", 1.0))
    return lines


def verdict_table(records: Sequence[Record], dry: bool = False) -> str:
    """The lines as markdown; a dry run measures none of them."""
    rows = ["| promise | measured | at least | | |", "|---|---|---|---|---|"]
    for line in verdict([] if dry else records):
        figure = "–" if line.figure is None else f"{line.figure:.2f}"
        rows.append(f"| {line.promise} | {figure} | {line.at_least:.2f} | {line.status} | {line.where} |")
    return "\n".join(rows)


def _is(record: Record, **wanted: object) -> bool:
    return all(record["config"].get(key) == value for key, value in wanted.items())


def _least(promise: str, found: Iterable[Record], key: str, at_least: float) -> Line:
    known = [record for record in found if record.get(key) is not None]
    if not known:
        return Line(promise, None, at_least)
    least = min(known, key=lambda record: float(record[key]))
    against = f", dense is {least['best_dense']}" if key == "speedup" else ""
    return Line(promise, least[key], at_least, f"{_name(least)}{against}")


def _against(promise: str, found: Iterable[Record], records: Sequence[Record], scheme: str, at_least: float) -> Line:
    """The least ratio of a scheme's time to ours, over shapes where both were measured."""
    ratios: list[tuple[float, str]] = []
    for mine in found:
        wanted = {key: mine["config"][key] for key in ("task", "shape", "type", "tokens", "sparsity_percent")}
        for theirs in records:
            if theirs["kind"] == "cell" and theirs["passed"] and _is(theirs, provider=scheme, **wanted):
                ratios.append((theirs["us_p50"] / mine["us_p50"], _name(mine)))
    if not ratios:
        return Line(promise, None, at_least)
    least, where = min(ratios)
    return Line(promise, least, at_least, where)


def _name(record: Record) -> str:
    config = record["config"]
    return f"{config['shape']} {config['type']} T{config['tokens']} {config['sparsity_percent']} %"
