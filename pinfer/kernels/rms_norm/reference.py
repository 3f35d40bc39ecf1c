"""RMSNorm (Zhang & Sennrich 2019), in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """x / rms(x) · weight over the last dimension, plus `residual` where it is given.

    x: float32 [..., D]; weight: float32 [D]; residual: as x. Returns float32 as x.
    """
    check_inputs(x, weight, residual)
    normed = F.rms_norm(x, weight.shape, weight, eps)
    return normed if residual is None else residual + normed


def check_inputs(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None) -> None:
    """ValueError unless the shapes belong together; every implementation calls it."""
    if weight.dim() != 1 or x.shape[-1:] != weight.shape:
        raise ValueError(f"x is {list(x.shape)}, its last dimension must be the weight's {list(weight.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual is {list(residual.shape)}, expected x's {list(x.shape)}")
