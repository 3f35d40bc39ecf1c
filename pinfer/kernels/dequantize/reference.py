"""Weights of any layout as float32, in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.blocks import blocks_to_float
from pinfer.kernels.planes import planes_to_float
from pinfer.quant import QuantTensor


def dequantize(weight: QuantTensor) -> torch.Tensor:
    """Expand a QuantTensor `[rows, columns]` to float32 of that shape."""
    if weight.layout == "planes":
        return planes_to_float(weight)
    blocks = weight.blocks.reshape(-1, weight.type.block_bytes)
    return blocks_to_float(blocks, weight.type).reshape(weight.rows, weight.columns)
