"""Counts what was computed, on the device, in plain torch: an op, so that a recorded program counts too."""

from __future__ import annotations

import torch

from pinfer.kernels.select_active.reference import Active


def tally(active: Active, totals: torch.Tensor, *, tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Add the (token, neuron) pairs of a prediction to totals[0] and its tokens to totals[1], in place.

    active: the listed neurons, for every token unless `mask` bool [T, N] says which of them; totals: int64 [2].

    Returns totals.
    """
    check_inputs(totals, tokens, mask)
    totals[0] += active.count[0] * tokens if mask is None else mask.sum()
    totals[1] += tokens
    return totals


def check_inputs(totals: torch.Tensor, tokens: int, mask: torch.Tensor | None) -> None:
    """ValueError unless the shapes belong together; every implementation calls it."""
    check_totals(totals)
    if mask is not None and (mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[0] != tokens):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}, expected torch.bool [{tokens}, N]")


def check_totals(totals: torch.Tensor) -> None:
    """ValueError unless totals are int64 [2], side by side."""
    if totals.dtype != torch.int64 or totals.shape != (2,) or not totals.is_contiguous():
        raise ValueError(f"totals are {totals.dtype} {list(totals.shape)}, expected contiguous torch.int64 [2]")
