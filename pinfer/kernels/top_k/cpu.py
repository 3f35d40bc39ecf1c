"""top_k on the CPU core: one pass that looks closer only where something beats the k-th best so far."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import TopK, floats, pointer, run
from pinfer.kernels.top_k.reference import Best, check_inputs
from pinfer.kernels.top_k.reference import top_k as reference

LARGEST_K = 256  # insertion into a sorted list; a full sort is better beyond


def top_k(scores: torch.Tensor, k: int) -> Best:
    if k > LARGEST_K:
        return reference(scores, k)
    check_inputs(scores, k)
    scores = floats(scores)
    best = Best(torch.empty(k), torch.empty(k, dtype=torch.int64))
    run(TopK(pointer(scores), scores.numel(), k, pointer(best.values), pointer(best.indices)), 1, scores, best)
    return best
