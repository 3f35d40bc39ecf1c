"""Weights from GGUF blocks, in plain torch: the definition that every kernel is held to.

Block layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`); `gguf.quants` is the oracle in
the tests. Functions take blocks as uint8 `[blocks, block_bytes]`. Those that find integers return
uint8 or int8 in the order of the weights; the others return float32 `[blocks, block_size]`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pinfer import quant
from pinfer.quant import QuantType

Tensor = torch.Tensor


def blocks_to_float(blocks: Tensor, kind: QuantType) -> Tensor:
    """Expand blocks uint8 [blocks, block_bytes] to float32 [blocks, block_size]."""
    return _BY_TYPE[kind](blocks)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, as float32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes to [..., 2n]: all low halves, then all high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """The 32 bits at byte `at`, bit i belonging to weight i, as 0 or 16 [blocks, 32]."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    bits = (blocks[:, at : at + 4, None] >> shifts) & 1
    return bits.reshape(-1, 32) << 4


def _f32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def _f16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float16).float()


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def q4_quants(blocks: Tensor, at: int) -> Tensor:
    """Q4_0 and Q4_1: 0..15 [blocks, 32]; `at` is where the nibbles begin."""
    return nibbles(blocks[:, at:])


def q5_quants(blocks: Tensor, at: int) -> Tensor:
    """Q5_0 and Q5_1: 0..31 [blocks, 32]; `at` is where the fifth bits begin."""
    return nibbles(blocks[:, at + 4 :]) | _fifth_bits(blocks, at)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (q4_quants(blocks, 2).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * q4_quants(blocks, 4).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (q5_quants(blocks, 2).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * q5_quants(blocks, 4).float() + _half(blocks, 2)


def _crumbs(packed: Tensor) -> Tensor:
    """2-bit fields of a 256-weight block: [blocks, 64] bytes to [blocks, 2, 4, 32].

    Weight 128 n + 32 j + l sits in bits 2j..2j+1 of byte 32 n + l.
    """
    shifts = torch.tensor([0, 2, 4, 6], device=packed.device, dtype=torch.uint8)
    return (packed.reshape(-1, 2, 1, 32) >> shifts[None, None, :, None]) & 3


def q2_k_quants(blocks: Tensor) -> Tensor:
    """0..3 [blocks, 256]."""
    return _crumbs(blocks[:, 16:80]).reshape(-1, 256)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, :16]
    quants = q2_k_quants(blocks).reshape(-1, 16, 16).float()
    scale = _half(blocks, 80) * (scales & 15)
    minimum = _half(blocks, 82) * (scales >> 4)
    return (scale[:, :, None] * quants - minimum[:, :, None]).reshape(-1, 256)


def q3_k_quants(blocks: Tensor) -> Tensor:
    """0..7 [blocks, 256]; a weight is 4 less, times its scale."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    high = (blocks[:, None, :32] >> shifts[None, :, None]) & 1  # bit 4n + j of byte l
    return (_crumbs(blocks[:, 32:96]).reshape(-1, 8, 32) | high << 2).reshape(-1, 256)


def q3_k_scales(blocks: Tensor) -> Tensor:
    """-32..31 int8 [blocks, 16], one for 16 weights."""
    packed = blocks[:, 96:108]
    low = torch.cat([packed[:, :8] & 15, packed[:, :8] >> 4], dim=1)
    pairs = torch.cat([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    return (low | pairs << 4).view(torch.int8) - 32


def _q3_k(blocks: Tensor) -> Tensor:
    scale = _half(blocks, 108) * q3_k_scales(blocks).float()
    return (scale[:, :, None] * (q3_k_quants(blocks).reshape(-1, 16, 16).float() - 4)).reshape(-1, 256)


def six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and eight minima that Q4_K and Q5_K keep in 12 bytes, each 0..63 [blocks, 8]."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (third & 15) | (first >> 6) << 4], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | (second >> 6) << 4], dim=1)
    return scales, minima


def _with_minima(blocks: Tensor, quants: Tensor) -> Tensor:
    """d · scale · q - dmin · minimum over [blocks, 256] quants (Q4_K and Q5_K)."""
    scales, minima = six_bit_scales(blocks)
    scale, minimum = _half(blocks, 0) * scales, _half(blocks, 2) * minima
    return (scale[:, :, None] * quants.reshape(-1, 8, 32).float() - minimum[:, :, None]).reshape(-1, 256)


def _paired_nibbles(packed: Tensor) -> Tensor:
    """128 bytes to [blocks, 8, 32]: each run of 32 bytes holds two groups, low then high halves."""
    runs = packed.reshape(-1, 4, 1, 32)
    return torch.cat([runs & 15, runs >> 4], dim=2).reshape(-1, 8, 32)


def q4_k_quants(blocks: Tensor) -> Tensor:
    """0..15 [blocks, 256]."""
    return _paired_nibbles(blocks[:, 16:]).reshape(-1, 256)


def q5_k_quants(blocks: Tensor) -> Tensor:
    """0..31 [blocks, 256]."""
    shifts = torch.arange(8, device=blocks.device, dtype=torch.uint8)
    fifth = (blocks[:, None, 16:48] >> shifts[None, :, None]) & 1
    return (_paired_nibbles(blocks[:, 48:]) | fifth << 4).reshape(-1, 256)


def q6_k_quants(blocks: Tensor) -> Tensor:
    """0..63 [blocks, 256]; a weight is 32 less, times its scale."""
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], dim=2).reshape(-1, 2, 4, 32)
    return (low | _crumbs(blocks[:, 128:192]) << 4).reshape(-1, 256)


def _q4_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, q4_k_quants(blocks))


def _q5_k(blocks: Tensor) -> Tensor:
    return _with_minima(blocks, q5_k_quants(blocks))


def _q6_k(blocks: Tensor) -> Tensor:
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[:, :, None] * (q6_k_quants(blocks).reshape(-1, 16, 16).float() - 32)).reshape(-1, 256)


# What the nibbles of IQ4_NL and IQ4_XS stand for: finer near zero, where weights are dense.
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_quants(blocks: Tensor, at: int) -> Tensor:
    """Levels int8 [blocks, 32 or 256] of IQ4_NL and IQ4_XS, whose nibbles begin at `at`, 32 weights in 16 bytes."""
    levels = torch.tensor(IQ4_LEVELS, dtype=torch.int8, device=blocks.device)
    return levels[nibbles(blocks[:, at:].unflatten(1, (-1, 16))).flatten(1).int()]


def iq4_xs_scales(blocks: Tensor) -> Tensor:
    """-32..31 int8 [blocks, 8], one for 32 weights: four bits in a nibble each, two in a word."""
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=-1).flatten(1)
    shifts = torch.arange(0, 8, 2, device=blocks.device, dtype=torch.uint8)
    high = ((blocks[:, 2:4, None] >> shifts) & 3).flatten(1)
    return (low | high << 4).view(torch.int8) - 32


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * iq4_quants(blocks, 2).float()


def _iq4_xs(blocks: Tensor) -> Tensor:
    scale = _half(blocks, 0) * iq4_xs_scales(blocks).float()
    return (scale[:, :, None] * iq4_quants(blocks, 8).reshape(-1, 8, 32).float()).reshape(-1, 256)


_BY_TYPE: dict[QuantType, Callable[[Tensor], Tensor]] = {
    quant.F32: _f32,
    quant.F16: _f16,
    quant.BF16: _bf16,
    quant.Q8_0: _q8_0,
    quant.Q4_0: _q4_0,
    quant.Q4_1: _q4_1,
    quant.Q5_0: _q5_0,
    quant.Q5_1: _q5_1,
    quant.Q2_K: _q2_k,
    quant.Q3_K: _q3_k,
    quant.Q4_K: _q4_k,
    quant.Q5_K: _q5_k,
    quant.Q6_K: _q6_k,
    quant.IQ4_NL: _iq4_nl,
    quant.IQ4_XS: _iq4_xs,
}
