"""Time per launch: one CUDA graph of launches over rotating copies of the weights, replayed.

Copies are enough that what a round touches exceeds the L2 cache three times, so no launch finds
its weights there. A graph leaves Python and the driver out of the figure, as an engine's own graph
does. Without a device the same calls run once each and the times mean nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

L2_MULTIPLE = 3
MIN_LAUNCHES = 16  # in a graph: its own start-up of a few µs is shared by that many
MAX_COPIES = 256
MIN_REPLAYS, MAX_REPLAYS = 20, 100
WARM_SECONDS, TIMED_SECONDS = 0.02, 0.06
DRY_COPIES, DRY_REPLAYS = 2, 1


@dataclass(frozen=True)
class Times:
    """Microseconds a launch at three percentiles over replays."""

    p20_us: float
    p50_us: float
    p80_us: float
    replays: int

    @staticmethod
    def of(samples_us: Sequence[float]) -> Times:
        ordered = sorted(samples_us)
        last = len(ordered) - 1
        p20, p80 = (ordered[round(share * last)] for share in (0.2, 0.8))
        return Times(p20, statistics.median(ordered), p80, len(ordered))


class Timer:
    """Times launches on one device; `memory_share` of the free memory may hold copies."""

    def __init__(self, device: torch.device, memory_share: float) -> None:
        self.device = device
        self.memory_share = memory_share
        self.dry = device.type != "cuda"
        self.l2_bytes = 0 if self.dry else int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))

    def free_bytes(self) -> int:
        """Free memory, counting what torch holds without using it."""
        if self.dry:
            return 1 << 30
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def copies(self, touched: int, held: int) -> int:
        """How many copies of inputs of `held` bytes, of which a launch touches some; 0 if not even one fits."""
        if self.dry:
            return DRY_COPIES
        needed = math.ceil(L2_MULTIPLE * (self.l2_bytes or 64_000_000) / max(1, touched))
        return min(max(2, needed), MAX_COPIES, int(self.memory_share * self.free_bytes() / max(1, held)))

    def measure(self, launches: Sequence[Callable[[], object]], quick: bool = False) -> Times:
        """Percentiles of the mean time of a launch, cycling through the copies; `quick` compares variants."""
        if self.dry:
            return self._measure_dry(launches[:1] if quick else launches)
        rounds = math.ceil(MIN_LAUNCHES / len(launches))
        graph = capture([*launches] * rounds)
        first_s = self._replay(graph, 1)[0] * 1e-6
        once_s = min(first_s, self._replay(graph, 1)[0] * 1e-6)
        self._replay(graph, math.ceil((0.2 if quick else 1) * WARM_SECONDS / once_s))
        replays = 5 if quick else min(MAX_REPLAYS, max(MIN_REPLAYS, math.ceil(TIMED_SECONDS / once_s)))
        samples = self._replay(graph, replays)
        return Times.of([sample / (rounds * len(launches)) for sample in samples])

    def _replay(self, graph: torch.cuda.CUDAGraph, times: int) -> list[float]:
        """Microseconds of each replay, all queued at once so that the host is never waited for."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(times)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize(self.device)
        return [1e3 * start.elapsed_time(end) for start, end in pairs]

    def _measure_dry(self, launches: Sequence[Callable[[], object]]) -> Times:
        samples = []
        for _ in range(DRY_REPLAYS):
            began = time.perf_counter()
            for launch in launches:
                launch()
            samples.append(1e6 * (time.perf_counter() - began) / len(launches))
        return Times.of(samples)


def capture(launches: Sequence[Callable[[], object]], keep: list[object] | None = None) -> torch.cuda.CUDAGraph:
    """One graph of all launches, after a run of each outside it; `keep` collects what they return.

    Raises what a launch raises that cannot be captured, such as one that waits for the device.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for launch in dict.fromkeys(launches):
            launch()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            result = launch()
            if keep is not None:
                keep.append(result)
    return graph
