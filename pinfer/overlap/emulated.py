"""A device that is not there: the calling thread's team stands for it, with latencies and a bandwidth of its choice.

The cold parts run on workers of the C++ core. While a decode step is recorded, each becomes a program of its own,
which the step forks and joins: the analogue of one CUDA graph with host nodes, without Python between the layers.
Otherwise the device's part is a task on a stream, a thread that runs what it is given in order, and the caller
computes the cold part meanwhile: the analogue of eager kernels with events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields

import torch

from pinfer.kernels.cpp import binding
from pinfer.kernels.cpp.program import Program, noting, recording
from pinfer.kernels.cpp.worker import Job, Place, Worker
from pinfer.overlap.lane import Cold, Lane, Tensors, Traffic, WorkerLane
from pinfer.overlap.prefill import PrefillCosts
from pinfer.overlap.stream import Stream


@dataclass(frozen=True)
class Delays:
    """What the emulated parts take beside their computing; seconds and bytes/s.

    to_cpu_s, to_gpu_s: latency of a copy to the CPU and back. kernel_s: overhead of the hot part's kernels.
    bandwidth, cpu_bandwidth: at which the device and the CPU read their weights; None as fast as this machine does,
    which is the most there is. to_gpu_bandwidth: of copies of weights, for a prompt; None: they take no time.
    """

    to_cpu_s: float = 0.0
    to_gpu_s: float = 0.0
    kernel_s: float = 0.0
    bandwidth: float | None = None
    cpu_bandwidth: float | None = None
    to_gpu_bandwidth: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not (value > 0 or (value == 0 and field.name.endswith("_s"))):
                raise ValueError(f"{field.name} must be above 0, not {value}")


class Emulated(WorkerLane):
    """See `emulated`. `workers` serve the cold parts, one each."""

    def __init__(
        self, places: Sequence[Place], delays: Delays, timeout_s: float, prefill: PrefillCosts | None = None
    ) -> None:
        super().__init__(places, timeout_s, prefill)
        self.delays = delays
        self._streams = [Stream(timeout_s) for _ in places]  # of the device, and of every cold part but the first

    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        self.check_served(len(cold))
        return self._eager(hot, cold, traffic) if recording() is None else self._recorded(hot, cold, traffic)

    def _eager(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        works = [
            lambda part=part, worker=worker: self._computed(part, worker)
            for part, worker in zip(cold, self.workers, strict=False)
        ]
        tasks = [lambda: self.on_device(hot, traffic), *works[1:]]
        with ExitStack() as running:
            started = [
                running.enter_context(stream.running(task)) for stream, task in zip(self._streams, tasks, strict=False)
            ]
            first = [work() for work in works[:1]]
            hot_y, *others = [one.result(self.timeout_s) for one in started]
        return [hot_y, *first, *others]

    def _computed(self, part: Cold, worker: Worker) -> torch.Tensor:
        with worker.computing():
            return self.on_cpu(part)

    def _recorded(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        jobs, results = [], []
        for part, worker in zip(cold, self.workers, strict=False):
            with noting(Program(worker.place.threads)) as program, worker.computing():
                results.append(self.on_cpu(part))
            jobs.append(Job(worker, program))
        step = recording()
        assert step is not None
        for job in jobs:
            step.append(binding.Fork(job.address), (job,))
        hot_y = self.on_device(hot, traffic)
        for job in jobs:
            step.append(binding.Join(job.address), (job,))
        return [hot_y, *results]

    def on_device(self, hot: Callable[[], torch.Tensor], traffic: Traffic) -> torch.Tensor:
        """The hot part alone, with its delays."""
        return _paced(hot, self.delays.kernel_s, traffic, self.delays.bandwidth)

    def on_cpu(self, part: Cold) -> torch.Tensor:
        """A cold part alone, with its delays, on the threads that compute here."""
        _pause(self.delays.to_cpu_s)
        y = _paced(part.compute, 0.0, part.traffic, self.delays.cpu_bandwidth)
        _pause(self.delays.to_gpu_s)
        return y

    def brought(self, pieces: Iterable[Tensors]) -> Iterator[Tensors]:
        for piece in pieces:
            if self.delays.to_gpu_bandwidth:
                _pause(sum(one.nbytes for one in piece) / self.delays.to_gpu_bandwidth)
            yield piece


def _paced(work: Callable[[], torch.Tensor], seconds: float, traffic: Traffic, bandwidth: float | None) -> torch.Tensor:
    """The work, which takes at least `seconds` and the time to read its traffic at a bandwidth."""
    if not seconds and bandwidth is None:
        return work()
    inverse = 1 / bandwidth if bandwidth else 0.0
    clock = _Clock(traffic.totals, seconds + traffic.fixed_bytes * inverse, traffic.bytes_per_active * inverse)
    clock.run(binding.Mark)
    y = work()
    clock.run(binding.Pace)
    return y


def _pause(seconds: float) -> None:
    if seconds:
        clock = _Clock(None, seconds, 0.0)
        clock.run(binding.Mark)
        clock.run(binding.Pace)


class _Clock:
    """The pair of steps that make what is between them last."""

    def __init__(self, totals: torch.Tensor | None, seconds: float, seconds_per_active: float) -> None:
        self._mark, self._totals = torch.empty(2, dtype=torch.int64), totals
        self._fields = binding.pointer(self._mark), binding.pointer(totals), seconds, seconds_per_active

    def run(self, step: type[binding.Mark] | type[binding.Pace]) -> None:
        binding.run(step(*self._fields), 1, self._mark, self._totals)


def emulated(
    places: int | Sequence[Place] = 1,
    *,
    delays: Delays | None = None,
    timeout_s: float = 60.0,
    prefill: PrefillCosts | None = None,
) -> Lane:
    """A lane whose device is the calling thread's team of torch's number of threads.

    places: a worker for each cold shard, or a number: one, of so many threads. timeout_s: the longest wait for a
    part. prefill: see `Lane`. CoreError without the C++ core.
    """
    return Emulated([Place(places)] if isinstance(places, int) else places, delays or Delays(), timeout_s, prefill)
