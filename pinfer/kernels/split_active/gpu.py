"""split_active in Triton: a launch a part, whose programs each count what the list has before the part.

    slot(i) = i's place in the list - how many of the list are below the part's first neuron

The list is ascending, so a part is a run of it. Every program reads the whole list to find where that begins:
some kilobytes out of the L2 cache, where a binary search would wait for memory a dozen times in turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels import handover
from pinfer.kernels.aot import INTS, Build
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.split_active.reference import check_inputs, parts_of

BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _split_active_kernel(indices_ptr, count_ptr, out_ptr, out_count_ptr, first, end, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    count = tl.load(count_ptr)
    k = tl.arange(0, BLOCK)
    below = tl.zeros([BLOCK], tl.int32)
    within = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        n = tl.load(indices_ptr + start + k, mask=start + k < count, other=end)  # [BLOCK]
        below += tl.where(n < first, 1, 0)
        within += tl.where((n >= first) & (n < end), 1, 0)
    before, total = tl.sum(below, axis=0), tl.sum(within, axis=0)
    at = program * BLOCK + k
    n = tl.load(indices_ptr + before + at, mask=at < total, other=0)
    tl.store(out_ptr + at, n - first, mask=at < total)
    if program == 0:
        tl.store(out_count_ptr, total)


def split_active(indices: torch.Tensor, count: torch.Tensor, sizes: tuple[int, ...]) -> tuple[Active, ...]:
    check_inputs(indices, count, sizes)
    device = indices.device
    out = torch.empty(indices.numel(), dtype=torch.int32, device=device)
    parts = parts_of(out, torch.empty(len(sizes), dtype=torch.int32, device=device), sizes)
    first = 0
    for part, size in zip(parts, sizes, strict=True):
        _split_active_kernel[(max(1, triton.cdiv(size, BLOCK)),)](
            indices, count, part.indices, part.count, first, first + size,
            BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
        first += size
    return parts


def builds() -> list[Build]:
    pointers = dict.fromkeys(("indices_ptr", "count_ptr", "out_ptr", "out_count_ptr"), INTS)
    arguments = {**pointers, "first": "i32", "end": "i32"}
    split = Build("split_active", _split_active_kernel, arguments, {"BLOCK": BLOCK}, NUM_WARPS)
    return [split, *handover.builds()]
