"""Cold parts beside a CUDA device, in three stages that ask for more and more and cost less and less.

- eager: x is copied to the CPU, the hot kernels are launched, the caller computes meanwhile, and the result is copied
  back; about 30 to 50 µs a layer.
- graph: the decode step is one CUDA graph, in which a side stream copies x, runs a host function (the core's, no
  Python) and copies the result back, joined before the sum.
- flags: a kernel writes x and the cold list into host memory and raises a flag; a worker, which has the whole step as
  one job, spins for it, computes and raises its own, for which a kernel polls: 3 to 6 µs.

Nothing waits for a count on the host. While a step is not captured (a prompt, a first token), all stages are eager.
`DecodeStep` compares the first captured step with an eager one and asks for a step down where they differ, or fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Literal, cast, get_args

import torch

from pinfer.kernels.cpp import binding
from pinfer.kernels.cpp.binding import StepFailed
from pinfer.kernels.cpp.program import Program, noting
from pinfer.kernels.cpp.worker import Job, Place, Worker
from pinfer.overlap.capture import current
from pinfer.overlap.device import CUDADevice, Device
from pinfer.overlap.lane import Cold, Lane, Tensors, Traffic, WorkerLane
from pinfer.overlap.prefill import PrefillCosts
from pinfer.overlap.stream import Stream

Stage = Literal["eager", "graph", "flags"]
STAGES: tuple[Stage, ...] = get_args(Stage)
WAIT_S = 10.0  # of a worker for a flag: longer than a step, no longer than `collect` waits for it


class Staged(WorkerLane):
    """See `cuda`; `device` stands for the GPU."""

    def __init__(
        self,
        device: Device,
        places: Sequence[Place],
        stage: Stage,
        timeout_s: float,
        prefill: PrefillCosts | None = None,
    ) -> None:
        if stage not in STAGES:
            raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
        super().__init__(places, timeout_s, prefill)
        self.device, self.stage = device, stage
        self._streams = [Stream(timeout_s) for _ in places[1:]]

    @property
    def recordable(self) -> bool:
        return self.stage != "eager"

    def step_down(self) -> str | None:
        if self.stage == "eager":
            return None
        before, self.stage = self.stage, STAGES[STAGES.index(self.stage) - 1]
        return f"stage {self.stage} of the overlap instead of {before}"

    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        self.check_served(len(cold))
        if not self.device.capturing():
            return self._eager(hot, cold)
        return self._in_graph(hot, cold) if self.stage == "graph" else self._by_flags(hot, cold)

    def _eager(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold]) -> list[torch.Tensor]:
        results = [self.device.empty(part.x) for part in cold]
        with self.device.aside():
            given = [part.copied(self._to_host) for part in cold]
        hot_y = hot()  # launched, not waited for
        self.device.wait_aside()
        works = [partial(_computed, worker, part) for worker, part in zip(self.workers, given, strict=False)]
        with ExitStack() as running:
            others = [running.enter_context(s.running(w)) for s, w in zip(self._streams, works[1:], strict=False)]
            ys = [work() for work in works[:1]] + [one.result(self.timeout_s) for one in others]
        back = [self.device.host(y).copy_(y) for y in ys]
        with self.device.aside():
            for y, result in zip(back, results, strict=True):
                self.device.copy(y, result)
        self.device.join()
        return [hot_y, *results]

    def _in_graph(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold]) -> list[torch.Tensor]:
        results = [self.device.empty(part.x) for part in cold]
        with self.device.aside():
            ys, jobs = [], []
            for part, worker in zip(cold, self.workers, strict=False):
                program, y = Program(worker.place.threads), self.device.host(part.x)
                _note(program, part.copied(self._to_host), y)
                ys.append(y)
                jobs.append(Job(worker, program))
            for job, following in pairwise(jobs):
                job.struct.next = following.address
            if jobs:
                self.device.launch(jobs[0])
            for y, result in zip(ys, results, strict=True):
                self.device.copy(y, result)
        hot_y = hot()
        self.device.join()
        current().keep(*jobs)
        return [hot_y, *results]

    def _by_flags(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold]) -> list[torch.Tensor]:
        capture = current()
        if self not in capture.turns:
            capture.turns[self] = FlagTurn(self.device, self.workers)
        turn = cast(FlagTurn, capture.turns[self])
        boxes = [turn.add(part, program) for part, program in zip(cold, turn.programs, strict=False)]
        hot_y = hot()
        return [hot_y, *(turn.collect(*box) for box in boxes)]

    def brought(self, pieces: Iterable[Tensors]) -> Iterator[Tensors]:
        """Through pinned memory; a copy waits for the kernels of the piece before the last, whose memory it takes."""
        ahead = iter(pieces)
        coming = self._sent(next(ahead, None))
        while coming is not None:
            self.device.join()
            here, coming = coming, self._sent(next(ahead, None))
            yield here

    def _sent(self, piece: Tensors | None) -> Tensors | None:
        """Copies on their way to the device."""
        if piece is None:
            return None
        pinned = [self.device.host(one).copy_(one) for one in piece]
        targets = tuple(self.device.empty(one) for one in piece)
        with self.device.aside():
            for source, target in zip(pinned, targets, strict=True):
                self.device.copy(source, target)
        return targets

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the host, once the device gets there."""
        copy = self.device.host(tensor)
        self.device.copy(tensor, copy)
        return copy


class FlagTurn:
    """One step's worth of every worker as one job, which waits for the layers' flags in turn.

    `epoch` numbers the steps, on the host, where both sides read it.
    """

    def __init__(self, device: Device, workers: Sequence[Worker]) -> None:
        self._device, self._workers = device, workers
        self.epoch, self.failed = (device.host(torch.zeros(1, dtype=torch.int32)) for _ in range(2))
        self.programs = [Program(worker.place.threads) for worker in workers]
        self._jobs: list[Job] = []

    def add(self, part: Cold, program: Program) -> tuple[torch.Tensor, torch.Tensor]:
        """Publish what a part is given, and note it for its worker; the result's place on the host, and its flag."""
        go, back = (self._device.host(self.epoch) for _ in range(2))
        box, copied = self._mailbox(part)
        for source, target in copied:
            self._device.copy(source, target)
        self._device.publish(part.x, part.active, box.x, box.active, go, self.epoch)
        y = self._device.host(part.x)
        flags = [(flag.data_ptr(), self.epoch.data_ptr(), WAIT_S) for flag in (go, back)]
        program.append(binding.Await(*flags[0]), (go, self.epoch))
        _note(program, box, y)
        program.append(binding.Raise(*flags[1]), (back, self.epoch))
        return y, back

    def _mailbox(self, part: Cold) -> tuple[Cold, list[tuple[torch.Tensor, torch.Tensor]]]:
        """A part over host memory, and the copies that `publish` does not make."""
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []

        def host(tensor: torch.Tensor) -> torch.Tensor:
            pairs.append((tensor, self._device.host(tensor)))
            return pairs[-1][1]

        box = part.copied(host)
        return box, [pair for pair in pairs if any(pair[0] is one for one in part.others)]

    def collect(self, y: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        out = self._device.empty(y)
        self._device.collect(y, back, self.epoch, self.failed, out)
        return out

    def begin(self) -> None:
        if not self._jobs:
            self._jobs = [Job(*pair) for pair in zip(self._workers, self.programs, strict=True) if len(pair[1])]
        self.epoch += 1
        for job in self._jobs:
            job.submit()

    def end(self) -> None:
        for job in self._jobs:
            job.wait()
        if int(self.failed) == int(self.epoch):
            raise StepFailed("the device waited too long for the CPU's part of a layer")


def _computed(worker: Worker, part: Cold) -> torch.Tensor:
    with worker.computing():
        return part.compute()


def _note(program: Program, part: Cold, y: torch.Tensor) -> None:
    """Note a part's steps for a worker, the last of which brings the result to y.

    They run meanwhile, for nothing, as what the part is given is not there yet but zeros: that counts no neurons.
    """
    before = part.traffic.totals.clone()
    with noting(program):
        if part.active is not None:
            listed = part.active.indices, part.active.count
            binding.run(binding.CheckList(*map(binding.pointer, listed), listed[0].numel()), 1, listed)
        result = part.compute()
        binding.run(binding.Copy(result.data_ptr(), result.nbytes, y.data_ptr()), 1, result, y, part)
    part.traffic.totals.copy_(before)


def cuda(
    places: int | Sequence[Place] = 1,
    *,
    stage: Stage = "graph",
    device: torch.device | str = "cuda",
    timeout_s: float = 60.0,
    prefill: PrefillCosts | None = None,
) -> Lane:
    """A lane beside a CUDA device. places, timeout_s, prefill: as for `emulated`. OSError without CUDA's driver."""
    places = [Place(places)] if isinstance(places, int) else places
    return Staged(CUDADevice(torch.device(device)), places, stage, timeout_s, prefill)
