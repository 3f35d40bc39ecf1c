"""Workers: threads of the core's own that run programs beside the thread that submits them (worker.h)."""

from __future__ import annotations

import atexit
import ctypes
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pinfer.kernels.cpp import binding
from pinfer.kernels.cpp.build import load_core
from pinfer.kernels.cpp.program import Program

SPIN_S = 2e-3  # longer than what lies between two layers' jobs
MOST_THREADS = 4096


@dataclass(frozen=True)
class Place:
    """How many threads a worker has, the processors they are pinned to (none: anywhere), and the node that their
    memory comes from (None: as the process has it)."""

    threads: int = 1
    cpus: tuple[int, ...] = ()
    node: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= MOST_THREADS:
            raise ValueError(f"a worker has 1 to {MOST_THREADS} threads, not {self.threads}")
        if self.cpus and len(self.cpus) != self.threads:
            raise ValueError(
                f"{self.threads} threads cannot be pinned to {len(self.cpus)} processors: name one for each"
            )


class Worker:
    """Threads that wait for jobs. They end with `stop`, with the last reference, or with the interpreter.

    place:     how many there are, and where.
    timeout_s: the longest wait for a job.

    `settled` is false where the system would not pin the threads or place their memory. RuntimeError where it has
    no more threads.
    """

    def __init__(self, place: Place, *, timeout_s: float = 60.0) -> None:
        if not timeout_s > 0:
            raise ValueError(f"the time to wait must be above 0 s, not {timeout_s}")
        self.place, self.timeout_s, core = place, timeout_s, load_core()
        cpus, node = (ctypes.c_int32 * len(place.cpus))(*place.cpus), -1 if place.node is None else place.node
        self.address = core.pinfer_worker_new(place.threads, cpus, len(cpus), node, round(1e6 * SPIN_S), timeout_s)
        if not self.address:
            raise RuntimeError(f"the system has no room for {place.threads} more threads")
        self.settled = core.pinfer_worker_settled(self.address) == place.threads
        weakref.finalize(self, core.pinfer_worker_free, self.address).atexit = False  # others may be used even later
        _workers.add(self)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in fresh pages that these threads touch first, which so come from their node."""
        tensor = tensor.contiguous()
        if not tensor.numel():
            return tensor
        pages = torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=torch.uint8)  # memory given back may lie elsewhere
        with self.computing():
            binding.run(binding.Copy(tensor.data_ptr(), tensor.nbytes, pages.data_ptr()), 1, tensor, pages)
        return pages.view(tensor.dtype).view(tensor.shape)

    def stop(self) -> None:
        """End the threads; jobs submitted later fail."""
        load_core().pinfer_worker_stop(self.address)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Run the ops of the block on this worker's threads, and wait for each."""
        core = load_core()

        def runner(steps: Any, kept: tuple[object, ...]) -> None:
            job = binding.Job(self.address, ctypes.addressof(steps), len(steps))
            try:
                binding.check(core.pinfer_submit(ctypes.byref(job)))
            finally:  # also where the user interrupts
                _retire(self, job, steps, kept)
            binding.check(job.refused or job.status)

        with binding.running_on(runner):
            yield


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
_abandoned: list[tuple[object, ...]] = []  # what a job that never ended may still use


@atexit.register
def _stop_all() -> None:
    for worker in _workers:
        worker.stop()


def _retire(worker: Worker, job: binding.Job, *owners: object) -> None:
    """Wait until the worker is done with a job whose memory others own."""
    if (status := load_core().pinfer_wait(ctypes.byref(job))) == binding.TIMED_OUT:
        _abandoned.append((worker, job, owners))
        job.refused = status


class Job:
    """A program for a worker, run as often as it is submitted; its memory stays until the worker is done with it."""

    def __init__(self, worker: Worker, program: Program) -> None:
        self.worker, self.program = worker, program
        self.struct = binding.Job(worker.address, ctypes.addressof(program.steps), len(program))
        self.address = ctypes.addressof(self.struct)
        weakref.finalize(self, _retire, worker, self.struct, program)

    def submit(self) -> None:
        """Start it. StepFailed if the worker is stopped, or busy for longer than its time."""
        binding.check(load_core().pinfer_submit(self.address))

    def wait(self) -> None:
        """Wait for the end of what was submitted last. StepFailed if it failed, or takes longer than the worker's time."""
        binding.check(load_core().pinfer_wait(self.address))

    def check(self) -> None:
        """StepFailed if the last run by `pinfer_run_job`, which nobody waits for here, went wrong."""
        binding.check(self.struct.refused)
