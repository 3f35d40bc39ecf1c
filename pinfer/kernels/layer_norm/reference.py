"""LayerNorm (Ba et al. 2016), in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pinfer.kernels.rms_norm.reference import check_inputs as check_norm


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension, plus `residual` where it is given.

    x: float32 [..., D]; weight: float32 [D]; bias: float32 [D] or None; residual: as x. Returns float32 as x.
    """
    check_inputs(x, weight, bias, residual)
    normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    return normed if residual is None else residual + normed


def check_inputs(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> None:
    """ValueError unless the shapes belong together; every implementation calls it."""
    check_norm(x, weight, residual)
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(f"bias is {list(bias.shape)}, expected the weight's {list(weight.shape)}")
