"""Activations rounded to int8 in blocks, as llama.cpp rounds them before a quantised matrix product.

Blocks of 32 weights meet blocks of 32 activations, K-quants blocks of 256. The int8 products are
exact integers, so the rounding here is the whole difference from float32.
"""

from __future__ import annotations

import torch

from pinfer.quant import QuantTensor


def rounded_for(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    """x float32 [T, columns] as a product with `weight` sees it under int8; unquantised weights leave it alone."""
    block = weight.type.block_size
    return x if block == 1 else round_activations(x, block)


def round_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """Each block of x float32 [T, columns] as multiples of its largest magnitude over 127."""
    blocks = x.float().reshape(-1, block)
    peak = blocks.abs().amax(dim=1, keepdim=True)
    quants = torch.where(peak == 0, 0.0, (blocks * (127 / peak)).round())
    return (quants * (peak / 127)).reshape(x.shape)
