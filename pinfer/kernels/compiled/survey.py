"""Compiles every build of some ops for some targets, in as many processes as there are cores."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context

from pinfer.kernels import ops
from pinfer.kernels.aot import Build
from pinfer.kernels.compiled.compile import TARGETS, Artifact, artifacts_of, builds_of, warps_on
from pinfer.kernels.compiled.figures import Figures, Row, figures_of
from pinfer.kernels.registry import Op

Progress = Callable[[int, int, str], None]


def survey(
    selected: Iterable[Op], targets: Iterable[str], workers: int = 0, progress: Progress | None = None
) -> list[Row]:
    """Rows of every build on every target, in the order of ops, their builds and TARGETS.

    workers: processes; 0 for the number of cores. progress: called with builds done, builds in all and
    the latest's name. A build that does not compile, or takes its process down, is a row with an error.
    """
    targets = [target for target in TARGETS if target in set(targets)]
    selected = list(selected)
    places = [(op, at) for op in selected for at in range(len(_builds(op.name)))]
    done: dict[tuple[str, int], list[Artifact | str]] = {}
    for op, at, result in _results(places, targets, workers or os.cpu_count() or 1):
        done[op.name, at] = result
        if progress:
            progress(len(done), len(places), f"{op.name}: {_builds(op.name)[at].label}")
    artifacts = [item for op, at in places for item in done[op.name, at] if isinstance(item, Artifact)]
    figures = iter(figures_of(artifacts))
    return [
        _row(op, _builds(op.name)[at], target, item if isinstance(item, str) else next(figures))
        for op, at in places
        for target, item in zip(targets, done[op.name, at], strict=True)
    ]


def _row(op: Op, build: Build, target: str, outcome: Figures | str) -> Row:
    row = (op.name, build.label, build.kernel.fn.__name__, target, warps_on(build, target), build.num_stages)
    promises = (build.wide_share, build.atomics)
    return Row(*row, *promises, error=outcome) if isinstance(outcome, str) else Row(*row, *promises, figures=outcome)


def _results(
    places: list[tuple[Op, int]], targets: list[str], workers: int
) -> Iterator[tuple[Op, int, list[Artifact | str]]]:
    """One process a worker rather than one a build: importing torch and Triton takes 1.5 s."""
    if workers == 1 or len(places) == 1:
        for op, at in places:
            yield op, at, _compile(op.name, at, targets)
        return
    # Spawned, since a process with threads of a BLAS library must not be forked.
    with ProcessPoolExecutor(min(workers, len(places)), mp_context=get_context("spawn")) as pool:
        futures: dict[Future[list[Artifact | str]], tuple[Op, int]] = {
            pool.submit(_compile, op.name, at, targets): (op, at) for op, at in places
        }
        for future in as_completed(futures):
            try:
                result = future.result()
            except Exception as error:  # once a compiler takes its process down, every build left gets this
                result = [_one_line(error)] * len(targets)
            yield *futures[future], result


def _compile(op_name: str, at: int, targets: list[str]) -> list[Artifact | str]:
    """Builds hold functions and cannot be sent to a process, so they go by op and place."""
    build = _builds(op_name)[at]
    with contextlib.redirect_stdout(sys.stderr):  # Triton prints the whole PTX where ptxas refuses it
        return [item if isinstance(item, Artifact) else _one_line(item[1]) for item in artifacts_of(build, targets)]


@cache
def _builds(op_name: str) -> list[Build]:
    return builds_of(getattr(ops, op_name))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
