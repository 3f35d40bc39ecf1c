"""A decode step on a GPU as one CUDA graph, with the workers' part of it. It awaits its first run on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch

from pinfer.kernels.cpp.worker import Job
from pinfer.overlap.lane import Lane


class Graph(Protocol):
    def replay(self) -> None: ...


class Turn(Protocol):
    """What a lane's workers do during one run of a graph."""

    def begin(self) -> None: ...
    def end(self) -> None: ...


class Capture:
    """What a step repeats: the graph, the memory and jobs that its nodes refer to, and the workers' turns."""

    def __init__(self, graph: Graph, wait: Callable[[], None]) -> None:
        self._graph, self._wait = graph, wait
        self._jobs: list[Job] = []
        self.turns: dict[Lane, Turn] = {}

    def keep(self, *jobs: Job) -> None:
        """Hold on to jobs that the graph refers to by address, and see after each run how they went."""
        self._jobs += jobs

    def run(self) -> None:
        """Repeat the step, and wait for its end. StepFailed where a part of it went wrong."""
        begun: list[Turn] = []
        try:
            for turn in self.turns.values():
                turn.begin()
                begun.append(turn)
            self._graph.replay()
        finally:
            self._wait()
            for turn in begun:
                turn.end()
        for job in self._jobs:
            job.check()


_capturing: ContextVar[Capture | None] = ContextVar("pinfer_capture", default=None)


def current() -> Capture:
    """The capture that this is part of."""
    capture = _capturing.get()
    if capture is None:
        raise RuntimeError("a lane is captured outside of a decode step")
    return capture


@contextmanager
def becoming(capture: Capture) -> Iterator[Capture]:
    """Have lanes add their parts to a capture."""
    token = _capturing.set(capture)
    try:
        yield capture
    finally:
        _capturing.reset(token)


@contextmanager
def captured(device: torch.device) -> Iterator[Capture]:
    """The kernels of the block, none of which runs yet, as one graph. They must have run before: Triton compiles then."""
    graph = torch.cuda.CUDAGraph()
    # Pinned memory may have to be made while capturing, which stricter modes forbid.
    with (
        becoming(Capture(graph, torch.cuda.current_stream(device).synchronize)) as capture,
        torch.cuda.graph(graph, capture_error_mode="relaxed"),
    ):
        yield capture
