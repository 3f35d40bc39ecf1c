"""Weights from GGUF blocks in Triton.

`weights_at` is the one place that knows the block layouts on a GPU: other kernels call it on the
bytes of their rows. It gathers byte by byte, which is exact for every type; wide loads over
repacked blocks are a matter of speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, Build
from pinfer.quant import BY_NAME, QuantTensor

BLOCK_K, NUM_WARPS = 1024, 4


@triton.jit
def _half(ptr, mask):
    """The fp16 number in two bytes that need not be aligned."""
    low = tl.load(ptr, mask=mask, other=0).to(tl.uint16)
    high = tl.load(ptr + 1, mask=mask, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _byte(ptr, mask):
    return tl.load(ptr, mask=mask, other=0).to(tl.int32)


@triton.jit
def _signed_byte(ptr, mask):
    return tl.load(ptr, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _nibble(ptr, i, mask):
    """Weight i (0..31) of 16 packed bytes: low halves first, then high halves."""
    return (_byte(ptr + i % 16, mask) >> (4 * (i // 16))) & 15


@triton.jit
def _fifth_bit(ptr, i, mask):
    return ((_byte(ptr + i // 8, mask) >> (i % 8)) & 1) << 4


@triton.jit
def _crumb(ptr, i, mask):
    """2-bit field i (0..255): bits 2 (i // 32 % 4) of byte 32 (i // 128) + i % 32."""
    return (_byte(ptr + 32 * (i // 128) + i % 32, mask) >> (2 * ((i // 32) % 4))) & 3


@triton.jit
def _six_bit(ptr, group, mask):
    """Scale and minimum of 32-weight group 0..7 in the 12 bytes that Q4_K and Q5_K share."""
    early = group < 4
    first = _byte(ptr + group % 4, mask)
    second = _byte(ptr + 4 + group % 4, mask)
    third = _byte(ptr + 8 + group % 4, mask)
    scale = tl.where(early, first & 63, (third & 15) | ((first >> 6) << 4))
    minimum = tl.where(early, second & 63, (third >> 4) | ((second >> 6) << 4))
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def weights_at(row_ptr, column, mask, TYPE: tl.constexpr):
    """Float32 weights at `column` of the row that starts at `row_ptr` (uint8); 0 where masked.

    `row_ptr` and `column` broadcast: [BLOCK_N, 1] pointers and [1, BLOCK_K] columns give a tile.
    """
    if TYPE == "F32":
        at = row_ptr + 4 * column
        bits = _byte(at, mask) | (_byte(at + 1, mask) << 8) | (_byte(at + 2, mask) << 16) | (_byte(at + 3, mask) << 24)
        value = bits.to(tl.float32, bitcast=True)
    elif TYPE == "F16":
        value = _half(row_ptr + 2 * column, mask)
    elif TYPE == "BF16":
        at = row_ptr + 2 * column
        value = ((_byte(at, mask) << 16) | (_byte(at + 1, mask) << 24)).to(tl.float32, bitcast=True)
    elif TYPE == "Q8_0":
        block = row_ptr + 34 * (column // 32)
        value = _half(block, mask) * _signed_byte(block + 2 + column % 32, mask)
    elif TYPE == "Q4_0":
        block = row_ptr + 18 * (column // 32)
        value = _half(block, mask) * (_nibble(block + 2, column % 32, mask) - 8).to(tl.float32)
    elif TYPE == "Q4_1":
        block = row_ptr + 20 * (column // 32)
        value = _half(block, mask) * _nibble(block + 4, column % 32, mask).to(tl.float32) + _half(block + 2, mask)
    elif TYPE == "Q5_0":
        block = row_ptr + 22 * (column // 32)
        i = column % 32
        value = _half(block, mask) * ((_nibble(block + 6, i, mask) | _fifth_bit(block + 2, i, mask)) - 16).to(
            tl.float32
        )
    elif TYPE == "Q5_1":
        block = row_ptr + 24 * (column // 32)
        i = column % 32
        quant = _nibble(block + 8, i, mask) | _fifth_bit(block + 4, i, mask)
        value = _half(block, mask) * quant.to(tl.float32) + _half(block + 2, mask)
    else:
        value = _k_quant(row_ptr, column, mask, TYPE)
    return tl.where(mask, value, 0.0)


@triton.jit
def _k_quant(row_ptr, column, mask, TYPE: tl.constexpr):
    i = column % 256
    super_block = column // 256
    if TYPE == "Q2_K":
        block = row_ptr + 84 * super_block
        packed = _byte(block + i // 16, mask)
        scale = _half(block + 80, mask) * (packed & 15).to(tl.float32)
        minimum = _half(block + 82, mask) * (packed >> 4).to(tl.float32)
        value = scale * _crumb(block + 16, i, mask).to(tl.float32) - minimum
    elif TYPE == "Q3_K":
        block = row_ptr + 110 * super_block
        group = i // 16
        low = (_byte(block + 96 + group % 8, mask) >> (4 * (group // 8))) & 15
        high = (_byte(block + 104 + group % 4, mask) >> (2 * (group // 4))) & 3
        third = (_byte(block + i % 32, mask) >> (i // 32)) & 1
        quant = _crumb(block + 32, i, mask) + 4 * third - 4
        value = _half(block + 108, mask) * ((low | (high << 4)) - 32).to(tl.float32) * quant.to(tl.float32)
    elif TYPE == "Q4_K":
        block = row_ptr + 144 * super_block
        group = i // 32
        scale, minimum = _six_bit(block + 4, group, mask)
        quant = (_byte(block + 16 + 32 * (group // 2) + i % 32, mask) >> (4 * (group % 2))) & 15
        value = _half(block, mask) * scale * quant.to(tl.float32) - _half(block + 2, mask) * minimum
    elif TYPE == "Q5_K":
        block = row_ptr + 176 * super_block
        group = i // 32
        scale, minimum = _six_bit(block + 4, group, mask)
        quant = (_byte(block + 48 + 32 * (group // 2) + i % 32, mask) >> (4 * (group % 2))) & 15
        quant = quant | (((_byte(block + 16 + i % 32, mask) >> group) & 1) << 4)
        value = _half(block, mask) * scale * quant.to(tl.float32) - _half(block + 2, mask) * minimum
    else:
        tl.static_assert(TYPE == "Q6_K", "weights_at does not know this block type")
        block = row_ptr + 210 * super_block
        run = (i // 32) % 4
        low = (_byte(block + 64 * (i // 128) + 32 * (run % 2) + i % 32, mask) >> (4 * (run // 2))) & 15
        quant = (low | (_crumb(block + 128, i, mask) << 4)) - 32
        value = _half(block + 208, mask) * _signed_byte(block + 192 + i // 16, mask) * quant.to(tl.float32)
    return value


@triton.jit
def _dequantize_kernel(blocks_ptr, row_stride, out_ptr, columns, TYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = column < columns
    weight = weights_at(blocks_ptr + row * row_stride, column, mask, TYPE)
    tl.store(out_ptr + row * columns + column, weight, mask=mask)


def dequantize(weight: QuantTensor) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    grid = (weight.rows, triton.cdiv(weight.columns, BLOCK_K))
    _dequantize_kernel[grid](
        weight.blocks, weight.blocks.stride(0), out, weight.columns,
        TYPE=weight.type.name, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    arguments = {"blocks_ptr": BYTES, "row_stride": "i64", "out_ptr": FLOATS, "columns": "i32"}
    return [
        Build(f"dequantize {name}", _dequantize_kernel, arguments, {"TYPE": name, "BLOCK_K": BLOCK_K}, NUM_WARPS)
        for name in BY_NAME
    ]
