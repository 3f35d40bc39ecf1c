"""Counts the inputs that a threshold keeps, on the device, in plain torch: an op, so that a recorded program counts too."""

from __future__ import annotations

import torch

from pinfer.kernels.input_sparse_matmul.reference import check_threshold
from pinfer.kernels.tally.reference import check_totals


def tally_kept(x: torch.Tensor, threshold: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """Add the inputs that `input_sparse_matmul` keeps to totals[0] and their tokens to totals[1], in place.

    x: float32 [T, inputs]; threshold: float32 [1], inputs above this magnitude and NaN count; totals: int64 [2].

    Returns totals.
    """
    check_inputs(x, threshold, totals)
    totals[0] += (~(x.abs() <= threshold)).sum()
    totals[1] += x.shape[0]
    return totals


def check_inputs(x: torch.Tensor, threshold: torch.Tensor, totals: torch.Tensor) -> None:
    """ValueError unless the shapes belong together; every implementation calls it."""
    if x.dim() != 2:
        raise ValueError(f"x is {list(x.shape)}, expected [T, inputs]")
    check_threshold(threshold)
    check_totals(totals)
