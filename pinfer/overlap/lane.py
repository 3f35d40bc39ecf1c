"""What runs the cold parts of a layer on the CPU while the device computes its hot one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from pinfer.kernels.cpp.worker import Place, Worker
from pinfer.kernels.select_active import Active
from pinfer.overlap.prefill import PrefillCosts

Given = tuple[torch.Tensor | None, ...]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Traffic:
    """What a shard reads for one token: `fixed_bytes` in any case, `bytes_per_active` for each neuron it computes, of
    which `totals` int64 [2] counts all there have been (see `Activity`)."""

    fixed_bytes: int
    bytes_per_active: int
    totals: torch.Tensor


@dataclass(frozen=True)
class Cold:
    """A cold part, float32 [T, D]: `work(x, active, *others)` with copies on the CPU of what is given here.

    x:      float32 [T, D].
    active: the neurons that the device names for this part, or None where it predicts for itself.
    """

    work: Callable[..., torch.Tensor]
    x: torch.Tensor
    active: Active | None
    others: Given
    traffic: Traffic

    def compute(self) -> torch.Tensor:
        """The part where what is given is on the CPU already."""
        return self.work(self.x, self.active, *self.others)

    def copied(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> Cold:
        """The same with copies of what is given."""
        active = self.active and Active(copy(self.active.indices), copy(self.active.count))
        others = tuple(None if one is None else copy(one) for one in self.others)
        return replace(self, x=copy(self.x), active=active, others=others)


class Lane(ABC):
    """Runs `hot` on the device and every cold part on the CPU, beside each other where it can.

    A lane outlives a model and may serve several. `close` ends its threads; so does forgetting it.

    prefill: when batches are computed on the device instead, with weights brought there; None: never.
    """

    prefill: PrefillCosts | None = None

    @abstractmethod
    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        """The results on the device, float32 [T, D] each, hot first; `traffic` is the hot part's.

        An exception of a part is raised when none of them runs any more. RuntimeError where a part fails or does
        not end within the lane's time; ValueError for more cold parts than the lane serves.
        """

    @property
    def n_cold(self) -> int:
        """How many cold shards it computes beside each other: one for each NUMA node."""
        return 1

    def place(self, shard: int, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as cold shard number `shard` is to hold it: itself, or a copy in memory beside its threads."""
        return tensor

    def brought(self, pieces: Iterable[Tensors]) -> Iterator[Tensors]:
        """Copies on the device of tensors on the CPU, piece by piece, the next under way while one is used."""
        yield from pieces

    @property
    def recordable(self) -> bool:
        """Whether a decode step over it can be repeated as a whole."""
        return True

    def step_down(self) -> str | None:
        """Go on in a way that asks less of the system, after a failure; what is done instead, or None if nothing can be."""
        return None

    @abstractmethod
    def close(self) -> None:
        """End what the lane started; it cannot run afterwards."""


class WorkerLane(Lane):
    """A lane whose cold parts are computed by workers of the core, one each."""

    def __init__(self, places: Sequence[Place], timeout_s: float, prefill: PrefillCosts | None) -> None:
        self.timeout_s, self.prefill = timeout_s, prefill
        self.workers = [Worker(place, timeout_s=timeout_s) for place in places]

    @property
    def n_cold(self) -> int:
        return len(self.workers)

    def place(self, shard: int, tensor: torch.Tensor) -> torch.Tensor:
        self.check_served(shard + 1)
        worker = self.workers[shard]
        return tensor if worker.place.node is None else worker.copy_of(tensor)

    def check_served(self, n_cold: int) -> None:
        """ValueError for more cold shards than there are workers."""
        if n_cold > len(self.workers):
            raise ValueError(f"{n_cold} cold shards need a worker each; this lane has {len(self.workers)}")

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()
