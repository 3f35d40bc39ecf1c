"""y = x · Wᵀ over quantised rows, in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.dequantize.reference import dequantize
from pinfer.quant import QuantTensor


def quant_matmul(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """Multiply tokens by a quantised matrix.

    x: float [T, columns]; weight: QuantTensor [rows, columns]. Returns float32 [T, rows].
    """
    check_inputs(x, weight)
    return x.float() @ dequantize(weight).T


def check_inputs(x: torch.Tensor, weight: QuantTensor) -> None:
    """ValueError unless x is [T, columns of the weight]; every implementation calls it."""
    if x.dim() != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"x is {list(x.shape)}, expected [T, {weight.columns}] for {weight!r}")
