"""Tables of a report's rows, in text and markdown, and what changed between two reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

WIDTHS = ("1", "2", "4", "8", "16")
LEGEND = """\
- `64r 4×8w 50%` reads: 64 registers a thread; 4 CTAs of 8 warps fit an SM (AMD: CU) at once, 50 % of its warps.
- The columns after the targets are those of {detail}. *wide*: share of the bytes named by global load
  instructions that 16-byte loads carry. *loads*: global loads of 1, 2, 4, 8 and 16 bytes, copies to shared memory
  among them. *convert*: conversions between number types. *int*: integer and logic instructions.
- *instr/B*: instructions of the loop that loads most, each counted once, for each byte that its loads name. An SM
  issues 128 thread instructions a cycle: where the figure exceeds 128 × SMs × clock / bandwidth (about 9 for 132 SMs
  at 1.75 GHz and 3.35 TB/s), the kernel cannot keep the memory busy.
- Occupancy is an estimate from registers, shared memory and warps; nothing here was run.
"""


def text_table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a build and target."""
    head = (
        "op", "build", "target", "warps", "regs", "shared", "stack", "spills", "wide", "loads 1/2/4/8/16",
        "FFMA", "convert", "tensor", "atomic", "instr/B", "CTAs/SM", "occupancy",
    )  # fmt: skip
    return _aligned([head, *(_text_cells(row) for row in rows)])


def _text_cells(row: dict[str, Any]) -> tuple[str, ...]:
    name = (row["op"], row["build"], row["target"], str(row["num_warps"]))
    if "error" in row:
        return (*name, f"error: {row['error'][:60]}")
    counts = row["instructions"]
    return (
        *name, str(row["registers"]), str(row["shared_bytes"]), str(row["stack_bytes"]),
        str(row["spill_instructions"]), _share(row["wide_share"]), _loads(row),
        *(str(counts.get(family, 0)) for family in ("fma", "conversion", "tensor", "atomic")),
        _ratio(row["loop_instructions_per_byte"]), str(row["occupancy_ctas"]), f"{row['occupancy_share']:.0%}",
    )  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """A summary by op, the rules that are broken, and a table an op with the targets as columns."""
    rows, targets = report["rows"], report["targets"]
    detail = [target for target in targets if target.startswith("sm_")][-1:] or targets[-1:]
    n_builds = len({(row["op"], row["build"]) for row in rows})
    problems = [problem for row in rows for problem in row["problems"]]
    lines = [
        "# What the kernels compile to",
        "",
        f"Triton {report['triton']}, ptxas {report['ptxas']}; {n_builds} builds for {', '.join(targets)}. "
        "Written by `python -m pinfer.kernels.report`.",
        "",
        *([f"- **{problem}**" for problem in problems] or ["No spills, no stack, every promise of wide loads kept."]),
        "",
        *_summary(rows),
        "",
        LEGEND.format(detail=detail[0]),
    ]
    for op, group in groupby(rows, key=lambda row: row["op"]):
        lines += [f"## {op}", "", *_op_table(list(group), targets, detail[0]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The worst of each op over its builds and targets."""
    lines = [
        "| op | builds | spill instructions | registers, most | occupancy, least | instr/B, most |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for op, group in groupby(rows, key=lambda row: row["op"]):
        all_of_op = list(group)
        sound = [row for row in all_of_op if "error" not in row]
        n_builds = len({row["build"] for row in all_of_op})
        if not sound:
            lines.append(f"| {op} | {n_builds} | does not compile | | | |")
            continue
        registers = max(sound, key=lambda row: row["registers"])
        occupied = min(sound, key=lambda row: row["occupancy_share"])
        work = max(sound, key=lambda row: row["loop_instructions_per_byte"] or 0)
        lines.append(
            f"| {op} | {n_builds} | {sum(row['spill_instructions'] for row in sound)} "
            f"| {registers['registers']} ({registers['target']}) "
            f"| {occupied['occupancy_share']:.0%} ({occupied['target']}, by {occupied['occupancy_limited_by']}) "
            f"| {_ratio(work['loop_instructions_per_byte'])} ({work['target']}) |"
        )
    return lines


def _op_table(rows: Sequence[dict[str, Any]], targets: Sequence[str], detail: str) -> list[str]:
    head = ["build", "warps", *targets, "shared B", "wide", "instr/B", "loads 1/2/4/8/16"]
    head += ["FFMA", "convert", "int", "tensor", "all"]
    lines = [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1)]
    for build, group in groupby(rows, key=lambda row: row["build"]):
        by_target = {row["target"]: row for row in group}
        first = next(iter(by_target.values()))
        cells = [
            build.replace("|", "\\|"),
            str(first["num_warps"]),
            *(_fit(by_target.get(target)) for target in targets),
        ]
        lines.append(f"| {' | '.join([*cells, *_detail(by_target.get(detail))])} |")
    return lines


def _fit(row: dict[str, Any] | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "**does not compile**"
    spills = f"**{row['spill_instructions']} spills** " if row["spill_instructions"] or row["stack_bytes"] else ""
    return f"{spills}{row['registers']}r {row['occupancy_ctas']}×{row['num_warps']}w {row['occupancy_share']:.0%}"


def _detail(row: dict[str, Any] | None) -> list[str]:
    if row is None or "error" in row:
        return [""] * 9
    counts = row["instructions"]
    families = ("fma", "conversion", "integer", "tensor", "total")
    ratio = _ratio(row["loop_instructions_per_byte"])
    return [str(row["shared_bytes"]), _share(row["wide_share"]), ratio, _loads(row)] + [
        str(counts.get(family, 0)) for family in families
    ]


def differences(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each build and target that changed, appeared or went, of the ops and targets in `new`."""
    before, after = ({(row["op"], row["build"], row["target"]): row for row in rows} for rows in (old, new))
    covered = {(op, target) for op, _, target in after}
    lines = []
    for key in sorted({*after, *(key for key in before if (key[0], key[2]) in covered)}):
        name = f"{key[0]}: {key[1]} on {key[2]}"
        if key not in after or key not in before:
            lines.append(f"{name}: {'new' if key in after else 'gone'}")
            continue
        changes = list(_changes(_flat(before[key]), _flat(after[key])))
        if changes:
            lines.append(f"{name}: {', '.join(changes)}")
    return lines


def _changes(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*after, *before)):
        if before.get(name) != after.get(name):
            yield f"{name} {before.get(name, 0)} -> {after.get(name, 0)}"


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {k: v for k, v in row.items() if not isinstance(v, (dict, list))}
    for group, unit in (("load_widths", "-byte loads"), ("instructions", "")):
        flat |= {f"{name}{unit}": n for name, n in row.get(group, {}).items()}
    return flat


def _loads(row: dict[str, Any]) -> str:
    counts = row["load_widths"]
    others = "".join(f" +{n}×{width}B" for width, n in counts.items() if width not in WIDTHS)
    return "/".join(str(counts.get(width, 0)) for width in WIDTHS) + others


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    full = [line for line in lines if len(line) == len(lines[0])]
    widths = [max(len(line[at]) for line in full) for at in range(len(lines[0]))]
    pad = [str.ljust if at < 3 else str.rjust for at in range(len(widths))]
    return "\n".join("  ".join(pad[at](cell, widths[at]) for at, cell in enumerate(line)).rstrip() for line in lines)
