"""A thread that runs tasks in the order it is given them, as a stream of a device does."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from queue import SimpleQueue
from threading import Event, Thread

import torch

from pinfer.kernels.cpp.binding import StepFailed

SLICE_S = 0.1


class Task:
    """Some work, to be done in the context of whoever made this: its backend, precision and number of threads."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self._work, self._context = work, copy_context()
        self._inference, self._threads = torch.is_inference_mode_enabled(), torch.get_num_threads()
        self._ended, self._outcome = Event(), None  # type: tuple[Event, torch.Tensor | BaseException | None]

    def run(self) -> None:
        try:
            with torch.inference_mode(self._inference):
                if torch.get_num_threads() != self._threads:  # OpenMP has a number for each thread
                    torch.set_num_threads(self._threads)
                self._outcome = self._context.run(self._work)
        except BaseException as problem:  # whatever it is, it is raised where the result is asked for
            self._outcome = problem
        finally:
            self._ended.set()

    def wait(self, timeout_s: float) -> None:
        # In slices: the time that the whole process is stopped (Ctrl-Z) counts as one of them.
        if not any(self._ended.wait(SLICE_S) for _ in range(math.ceil(timeout_s / SLICE_S))):
            raise StepFailed(f"a part of a layer did not end within {timeout_s:g} s")

    def result(self, timeout_s: float) -> torch.Tensor:
        """What the work gave, or raised."""
        self.wait(timeout_s)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class Stream:
    """Its thread ends with the last reference, and never keeps the interpreter from ending."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s, self._process = timeout_s, os.getpid()
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        Thread(target=_serve, args=(self._tasks,), daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    @contextmanager
    def running(self, work: Callable[[], torch.Tensor]) -> Iterator[Task]:
        """Start the work; it has ended when the block is left, however that is. StepFailed where that takes too long."""
        if os.getpid() != self._process:
            raise StepFailed("the lane belongs to the process that this one was forked from")
        task = Task(work)
        try:
            self._tasks.put(task)
            yield task
        finally:
            task.wait(self.timeout_s)


def _serve(tasks: SimpleQueue[Task | None]) -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # and with it what the work refers to
