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

    scores: float32 [T, N]; threshold: float32 [1] or [N]. A NaN score is active, so that damaged
    weights show in the result as they do when everything is computed.
    """
    check_inputs(scores, threshold)
    chosen = passes(scores, threshold).any(dim=0).nonzero().flatten().to(torch.int32)
    indices = torch.full((scores.shape[1],), -1, dtype=torch.int32, device=scores.device)
    indices[: chosen.numel()] = chosen
    return Active(indices, torch.tensor([chosen.numel()], dtype=torch.int32, device=scores.device))


def passes(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """bool [T, N]: which token uses which neuron, by the rule of `select_active`."""
    return ~(scores <= threshold)


def check_inputs(scores: torch.Tensor, threshold: torch.Tensor) -> None:
    """ValueError for shapes that do not belong together; every implementation calls it."""
    if scores.dim() != 2 or threshold.dim() != 1 or threshold.numel() not in (1, scores.shape[1]):
        raise ValueError(
            f"scores {list(scores.shape)} and threshold {list(threshold.shape)}: expected [T, N], [1] or [N]"
        )
