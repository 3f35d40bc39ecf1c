"""What came of a run, as markdown: the verdict, the checks, and a row for every cell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from bench.gpu.cells import Cell
from bench.gpu.plot import draw_roofline
from bench.gpu.store import Record, Store, write_text
from bench.gpu.verdict import verdict_table

DRY_NOTE = "**Dry run: toy sizes in Triton's interpreter. The times mean nothing.**"


def derive(records: Sequence[Record], dry: bool = False) -> None:
    """Add what follows from several records: shares of the measured bandwidth, and speed-up over the best dense.

    Nothing follows from a dry run's times.
    """
    timed = [record for record in records if not dry and record["kind"] == "cell" and record["passed"]]
    copy, read = bandwidth(records, "copy"), bandwidth(records, "read")
    for record in timed:
        record["share_of_copy"] = record["gb_per_s"] / copy if copy else None
        record["share_of_read"] = record["gb_per_s"] / read if read else None
        best = best_dense(record, timed)
        record["best_dense"] = best and best["config"]["provider"]
        record["best_dense_us"] = best and best["us_p50"]
        record["speedup"] = best["us_p50"] / record["us_p50"] if best else None


def bandwidth(records: Iterable[Record], way: str) -> float | None:
    """The best measured GB/s of copies or reads."""
    found = [
        record["gb_per_s"]
        for record in records
        if record["kind"] == "bandwidth" and record["passed"] and record["config"]["way"].startswith(way)
    ]
    return max(found, default=None)


def best_dense(record: Record, timed: Iterable[Record]) -> Record | None:
    """The quickest dense way at this task, shape and batch: in halves, or in the record's own type."""
    config = record["config"]
    types = {config["type"], "BF16" if config["type"] == "BF16" else "F16"}
    same = ("task", "shape", "tokens")
    pool = [
        other
        for other in timed
        if other.get("dense")
        and other["config"]["type"] in types
        and all(other["config"][key] == config[key] for key in same)
    ]
    return min(pool, key=lambda other: float(other["us_p50"]), default=None)


def summary(record: Record) -> str:
    """A cell in one line of the console."""
    if not record["passed"]:
        return f"not timed: {record['reason']}"
    return f"{record['us_p50']:9.1f} us {record['gb_per_s']:7.0f} GB/s  error {number(record['error'])}"


def write_report(store: Store, left_out: Sequence[Cell], unchecked: int, seconds: float, dry: bool) -> str:
    """Write results.json, report.md and roofline.png; returns the verdict table for the console."""
    records = store.current()
    derive(records, dry)
    store.save()
    verdict = verdict_table(records, dry)
    drawn = draw_roofline(store.folder / "roofline.png", records, store.environment["gpu"], dry)
    parts = [
        f"# Kernels on {store.environment['gpu']}",
        DRY_NOTE if dry else "",
        "`python -m bench.gpu`: CUDA-graph replays over rotating weights, µs a launch at p50 (p20–p80).",
        environment_lines(store.environment),
        "## Verdict",
        verdict,
        "## Memory bandwidth",
        bandwidth_table(records),
        "## Checks",
        checks_table(records),
        f"{unchecked} more cases were left unchecked for lack of time." if unchecked else "",
        *cell_tables(records),
        left_out_lines(left_out, seconds),
        "" if drawn is None else f"No roofline: {drawn}." if drawn else "![Bytes touched against time](roofline.png)",
    ]
    write_text(store.folder / "report.md", "\n\n".join(part for part in parts if part) + "\n")
    return "\n".join([*([DRY_NOTE] if dry else []), verdict, left_out_lines(left_out, seconds)])


def environment_lines(about: dict[str, Any]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in about.items() if key != "gpu")


def bandwidth_table(records: Iterable[Record]) -> str:
    rows = [
        [record["config"]["way"], number(record["gb_per_s"]), micro(record), number(record["bytes"] / 1e6)]
        for record in records
        if record["kind"] == "bandwidth"
    ]
    return table(["way", "GB/s", "µs", "MB"], rows)


def checks_table(records: Iterable[Record]) -> str:
    """A row an op with its largest error, and a row for every failure."""
    by_op: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "check":
            by_op.setdefault(record["config"]["op"], []).append(record)
    rows, failures = [], []
    for op, checks in by_op.items():
        bad = [record for record in checks if not record["passed"]]
        largest = max((record["error"] for record in checks if record["error"] is not None), default=None)
        rows.append([op, len(checks), len(bad), number(largest), number(checks[0]["tolerance"])])
        failures += [f"- **{op}** {r['config']['case']} ({r['config']['layout']}): {r['reason']}" for r in bad]
    text = table(["op", "cases", "failed", "largest error", "tolerance"], rows)
    return text + ("\n\n" + "\n".join(failures) if failures else "")


HEADER = ["type", "T", "sparsity", "how", "µs", "GB/s", "of copy", "of read", "× best dense", "(which)", "error"]


def cell_tables(records: Iterable[Record]) -> list[str]:
    """A table for every task and shape, in the order measured."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["kind"] == "cell":
            groups.setdefault((record["config"]["task"], record["config"]["shape"]), []).append(record)
    parts = []
    for (task, shape), cells in groups.items():
        cells.sort(key=_by_config)
        parts += [f"## {task}, {shape}", table(HEADER, [cell_row(record) for record in cells])]
    return parts


def _by_config(record: Record) -> tuple[Any, ...]:
    config = record["config"]
    sparsity = config["sparsity_percent"]
    return (config["tokens"], config["type"] or "", -1 if sparsity is None else sparsity, config["provider"])


def cell_row(record: Record) -> list[Any]:
    config = record["config"]
    sparsity = "" if config["sparsity_percent"] is None else f"{config['sparsity_percent']} %"
    head = [config["type"] or "", config["tokens"], sparsity, config["provider"]]
    if not record["passed"]:
        return [*head, f"not timed: {record['reason']}", *[""] * (len(HEADER) - len(head) - 1)]
    shares = [percent(record.get(key)) for key in ("share_of_copy", "share_of_read")]
    cached = "" if record["served_from_memory"] else " (cached)"
    speedup = "" if record.get("speedup") is None else f"{record['speedup']:.2f}"
    rate = number(record["gb_per_s"]) + cached
    return [*head, micro(record), rate, *shares, speedup, record.get("best_dense") or "", number(record["error"])]


def left_out_lines(left_out: Sequence[Cell], seconds: float) -> str:
    took = f"{seconds:.0f} s."
    if not left_out:
        return f"Nothing was left out; {took}"
    shown = "; ".join(cell.label for cell in left_out[:12])
    more = "" if len(left_out) <= 12 else f"; and {len(left_out) - 12} more"
    return f"Left out for lack of time or cut off ({len(left_out)} cells; the same command goes on with them; {took}): {shown}{more}."


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def micro(record: Record) -> str:
    return f"{record['us_p50']:.1f} ({record['us_p20']:.1f}–{record['us_p80']:.1f})"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
