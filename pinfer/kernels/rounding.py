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


# What a block's largest magnitude must lie between: below, 127 over it is no float; above, sums of its
# multiples may be none.
SMALLEST, LARGEST = 127 / 1e38, 1e30


def round_activations(x: torch.Tensor, block: int) -> torch.Tensor:
    """Each block of x float32 [T, columns] as multiples of its largest magnitude over 127.

    Blocks that are too small for that become zeros; too large, infinite or NaN ones become NaN.
    """
    blocks = x.float().reshape(-1, block)
    peak = blocks.abs().amax(dim=1, keepdim=True)
    usable = (peak > SMALLEST) & (peak < LARGEST)
    divisor = torch.where(usable, peak, 1.0)
    rounded = (blocks * (127 / divisor)).round() * (divisor / 127)
    hopeless = torch.where(peak <= SMALLEST, 0.0, torch.nan)
    return torch.where(usable, rounded, hopeless).reshape(x.shape)
