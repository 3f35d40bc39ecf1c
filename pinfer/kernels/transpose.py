"""Turns a file's down projection [D, N] into neuron-major rows [N, D].

GGUF quantises `down` along N, so its transpose has other blocks: it is requantised to Q8_0, whose
error is small beside that of any smaller type. Where all 32 rows of a 32 x 32 tile share their
Q8_0 scale (as in models we export) the transpose is the same numbers in another order, and exact.
"""

from __future__ import annotations

import torch

from pinfer.kernels.ops import dequantize
from pinfer.quant import BF16, F16, F32, Q8_0, QuantTensor

# Rows requantised at a time: 32 rows of a 70B model's down are 3.7 MB of floats.
TILE = 32


def transpose_weights(weight: QuantTensor) -> QuantTensor:
    """A QuantTensor [N, D] holding the transpose of `weight` [D, N].

    Floats stay as they are; quantised types become Q8_0 (F16 where D is no multiple of 32).
    """
    if weight.type in (F32, F16, BF16):
        dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[weight.type]
        return QuantTensor.from_dense(weight.blocks.contiguous().view(dtype).T)
    if weight.rows % TILE:
        return QuantTensor.from_dense(dequantize(weight).T.half())
    if weight.type is Q8_0 and (exact := _transpose_tiles(weight)) is not None:
        return exact
    out = torch.empty(weight.columns, weight.rows // TILE, Q8_0.block_bytes, dtype=torch.uint8, device=weight.device)
    for tile in range(weight.rows // TILE):
        columns = dequantize(weight[TILE * tile : TILE * (tile + 1)]).T  # [N, 32], a column of blocks
        out[:, tile] = quantize_q8_0(columns)
    return QuantTensor(out.flatten(1), Q8_0, weight.rows)


def quantize_q8_0(values: torch.Tensor) -> torch.Tensor:
    """Blocks uint8 [rows, 34] from float32 [rows, 32]: an fp16 scale of max |x| / 127, then int8."""
    scale = (values.abs().amax(dim=1, keepdim=True) / 127).half()
    quants = torch.where(scale == 0, 0, values / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), quants.view(torch.uint8)], dim=1)


def _transpose_tiles(weight: QuantTensor) -> QuantTensor | None:
    """The exact transpose of Q8_0 blocks, or None if some tile has more than one scale."""
    tiles = weight.blocks.view(weight.rows // TILE, TILE, -1, Q8_0.block_bytes)  # [D/32, 32, N/32, 34]
    scales, quants = tiles[..., :2], tiles[..., 2:]
    if not torch.equal(scales, scales[:, :1].expand_as(scales)):
        return None
    by_neuron = quants.permute(2, 3, 0, 1)  # [N/32, 32 neurons, D/32, 32 columns]
    per_block = scales[:, 0].permute(1, 0, 2)[:, None].expand(-1, TILE, -1, -1)  # [N/32, 32, D/32, 2]
    blocks = torch.cat([per_block, by_neuron], dim=-1)
    return QuantTensor(blocks.reshape(weight.columns, -1), Q8_0, weight.rows)


def relative_error(weight: QuantTensor, transposed: QuantTensor) -> float:
    """RMS of the transpose's deviation over the RMS of the weights."""
    original = dequantize(weight)
    return float((dequantize(transposed).T - original).square().mean().sqrt() / original.square().mean().sqrt())
