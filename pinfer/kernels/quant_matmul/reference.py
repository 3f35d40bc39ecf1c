"""y = x · Wᵀ over quantised rows, in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.rounding import rounded_for
from pinfer.quant import QuantTensor


def quant_matmul(x: torch.Tensor, weight: QuantTensor, *, int8: bool = False) -> torch.Tensor:
    """Multiply tokens by a quantised matrix.

    x: float [T, columns]; weight: QuantTensor [rows, columns]. With `int8`, x is first rounded in
    blocks (see `rounding`) unless the weights are floats. Returns float32 [T, rows].
    """
    check_inputs(x, weight)
    x = rounded_for(x.float(), weight) if int8 else x.float()
    return x @ dequantize(weight).T


def check_inputs(x: torch.Tensor, weight: QuantTensor) -> None:
    """ValueError unless x is [T, columns of the weight]; every implementation calls it."""
    if x.dim() != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"x is {list(x.shape)}, expected [T, {weight.columns}] for {weight!r}")
