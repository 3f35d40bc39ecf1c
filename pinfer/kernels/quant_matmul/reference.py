"""y = x · Wᵀ over quantised rows, in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.rounding import rounded_for
from pinfer.quant import QuantTensor


def quant_matmul(
    x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None, *, int8: bool = False
) -> torch.Tensor:
    """Multiply tokens by a quantised matrix.

    x: float [T, columns]; weight: QuantTensor [rows, columns]; bias: float32 [rows] or None, added to each
    token's product. With `int8`, x is first rounded in blocks (see `rounding`) unless the weights are
    floats. Returns float32 [T, rows].
    """
    check_inputs(x, weight, bias)
    x = rounded_for(x.float(), weight) if int8 else x.float()
    product = x @ dequantize(weight).T
    return product if bias is None else product + bias


def check_inputs(x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None) -> None:
    """ValueError unless x is [T, columns of the weight] and a bias has its rows; every implementation calls it."""
    if x.dim() != 2 or x.shape[1] != weight.columns:
        raise ValueError(f"x is {list(x.shape)}, expected [T, {weight.columns}] for {weight!r}")
    check_per_row("bias", bias, weight.rows)


def check_per_row(name: str, values: torch.Tensor | None, rows: int) -> None:
    """ValueError unless what is given has a float32 for each row."""
    if values is not None and (values.shape != (rows,) or values.dtype != torch.float32):
        raise ValueError(f"{name} is {values.dtype} {list(values.shape)}, expected torch.float32 [{rows}]")
