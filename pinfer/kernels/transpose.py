"""Turns a file's down projection [D, N] into neuron-major rows [N, D].

GGUF quantises `down` along N, so its transpose has other blocks: it is requantised to Q8_0, whose
error is small beside that of any smaller type. Where all 32 rows of a 32 x 32 tile share their
Q8_0 scale (as in models we export) the transpose is the same numbers in another order, and exact.
"""

from __future__ import annotations

import math

import torch

from pinfer.kernels.ops import dequantize
from pinfer.quant import BF16, F16, F32, Q8_0, QuantTensor, QuantType
from pinfer.quantize import quantize_q8_0

# Rows requantised at a time, a Q8_0 block of the transpose: 3.7 MB of floats for a 70B model's down.
TILE = 32


def transposed_type(kind: QuantType, rows: int) -> QuantType:
    """What `transpose_weights` makes of a weight of `rows` rows."""
    if kind in (F32, F16, BF16):
        return kind
    return F16 if rows % TILE else Q8_0


def transpose_weights(weight: QuantTensor) -> tuple[QuantTensor, float]:
    """A QuantTensor [N, D] holding the transpose of `weight` [D, N], and its relative RMS error.

    Floats stay as they are; quantised types become Q8_0 (F16 where D is no multiple of 32).
    ValueError for rows that are laid out for a GPU already.
    """
    if weight.layout != "blocks":
        raise ValueError(f"{weight!r} is laid out for a GPU: transpose it before")
    if weight.type in (F32, F16, BF16):
        dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}[weight.type]
        return QuantTensor.from_dense(weight.blocks.contiguous().view(dtype).T), 0.0
    if weight.type is Q8_0 and weight.rows % TILE == 0 and (exact := _transpose_tiles(weight)) is not None:
        return exact, 0.0
    requantise = _to_q8_0 if weight.rows % TILE == 0 else _to_f16
    strips, squared_error, squared = [], 0.0, 0.0
    for strip in range(0, weight.rows, TILE):
        columns = dequantize(weight[strip : strip + TILE]).T  # [N, 32], a column of blocks
        blocks, restored = requantise(columns)
        strips.append(blocks)
        squared_error += float((restored - columns).double().square().sum())
        squared += float(columns.double().square().sum())
    kind = Q8_0 if requantise is _to_q8_0 else F16
    error = math.sqrt(squared_error / squared) if squared else 0.0
    return QuantTensor(torch.cat(strips, dim=1), kind, weight.rows), error


def _to_q8_0(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks uint8 [N, 34] of float32 [N, 32], and the values they stand for."""
    blocks = quantize_q8_0(columns)
    return blocks, dequantize(QuantTensor(blocks, Q8_0, TILE))


def _to_f16(columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    halves = QuantTensor.from_dense(columns.half())
    return halves.blocks, dequantize(halves)


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
