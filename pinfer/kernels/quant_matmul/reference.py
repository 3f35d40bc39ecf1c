"""y = x · Wᵀ over quantised rows, in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.dequantize.reference import dequantize
from pinfer.quant import QuantTensor


def quant_matmul(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """Multiply tokens by a quantised matrix.

    x: float [T, columns]; weight: QuantTensor [rows, columns]. Returns float32 [T, rows].
    """
    return x.float() @ dequantize(weight).T
