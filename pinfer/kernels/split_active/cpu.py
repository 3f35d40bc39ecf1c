"""split_active on the CPU core: two binary searches a part."""

from __future__ import annotations

import ctypes
from itertools import accumulate

import torch

from pinfer.kernels.cpp.binding import SplitActive, contiguous, pointer, run
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.split_active.reference import check_inputs, parts_of


def split_active(indices: torch.Tensor, count: torch.Tensor, sizes: tuple[int, ...]) -> tuple[Active, ...]:
    check_inputs(indices, count, sizes)
    given = contiguous(indices)
    bounds = (ctypes.c_int64 * (len(sizes) + 1))(0, *accumulate(sizes))
    out, counts = torch.empty(given.numel(), dtype=torch.int32), torch.empty(len(sizes), dtype=torch.int32)
    arguments = SplitActive(
        pointer(given), pointer(count), len(sizes), ctypes.addressof(bounds), pointer(out), pointer(counts)
    )
    run(arguments, 1, given, count, bounds, out, counts)
    return parts_of(out, counts, sizes)
