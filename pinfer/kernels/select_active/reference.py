"""Compaction: which neurons pass their threshold, as an ascending list with its count on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True, eq=False)
class Active:
    """The neurons to compute.

    indices: int32 [N]; the first `count` are ascending neuron numbers, the rest is unspecified.
    count:   int32 [1], on the same device, so that nothing has to wait for it.
    """

    indices: torch.Tensor
    count: torch.Tensor


class Selection(NamedTuple):
    """What an op that predicts as well as compacts returns.

    active: union over the tokens.
    mask:   bool [T, N], which of them each token uses; None for one token.
    """

    active: Active
    mask: torch.Tensor | None


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    """List the neurons whose score exceeds the threshold for at least one token.

    scores: float32 [T, N]; threshold: float32 [1] or [N]. A NaN score is active, so that damaged
    weights show in the result as they do when everything is computed.
    """
    check_inputs(scores, threshold)
    return listed(passes(scores, threshold).any(dim=0))


def listed(flags: torch.Tensor) -> Active:
    """The Active of per-neuron flags (any dtype, [N], nonzero = active), in plain torch; waits for the count."""
    chosen = flags.nonzero().flatten().to(torch.int32)
    indices = torch.full((flags.numel(),), -1, dtype=torch.int32, device=flags.device)
    indices[: chosen.numel()] = chosen
    return Active(indices, torch.tensor([chosen.numel()], dtype=torch.int32, device=flags.device))


def passes(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """bool [T, N]: which token uses which neuron, by the rule of `select_active`."""
    return ~(scores <= threshold)


def check_inputs(scores: torch.Tensor, threshold: torch.Tensor) -> None:
    """ValueError for shapes that do not belong together; every implementation calls it."""
    if scores.dim() != 2 or threshold.dim() != 1 or threshold.numel() not in (1, scores.shape[1]):
        raise ValueError(
            f"scores {list(scores.shape)} and threshold {list(threshold.shape)}: expected [T, N], [1] or [N]"
        )


def check_flags(flags: torch.Tensor, tile_counts: torch.Tensor, tile: int) -> None:
    """ValueError unless the flags are uint8 [N], and the counts int32, one for each `tile` neurons."""
    if flags.dtype != torch.uint8 or flags.dim() != 1 or not flags.is_contiguous():
        raise ValueError(f"flags are {flags.dtype} {list(flags.shape)}, expected contiguous torch.uint8 [N]")
    if tile < 1 or tile & (tile - 1):
        raise ValueError(f"a tile of {tile} neurons, expected a power of two")
    tiles = -(-flags.numel() // tile)
    if tile_counts.dtype != torch.int32 or tile_counts.shape != (tiles,) or not tile_counts.is_contiguous():
        raise ValueError(
            f"tile counts are {tile_counts.dtype} {list(tile_counts.shape)}, "
            f"expected contiguous torch.int32 [{tiles}] for {flags.numel()} neurons in tiles of {tile}"
        )
