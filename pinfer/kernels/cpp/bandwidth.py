"""How fast this machine reads memory: the limit that every matvec's speed is measured against."""

from __future__ import annotations

import time

import torch

from pinfer.kernels.cpp.build import load_core

PASSES = 3


def read_bandwidth(threads: int, size_bytes: int = 1 << 30) -> float:
    """Bytes/s read by `threads` threads over a buffer of `size_bytes`, larger than any cache; the best of some passes.

    BackendUnavailable without the C++ core.
    """
    core = load_core()
    memory = torch.ones(size_bytes, dtype=torch.uint8)
    best = float("inf")
    for _ in range(PASSES):
        began = time.perf_counter()
        core.pinfer_read(memory.data_ptr(), size_bytes, threads)
        best = min(best, time.perf_counter() - began)
    return size_bytes / best
