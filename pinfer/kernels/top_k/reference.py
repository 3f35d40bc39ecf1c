"""The best k of a row of scores, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Best(NamedTuple):
    """values float32 [k] from the best down, ties in the order of their indices; indices int64 [k]."""

    values: torch.Tensor
    indices: torch.Tensor


def top_k(scores: torch.Tensor, k: int) -> Best:
    """scores: float32 [V]; 1 <= k <= V. Where any score is not finite, all values are NaN."""
    check_inputs(scores, k)
    best = scores.float().sort(descending=True, stable=True)
    # Chosen on the device: nothing waits for the scores.
    values = torch.where(scores.isfinite().all(), best.values[:k], torch.nan)
    return Best(values, best.indices[:k].clone())


def check_inputs(scores: torch.Tensor, k: int) -> None:
    """ValueError unless 1 <= k <= V; every implementation calls it."""
    if scores.dim() != 1 or not 1 <= k <= scores.numel():
        raise ValueError(f"k must lie in [1, V], not {k} for scores {list(scores.shape)}: expected [V]")
