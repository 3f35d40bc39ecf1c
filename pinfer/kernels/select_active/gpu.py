"""select_active in Triton: one program scans the scores in blocks, so the order is fixed and no atomics are needed.

28,672 neurons (70B) are 14 steps of 2,048; the whole list is a few µs of latency, not bandwidth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.select_active.reference import Active


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
        for t in range(tokens):
            score = tl.load(scores_ptr + t * neurons + n, mask=inside, other=0.0)
            active |= (score > threshold).to(tl.int32)
        active = tl.where(inside, active, 0)
        slot = count + tl.cumsum(active, axis=0) - active
        tl.store(indices_ptr + slot, n, mask=active > 0)
        count += tl.sum(active, axis=0)
    tl.store(count_ptr, count)


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    tokens, neurons = scores.shape
    if threshold.numel() not in (1, neurons):
        raise ValueError(f"threshold has {threshold.numel()} entries, expected 1 or {neurons}")
    scores, threshold = scores.contiguous(), threshold.contiguous()
    active = Active(
        torch.empty(neurons, dtype=torch.int32, device=scores.device),
        torch.empty(1, dtype=torch.int32, device=scores.device),
    )
    block_n = min(2048, triton.next_power_of_2(neurons))
    _select_active_kernel[(1,)](
        scores, threshold, int(threshold.numel() > 1), active.indices, active.count, tokens, neurons, BLOCK_N=block_n
    )
    return active
