"""Compaction: which neurons pass their threshold, as an ascending list with its count on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Active:
    """The neurons to compute.

    indices: int32 [N]; the first `count` are ascending neuron numbers, the rest is unspecified.
    count:   int32 [1], on the same device, so that nothing has to wait for it.
    """

    indices: torch.Tensor
    count: torch.Tensor


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    """List the neurons whose score exceeds the threshold for at least one token.

    scores: float32 [T, N]; threshold: float32 [1] or [N]. A NaN score is not active.
    """
    chosen = (scores > threshold).any(dim=0).nonzero().flatten().to(torch.int32)
    indices = torch.full((scores.shape[1],), -1, dtype=torch.int32, device=scores.device)
    indices[: chosen.numel()] = chosen
    return Active(indices, torch.tensor([chosen.numel()], dtype=torch.int32, device=scores.device))
