"""The run: bandwidth, checks of every op, cells by importance until the time is up, and what came of it."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench.gpu.candidates import Candidate, candidates
from bench.gpu.cells import Cell, planned
from bench.gpu.checks import Outcome, check, said
from bench.gpu.compile_ahead import compile_ahead
from bench.gpu.machine import ROOT, clocks_now, environment, slug
from bench.gpu.measure import DRY_VARIANTS, generator_for, measure_bandwidth, measure_cell
from bench.gpu.report import summary, write_report
from bench.gpu.store import Record, Store
from bench.gpu.timing import Timer
from bench.gpu.trees import clone, held_bytes, repacked
from pinfer.kernels import ops, tuning
from pinfer.kernels.registry import Op

FIRST_GUESS_S = {"torch-compile": 45.0}  # a search over block sizes; others take 2 s until one was measured
CELLS_PREPARED, PREPARING_S = 24, 15.0  # compiled at a time, and what that may take
RESERVED_S = 6.0  # for the report and the plot
CHECKS_SHARE = 0.45  # of the time: what is unchecked by then is said, and every timed cell has its own check
FIRST_CHECKED = ("sparse_ffn", "quant_matmul", "glu", "select_active")
MODEL_CASES = 3  # of an op's model-sized cases: every timed cell is checked at its own size besides
DRY_CASES = 3
DRY_TUNED = 3
TUNING_SHARE = 0.5  # of the time left after the checks: what is tuned is worth nothing unless it is timed
MAX_RESTARTS = 3
RESTARTED = "PINFER_BENCH_RESTARTED"  # "<start time>:<restarts so far>", set for the process that goes on


class DeviceLost(RuntimeError):
    """A kernel faulted and took the CUDA context along: only a new process can go on."""


def run(options: argparse.Namespace, started: float) -> int:
    """Measure, write results under the folder and print the verdict; 1 if a check failed, else 0."""
    cells = [cell for cell in planned(options.dry_run) if wanted(cell, options.only)]
    if not cells:
        print(f"error: --only {options.only!r} names no cell; --list shows them", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{cell.level:2} {cell.label}" for cell in cells))
        return 0
    device = torch.device("cpu" if options.dry_run else "cuda")
    restarts = 0
    if RESTARTED in os.environ:
        started, restarts = float(os.environ[RESTARTED].split(":")[0]), int(os.environ[RESTARTED].split(":")[1])
    about = environment(device)
    store = Store(options.output or default_folder(about, options.dry_run), about, options.again and not restarts)
    timer = Timer(device, options.memory)
    bench = Bench(store, timer, started, 60 * options.minutes, keep_failures=restarts > 0)
    interrupted = False
    try:
        bench.bandwidth()
        bench.checks(needed_by(cells) if options.only else None)
        if options.tune:
            tune(cells, bench)
        bench.cells(cells)
    except DeviceLost as lost:
        print(lost)
        if restarts < MAX_RESTARTS:
            restart(started, restarts + 1, store.folder)
    except KeyboardInterrupt:
        interrupted = True
    left_out = [cell for cell in cells if store.find("cell", cell.config) is None]
    text = write_report(store, left_out, bench.unchecked, time.time() - started, dry=options.dry_run)
    print(f"\n{text}\nWritten to {store.folder}")
    return 130 if interrupted else int(any(is_ours_and_red(record) for record in store.current()))


def is_ours_and_red(record: Record) -> bool:
    """Whether a kernel of this project gave a wrong result or none; a baseline that cannot run is no failure."""
    ours = record["kind"] != "cell" or record["config"]["provider"].startswith("pinfer")
    return ours and not record["passed"] and not record.get("skipped")


def needed_by(cells: list[Cell]) -> set[str]:
    return {op for cell in cells for op in candidates()[cell.candidate].needs}


def wanted(cell: Cell, only: str) -> bool:
    """Whether some part of `only` stands in the cell's label, not within a longer word: T1 is not T16."""
    parts = [re.escape(part.strip()) for part in only.split(",") if part.strip()]
    return not only or any(re.search(rf"(?<!\w){part}(?!\w)", cell.label, re.IGNORECASE) for part in parts)


def default_folder(about: dict[str, Any], dry: bool) -> Path:
    return Path(tempfile.mkdtemp(prefix="bench-gpu-")) if dry else ROOT / "bench" / "results" / slug(about["gpu"])


def restart(started: float, count: int, folder: Path) -> None:
    """Replace this process by one that goes on; what faulted is on record as failed and is not tried again."""
    os.environ[RESTARTED] = f"{started}:{count}"
    given = [argument for argument in sys.argv[1:] if argument != "--again"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *given, "-o", str(folder)])


def tune(cells: list[Cell], bench: Bench) -> None:
    """Search launch parameters of our kernels for these cells in their order, before anything is timed."""
    until = time.time() + TUNING_SHARE * bench.left_s()
    ours = [cell for cell in cells if candidates()[cell.candidate].provider.startswith("pinfer")]
    groups = {cell.launches: cell for cell in reversed(ours)}  # of each its first cell, the most important
    todo = [cell for cell in ours if groups[cell.launches] is cell][: DRY_TUNED if bench.timer.dry else None]
    for number, cell in enumerate(todo):
        if time.time() > until:
            print(f"no time to tune {len(todo) - number} of {len(todo)}, which keep their defaults", flush=True)
            break
        bench.tune(cell)


def spread(cases: Sequence[Any], count: int) -> list[Any]:
    """The first, the last and others evenly between them: types and batches come one after the other."""
    if len(cases) <= count:
        return list(cases)
    return [cases[number * (len(cases) - 1) // (count - 1)] for number in range(count)]


class Bench:
    """One run over a store; `keep_failures` leaves cells alone that have failed already.

    Launchers run at their defaults, but for cells that `tune` went before: a figure's record names the
    parameters it was measured with.
    """

    def __init__(self, store: Store, timer: Timer, started: float, seconds: float, keep_failures: bool) -> None:
        self.store, self.timer, self.keep_failures = store, timer, keep_failures
        self.deadline, self.checks_deadline = started + seconds, started + CHECKS_SHARE * seconds
        self.failed_ops: set[str] = set()
        self.unchecked = 0
        self.spent_s: dict[str, list[float]] = {}
        self.clocks: str | None = None
        self.tuned: dict[str, dict[str, Any]] = {}  # launch parameters by kernel and shape, by cells' `launches`

    def left_s(self) -> float:
        return self.deadline - time.time()

    def done(self, kind: str, config: dict[str, Any]) -> Record | None:
        record = self.store.find(kind, config)
        return record if record is not None and (record["passed"] or self.keep_failures) else None

    def measured(self, cell: Cell) -> bool:
        """Whether the cell is on record with the launch parameters that it would take now."""
        record = self.done("cell", cell.config)
        return record is not None and record.get("tuned") == self.tuned.get(cell.launches)

    def put(self, kind: str, config: dict[str, Any], values: dict[str, Any]) -> Record:
        record = self.store.put(kind, config, values)
        self.store.save()
        return record

    def bandwidth(self) -> None:
        if self.done("bandwidth", {"way": "read (triton)"}):
            return
        for way, values in measure_bandwidth(self.timer).items():
            self.put("bandwidth", {"way": way}, values)
            print(f"{way:14} {values['gb_per_s']:8.0f} GB/s", flush=True)

    @contextlib.contextmanager
    def launching_for(self, cell: Cell, tuned: bool | None = None) -> Iterator[None]:
        """Launch as tuned for this cell, or by default if it was not; `tuned` says which."""
        path = None
        if cell.launches in self.tuned if tuned is None else tuned:
            path = self.store.folder / "tuning.json" if self.timer.dry else tuning.cache_path()
        with tuning.use_cache(path, "interpreter" if self.timer.dry else None), tuning.expect_density(cell.density):
            yield

    def tune(self, cell: Cell) -> None:
        """Tune what this cell launches, unless that was done before, and print a line for each kernel."""
        candidate, config = candidates()[cell.candidate], {"launches": cell.launches}
        if self.failed_ops.intersection(candidate.needs) or (self.keep_failures and self._failed("tuning", config)):
            return
        try:
            with self.launching_for(cell, tuned=True):
                found = tuning.tune(
                    candidate.needs[0],
                    partial(self._rotating, cell, candidate),
                    run=candidate.run,
                    timer=lambda launches: self.timer.measure(launches, quick=self.timer.dry).p50_us,
                    prepare=compile_ahead,
                    at_most=DRY_VARIANTS if self.timer.dry else None,
                )
        except Exception as problem:
            self.put("tuning", config, {"passed": False, "reason": said(problem)})
            print(f"FAILED tuning {cell.launches}: {said(problem)}", flush=True)
            self._still_there()
            return
        if found:
            self.tuned[cell.launches] = {name: entry["launch"] for name, entry in found.items()}
            self.put("tuning", config, {"passed": True, "found": found})
        for name, entry in found.items():
            print(f"{self.left_s():4.0f} s left  tuned {name}: {tuning.said(entry)}", flush=True)

    def _failed(self, kind: str, config: dict[str, Any]) -> bool:
        record = self.store.find(kind, config)
        return record is not None and not record["passed"]

    def _rotating(self, cell: Cell, candidate: Candidate) -> list[dict[str, Any]]:
        """The cell's inputs, as often as it takes to leave the cache."""
        generator = generator_for(cell.label, self.timer.device)
        inputs = candidate.prepare(candidate.make_inputs(generator, **dict(cell.case)))
        copies = self.timer.copies(candidate.bytes_moved(**inputs), held_bytes(inputs))
        return [inputs, *(clone(inputs) for _ in range(copies - 1))]

    @tuning.use_cache(None)
    def checks(self, only: set[str] | None) -> None:
        """Every case of every op with a Triton implementation, as blocks and repacked; `only` those ops."""
        for op in sorted(ops.OPS, key=lambda op: (*FIRST_CHECKED, op.name).index(op.name)):
            if op.triton is None or (only is not None and op.name not in only):
                continue
            todo = [config for config in self._check_configs(op) if not self.done("check", config)]
            if time.time() > self.checks_deadline:
                self.unchecked += len(todo)
                continue
            began = time.time()
            compiled = compile_ahead(self._compile_job(op, config) for config in todo)
            for config in todo:
                self._check(op, config)
            red = [r for r in self.store.current("check") if r["config"]["op"] == op.name and not r["passed"]]
            self.failed_ops |= {op.name} if red else set()
            took = time.time() - began
            print(f"{op.name:20} {len(todo)} checks, {len(red)} failed, {compiled} kernels, {took:.1f} s", flush=True)

    def _check_configs(self, op: Op) -> Iterator[dict[str, Any]]:
        step = -(-len(op.bench_cases) // MODEL_CASES)
        small = spread(op.cases, DRY_CASES) if self.timer.dry else op.cases
        large = () if self.timer.dry else op.bench_cases[::step]
        for case in small:
            for layout in ("blocks", "planes") if "type" in case else ("planes",):
                yield {"op": op.name, "case": dict(case), "layout": layout}
        yield from ({"op": op.name, "case": dict(case), "layout": "planes"} for case in large)

    def _inputs(self, op: Op, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The reference's inputs, and the same laid out as the config says."""
        generator = generator_for(f"{op.name} {config['case']}", self.timer.device)
        original = op.make_inputs(generator, **config["case"])
        return original, repacked(original) if config["layout"] == "planes" else original

    def _compile_job(self, op: Op, config: dict[str, Any]) -> Callable[[], object]:
        return lambda: op.implementation("triton")(**self._inputs(op, config)[1])

    def _check(self, op: Op, config: dict[str, Any]) -> None:
        try:
            original, inputs = self._inputs(op, config)
            outcome = check(op.implementation("triton"), op.reference, inputs, original, op.tolerance)
        except Exception as problem:
            outcome = Outcome(None, op.tolerance, reason=said(problem))
        refused = config["layout"] == "blocks" and "planes" in (outcome.reason or "")
        self.put("check", config, outcome.record() | ({"passed": True, "skipped": True} if refused else {}))
        if not (outcome.passed or refused):  # a launcher may ask for repacked weights
            print(f"FAILED {op.name} {config['case']} {config['layout']}: {outcome.reason}", flush=True)
            self._still_there()

    def cells(self, cells: list[Cell]) -> None:
        """Measure in order what is not on record and what the time suffices for."""
        for _, level in groupby(cells, key=lambda cell: cell.level):
            todo = [cell for cell in level if not self.measured(cell)]
            for first in range(0, len(todo), CELLS_PREPARED):
                chunk = todo[first : first + CELLS_PREPARED]
                if self.left_s() > RESERVED_S + PREPARING_S:
                    self._prepare(chunk)
                for cell in chunk:
                    if self.left_s() > RESERVED_S + self._estimate_s(cell):
                        self._cell(cell)

    def _prepare(self, chunk: list[Cell]) -> None:
        """Compile what these cells need; only a tuned kernel changes with the density."""
        jobs: dict[str, Callable[[], object]] = {}
        for cell in chunk:
            candidate = candidates()[cell.candidate]
            if candidate.jit and not self.failed_ops.intersection(candidate.needs):
                kept = cell.launches if cell.launches in self.tuned else cell.kernels
                jobs.setdefault(kept, self._compile_cell(cell, candidate))
        self.clocks = clocks_now()
        compile_ahead(jobs.values())

    def _compile_cell(self, cell: Cell, candidate: Candidate) -> Callable[[], object]:
        @self.launching_for(cell)
        def job() -> None:
            made = candidate.make_inputs(generator_for(cell.label, self.timer.device), **dict(cell.case))
            inputs = candidate.prepare(made)
            for variant in candidate.variants:
                candidate.run(**inputs, **variant)

        return job

    def _estimate_s(self, cell: Cell) -> float:
        """The longest of this provider's last cells; a guess before the first."""
        provider = cell.candidate.split("/")[1]
        seen = self.spent_s.get(provider)
        return 1.2 * max(seen[-5:]) if seen else FIRST_GUESS_S.get(provider, 2.0)

    def _cell(self, cell: Cell) -> None:
        candidate, began = candidates()[cell.candidate], time.time()
        red = sorted(self.failed_ops.intersection(candidate.needs))
        try:
            if red:
                values = Outcome(None, candidate.tolerance, reason=f"a check of {', '.join(red)} failed").record()
                values["skipped"] = True
            else:
                with self.launching_for(cell):
                    values = measure_cell(candidate, dict(cell.case), cell.label, self.timer)
        except Exception as problem:
            values = Outcome(None, candidate.tolerance, reason=said(problem)).record()
        if cell.launches in self.tuned:
            values["tuned"] = self.tuned[cell.launches]
        spent = time.time() - began
        if not red:
            self.spent_s.setdefault(candidate.provider, []).append(spent)
        record = self.put("cell", cell.config, values | {"clocks": self.clocks, "wall_s": round(spent, 2)})
        print(f"{self.left_s():4.0f} s left  {cell.label:44} {summary(record)}", flush=True)
        if not record["passed"]:
            self._still_there()

    def _still_there(self) -> None:
        """DeviceLost if the CUDA context is gone; otherwise what the failure held is given back."""
        if self.timer.dry:
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.zeros(1, device=self.timer.device).add_(1).item()
        except RuntimeError as problem:
            raise DeviceLost(f"the GPU's context is lost: {said(problem)}") from problem
