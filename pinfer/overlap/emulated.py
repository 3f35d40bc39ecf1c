"""A device that is not there: a CPU shard with threads, latencies and a bandwidth of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pinfer.overlap.lane import Cold, Lane, Traffic


@dataclass(frozen=True)
class Delays:
    """What the emulated device takes beside its computing; seconds and bytes/s.

    to_cpu_s, to_gpu_s: latency of a copy there and back. kernel_s: what the hot part costs at least.
    bandwidth: at which the device reads its weights, no faster than the CPU that stands for it; None unlimited.
    """

    to_cpu_s: float = 0.0
    to_gpu_s: float = 0.0
    kernel_s: float = 0.0
    bandwidth: float | None = None


def emulated(threads: int = 1, *, delays: Delays | None = None, timeout_s: float = 60.0) -> Lane:
    """A lane whose device is the calling thread's team; cold parts run on `threads` threads of their own."""
    return Emulated(threads, delays or Delays(), timeout_s)


class Emulated(Lane):
    def __init__(self, threads: int, delays: Delays, timeout_s: float) -> None:
        self.threads, self.delays, self.timeout_s = threads, delays, timeout_s

    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        return [hot(), *(part.work(*part.given) for part in cold)]

    def close(self) -> None:
        pass
