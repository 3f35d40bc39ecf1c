"""The command: compiles every build without a device, prints a table, and writes report.json and report.md.

Nothing in the files depends on time or place: a change of theirs is a change of the kernels or of the compiler.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pinfer.files import write_atomically
from pinfer.kernels import ops
from pinfer.kernels.report.tables import differences, markdown, text_table

TARGET_NAMES = ("sm_80", "sm_86", "sm_89", "sm_90", "gfx942")
DEFAULT_FOLDER = Path("bench/results/aot")


def main(arguments: list[str] | None = None) -> int:
    """0 if every kernel keeps the rules, 1 if one breaks them, 2 where the command cannot run."""
    options = _options(arguments)
    try:
        from pinfer.kernels.compiled.compile import interpreting
    except ImportError as error:
        return _refuse(f"Triton cannot be imported: {error}")
    if interpreting():
        return _refuse("TRITON_INTERPRET is set: Triton would interpret and compile nothing; unset it and run again")
    try:
        old = None if options.diff is None else json.loads(options.diff.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _refuse(f"--diff {options.diff} is not a report.json: {error}")
    complete = len(options.targets) == len(TARGET_NAMES) and len(options.ops) == len(ops.OPS)
    folder = options.output or (DEFAULT_FOLDER if complete else None)
    if options.workers < 0:
        return _refuse(f"--workers {options.workers} must be 1 or more, or 0 for the number of cores")
    if folder is not None:
        try:  # before minutes of compiling, not after
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "report.json").open("a").close()
        except OSError as error:
            return _refuse(f"{folder} cannot be written: {error.strerror}")
    report = _report(options.ops, options.targets, options.workers)
    print(text_table(report["rows"]))
    if folder is not None:
        write_atomically(folder / "report.json", _as_json(report).encode())
        write_atomically(folder / "report.md", markdown(report).encode())
        print(f"\nwritten: {folder / 'report.json'} and report.md")
    if old is not None:
        changes = differences(old, report["rows"])
        print("\n" + "\n".join(changes or [f"nothing changed since {options.diff}"]))
    problems = [problem for row in report["rows"] for problem in row["problems"]]
    print("\n" + "\n".join(problems or ["Every kernel keeps the rules."]))
    return 1 if problems else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pinfer.kernels.report", description=__doc__)
    names = [op.name for op in ops.OPS]
    parser.add_argument("--ops", type=_some_of(names), default=names, metavar="A,B", help="ops, all by default")
    parser.add_argument("--targets", type=_some_of(TARGET_NAMES), default=list(TARGET_NAMES), metavar="A,B",
                        help=f"of {', '.join(TARGET_NAMES)}; all by default")  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER",
                        help=f"where to write; {DEFAULT_FOLDER} for a whole run, nowhere for a part of it")  # fmt: skip
    parser.add_argument("--diff", type=Path, metavar="OLD.json", help="an older report.json: print what changed")
    parser.add_argument("--workers", type=int, default=0, help="processes; the number of cores by default")
    return parser.parse_args(arguments)


def _some_of(known: tuple[str, ...] | list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = [name.strip() for name in text.split(",") if name.strip()]
        unknown = sorted(set(chosen) - set(known))
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or repr(text)} is none of {', '.join(known)}")
        return [name for name in known if name in chosen]

    return parse


def _report(op_names: list[str], targets: list[str], workers: int) -> dict[str, Any]:
    import triton

    from pinfer.kernels.compiled.compile import ptxas_version
    from pinfer.kernels.compiled.survey import survey

    rows = survey([op for op in ops.OPS if op.name in op_names], targets, workers, _show_progress)
    rows.sort(key=lambda row: (row.op, row.build, targets.index(row.target)))
    described = [row.as_json() | {"problems": row.problems()} for row in rows]
    return {"triton": triton.__version__, "ptxas": ptxas_version(), "targets": targets, "rows": described}


def _as_json(report: dict[str, Any]) -> str:
    """A row a line, so that a change of one kernel is a change of its lines."""
    head = json.dumps({name: value for name, value in report.items() if name != "rows"})
    return head[:-1] + ', "rows": [\n' + ",\n".join(json.dumps(row) for row in report["rows"]) + "\n]}\n"


def _show_progress(done: int, total: int, name: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{done}/{total}  {name[:90]}", end="\n" if done == total else "", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(f"{done}/{total} builds", file=sys.stderr, flush=True)


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
