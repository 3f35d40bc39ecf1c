"""Measures a GPU: what its memory delivers, what crosses PCIe, what a hand-over and a launch cost.

`measure_gpu` asks a `Device` for the times of single operations and takes the best or the median of them;
`CudaDevice` is the one that runs them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch

from pinfer.engine.rates import GpuRates

READ_BYTES = 1 << 31  # many times any L2 cache
COPY_BYTES = 1 << 28
HAND_OVER = 8192  # float32 values: x of a 70B model there, the cold part's result back
LAUNCHES = 200
ROUNDS = 9
FREE_SHARE = 4  # of the GPU's free memory, the buffer takes at most one part in so many


class Device(Protocol):
    """Single operations, each timed in seconds."""

    def read(self, size: int) -> float:
        """Read `size` bytes of its memory once."""

    def copy(self, size: int, to_gpu: bool) -> float:
        """Copy `size` bytes from (to_gpu) or to pinned memory."""

    def hand_over(self) -> float:
        """Results of the GPU to the host, waited for, and back."""

    def launches(self, count: int, graph: bool) -> float:
        """`count` kernels that do next to nothing, one after the other."""

    def free_bytes(self) -> int: ...


def measure_gpu(device: Device, tell: Callable[[str], None]) -> GpuRates:
    """The rates of a device; what is known on the way is told. RuntimeError of torch where it fails."""
    size = min(READ_BYTES, device.free_bytes() // FREE_SHARE) // 4 * 4
    read = size / min(device.read(size) for _ in range(ROUNDS))
    tell(f"GPU memory: {read / 1e9:.0f} GB/s")
    part = min(COPY_BYTES, size)
    to_gpu, to_cpu = (part / min(device.copy(part, way) for _ in range(ROUNDS)) for way in (True, False))
    tell(f"PCIe from pinned memory: {to_gpu / 1e9:.1f} GB/s to the GPU, {to_cpu / 1e9:.1f} GB/s back")
    sync = statistics.median(device.hand_over() for _ in range(ROUNDS * 20))
    eager, graph = (
        statistics.median(device.launches(LAUNCHES, way) for _ in range(ROUNDS)) / LAUNCHES for way in (False, True)
    )
    tell(f"hand-over {1e6 * sync:.1f} µs; a launch {1e6 * eager:.1f} µs, in a graph {1e6 * graph:.1f} µs")
    return GpuRates(read, to_gpu, to_cpu, sync, eager, graph)


class CudaDevice:
    """torch's current CUDA device."""

    def __init__(self) -> None:
        self._small = torch.zeros(HAND_OVER, device="cuda")
        self._host = torch.zeros(HAND_OVER, pin_memory=True)
        self._large = torch.zeros(0, device="cuda")
        self._pinned = torch.zeros(0, dtype=torch.uint8)
        self._graph: torch.cuda.CUDAGraph | None = None

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def read(self, size: int) -> float:
        """torch's sum of float32 values reads them once and writes next to nothing."""
        if self._large.numel() != size // 4:
            self._large = torch.ones(size // 4, device="cuda")
            self._large.sum()
        return self._timed(self._large.sum)

    def copy(self, size: int, to_gpu: bool) -> float:
        if self._pinned.numel() != size:
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        there = self._large.view(torch.uint8)[:size]
        source, target = (self._pinned, there) if to_gpu else (there, self._pinned)
        return self._timed(lambda: target.copy_(source, non_blocking=True))

    def hand_over(self) -> float:
        began = time.perf_counter()
        self._host.copy_(self._small, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        done.synchronize()
        self._small.copy_(self._host, non_blocking=True)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def launches(self, count: int, graph: bool) -> float:
        if not graph:
            return self._timed(lambda: self._launch(count))
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._launch(count)
        return self._timed(self._graph.replay)

    def _launch(self, count: int) -> None:
        for _ in range(count):
            self._small.add_(1.0)

    def _timed(self, run: Callable[[], object]) -> float:
        """Seconds between two events around a call on an idle device."""
        torch.cuda.synchronize()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        run()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3
