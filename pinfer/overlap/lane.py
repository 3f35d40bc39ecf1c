"""What runs the cold parts of a layer on the CPU while the device computes its hot one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Given = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Traffic:
    """What a shard reads for one token: `fixed_bytes` in any case, `bytes_per_active` for each neuron it computes, of
    which `totals` int64 [2] counts all there have been (see `Activity`)."""

    fixed_bytes: int
    bytes_per_active: int
    totals: torch.Tensor


@dataclass(frozen=True)
class Cold:
    """A cold part: `work(*given)` with `given` copied to the CPU. Its result, float32 [T, D], goes back to the device."""

    work: Callable[..., torch.Tensor]
    given: Given
    traffic: Traffic


class Lane(ABC):
    """Runs `hot` on the device and every cold part on the CPU, beside each other where it can.

    A lane outlives a model and may serve several. `close` ends its threads; so does forgetting it.
    """

    @abstractmethod
    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        """The results on the device, float32 [T, D] each, hot first; `traffic` is the hot part's.

        An exception of a part is raised when none of them runs any more. RuntimeError where a part fails or does
        not end within the lane's time; ValueError for more cold parts than the lane serves.
        """

    @abstractmethod
    def close(self) -> None:
        """End what the lane started; it cannot run afterwards."""
