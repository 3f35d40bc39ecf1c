"""select_active in Triton: one program scans the scores in blocks, so the order is fixed and no atomics are needed.

28,672 neurons (70B) are 14 steps of 2,048; the whole list is a few µs of latency, not bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, INTS, Build
from pinfer.kernels.select_active.reference import Active, check_inputs

BLOCK_N, NUM_WARPS = 2048, 4


@triton.jit
def _select_active_kernel(
    scores_ptr, threshold_ptr, threshold_stride, indices_ptr, count_ptr, tokens, neurons, BLOCK_N: tl.constexpr
):
    count = tl.zeros([], tl.int32)
    for first in range(0, neurons, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        inside = n < neurons
        threshold = tl.load(threshold_ptr + n * threshold_stride, mask=inside, other=0.0)
        active = tl.zeros([BLOCK_N], tl.int32)
        row_ptr = scores_ptr + n
        for _ in range(tokens):
            score = tl.load(row_ptr, mask=inside, other=0.0)
            active |= tl.where(score <= threshold, 0, 1)
            row_ptr += neurons
        active = tl.where(inside, active, 0)
        slot = count + tl.cumsum(active, axis=0) - active
        tl.store(indices_ptr + slot, n, mask=active > 0)
        count += tl.sum(active, axis=0)
    tl.store(count_ptr, count)


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    check_inputs(scores, threshold)
    tokens, neurons = scores.shape
    scores, threshold = scores.contiguous(), threshold.contiguous()
    active = Active(
        torch.empty(neurons, dtype=torch.int32, device=scores.device),
        torch.empty(1, dtype=torch.int32, device=scores.device),
    )
    if neurons == 0:
        active.count.zero_()
        return active
    _select_active_kernel[(1,)](
        scores, threshold, int(threshold.numel() > 1), active.indices, active.count, tokens, neurons,
        BLOCK_N=BLOCK_N, num_warps=NUM_WARPS,
    )  # fmt: skip
    return active


def builds() -> list[Build]:
    arguments = {"scores_ptr": FLOATS, "threshold_ptr": FLOATS, "threshold_stride": "i32", "indices_ptr": INTS}
    arguments |= {"count_ptr": INTS, "tokens": "i32", "neurons": "i32"}
    return [Build("select_active", _select_active_kernel, arguments, {"BLOCK_N": BLOCK_N}, NUM_WARPS)]
