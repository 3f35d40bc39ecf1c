"""Float rows to GGUF blocks: the writing side of the layouts that `kernels/dequantize` reads.

F16, BF16, Q4_0, Q4_1, Q5_0 and Q5_1 are written by ggml's own rules, byte for byte. The K-quants
use a search of our own, of the kind that ggml uses: per group of weights several roundings are
tried, each followed by a weighted least-squares fit of scale and minimum, and the best is kept.
Groups are worked on as columns `[weights of a group, groups]`, where torch reduces fastest.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pinfer import quant
from pinfer.quant import QuantTensor, QuantType

Tensor = torch.Tensor

# Weights worked on at a time: 1 MB of floats, so that a search stays in the cache.
CHUNK = 1 << 18
# The largest weight that a type may hold: most keep scales, and all of them their minima, in fp16.
_LIMITS = {quant.F32: torch.finfo(torch.float32).max, quant.BF16: torch.finfo(torch.bfloat16).max}
_FP16_MAX = torch.finfo(torch.float16).max


def quantize(values: Tensor, kind: QuantType) -> QuantTensor:
    """Blocks of `kind` for float32 `values` [rows, columns]; all-zero groups stay exactly zero.

    ValueError for another dtype or shape, for columns that do not fill whole blocks, and for values
    that are not finite or too large for the type (65504 where its scales are fp16).
    """
    if values.dtype != torch.float32 or values.dim() != 2:
        raise ValueError(f"expected float32 [rows, columns], not {values.dtype} {list(values.shape)}")
    if kind not in _BY_TYPE:
        raise ValueError(f"{kind} is read alone; quantize makes {', '.join(str(one) for one in _BY_TYPE)}")
    rows, columns = values.shape
    blocks = torch.empty(rows, kind.row_bytes(columns), dtype=torch.uint8, device=values.device)
    step = max(1, CHUNK // max(1, columns))
    for start in range(0, rows, step):
        piece = values[start : start + step]
        _check(piece, kind)
        blocks[start : start + step] = _BY_TYPE[kind](piece.reshape(-1, kind.block_size)).view(piece.shape[0], -1)
    return QuantTensor(blocks, kind, columns)


def pack_levels(levels: Tensor, scales: Tensor, kind: QuantType) -> QuantTensor:
    """Blocks of `kind`, Q4_0 or Q5_0, whose weights are whole levels times scales, without another rounding.

    levels: float32 [rows, columns] in -8..7, for Q5_0 -16..15. scales: float32 [rows, columns / 32], stored as fp16.
    """
    half_levels = {quant.Q4_0: 8, quant.Q5_0: 16}[kind]
    quants = (levels + half_levels).to(torch.uint8).view(-1, kind.block_size)
    blocks = _centred_blocks(scales.reshape(-1, 1), quants, half_levels)
    return QuantTensor(blocks.view(len(levels), -1), kind, levels.shape[1])


def _check(values: Tensor, kind: QuantType) -> None:
    limit = _LIMITS.get(kind, _FP16_MAX)
    largest = float(values.abs().amax()) if values.numel() else 0.0
    if not largest <= limit:  # so that NaN fails
        problem = "not finite" if not bool(values.isfinite().all()) else f"too large for {kind}: {largest:g}"
        raise ValueError(f"a weight is {problem}")


def quantize_q8_0(values: Tensor) -> Tensor:
    """Blocks uint8 [rows, 34] from float32 [rows, 32]: an fp16 scale of max |x| / 127, then int8.

    Unlike ggml, the int8 are taken with the scale as stored: it matters where fp16 is subnormal.
    """
    scale = (values.abs().amax(dim=1, keepdim=True) / 127).half()
    quants = torch.where(scale == 0, 0, values / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), quants.view(torch.uint8)], dim=1)


def _bytes(values: Tensor, dtype: torch.dtype) -> Tensor:
    """[blocks, n] numbers to the bytes [blocks, n · size] of `dtype`."""
    return values.to(dtype).contiguous().view(torch.uint8)


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda values: _bytes(values, dtype)


# Blocks of 32 with one scale, with or without a minimum.


def _nibbles(quants: Tensor) -> Tensor:
    """[blocks, 32] to [blocks, 16] bytes: the first half in the low bits, the second in the high."""
    return (quants[:, :16] & 15) | (quants[:, 16:] & 15) << 4


def _fifth_bits(quants: Tensor) -> Tensor:
    """Bit 4 of [blocks, 32] as [blocks, 4] bytes, weight i in bit i."""
    return _gather_bits(quants.view(-1, 4, 8) >> 4, torch.arange(8), dim=2)


def _gather_bits(fields: Tensor, shifts: Tensor, dim: int) -> Tensor:
    """uint8 fields moved up by `shifts` along `dim` and joined; fields must not overlap."""
    shape = [1] * fields.dim()
    shape[dim] = -1
    return (fields << shifts.to(fields).view(shape)).sum(dim, dtype=torch.uint8)


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for scales that fp16 stores as 0."""
    return torch.where(scale.half() == 0, 0, 1 / scale)


def _centred(values: Tensor, half_levels: int) -> tuple[Tensor, Tensor]:
    """Scale [blocks, 1] that puts the largest |x| at level 0, and levels uint8 [blocks, 32]."""
    extreme = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    scale = extreme / -half_levels
    levels = values * _reciprocal(scale) + (half_levels + 0.5)
    return scale, levels.to(torch.int32).clamp(0, 2 * half_levels - 1).to(torch.uint8)


def _centred_blocks(scale: Tensor, quants: Tensor, half_levels: int) -> Tensor:
    """Blocks of Q4_0 (half_levels 8) or Q5_0 (16) from scales [blocks, 1] and levels uint8 [blocks, 32]."""
    fifth = [_fifth_bits(quants)] if half_levels == 16 else []
    return torch.cat([_bytes(scale, torch.float16), *fifth, _nibbles(quants)], dim=1)


def _ranged(values: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum [blocks, 1] that spread min..max over 0..top, and levels uint8 [blocks, 32]."""
    low, high = values.aminmax(dim=1, keepdim=True)
    scale = (high - low) / top
    levels = (values - low) * _reciprocal(scale) + 0.5
    return scale, low, levels.to(torch.int32).clamp(0, top).to(torch.uint8)


def _q4_0(values: Tensor) -> Tensor:
    return _centred_blocks(*_centred(values, 8), 8)


def _q4_1(values: Tensor) -> Tensor:
    scale, low, quants = _ranged(values, 15)
    return torch.cat([_bytes(scale, torch.float16), _bytes(low, torch.float16), _nibbles(quants)], dim=1)


def _q5_0(values: Tensor) -> Tensor:
    return _centred_blocks(*_centred(values, 16), 16)


def _q5_1(values: Tensor) -> Tensor:
    scale, low, quants = _ranged(values, 31)
    floats = [_bytes(scale, torch.float16), _bytes(low, torch.float16)]
    return torch.cat([*floats, _fifth_bits(quants), _nibbles(quants)], dim=1)


# K-quants: super-blocks of 256 whose groups have scales that are quantised themselves.


def _columns(values: Tensor, group: int) -> Tensor:
    """[blocks, 256] to the groups as columns: [group, blocks · 256 / group]."""
    return values.reshape(-1, group).T.contiguous()


def _rows(columns: Tensor) -> Tensor:
    """Levels as columns [group, groups] back to uint8 [blocks, 256]."""
    return columns.to(torch.uint8).T.reshape(-1, 256)


def _inverse(below: Tensor, above: float = 1.0) -> Tensor:
    """above / below, and 0 where `below` is 0."""
    return torch.where(below == 0, 0, above / below)


def _fit_affine(x: Tensor, top: int, stretches: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Scale and minimum, both >= 0 and float32 [groups], such that x ≈ scale · (0..top) - minimum.

    Each stretch rounds as if top + stretch levels spanned the range, then fits by least squares;
    the best fit of all is kept.
    """
    weight = _importance(x)
    low = x.amin(0).clamp(max=0)
    span, shifted, weighted = x.amax(0) - low, x - low, weight * x
    sum_w, sum_x, sum_xx = weight.sum(0), weighted.sum(0), (weighted * x).sum(0)
    scale, minimum = span / top, -low
    best = torch.full_like(scale, torch.inf)
    for stretch in stretches:
        levels = (shifted * _inverse(span, top + stretch)).round_().clamp_(0, top)
        sum_xl = (weighted * levels).sum(0)
        sum_l, sum_ll = _weighted_sums(weight, levels)
        spread = sum_w * sum_ll - sum_l.square()
        a = (sum_w * sum_xl - sum_x * sum_l) / spread
        b = (sum_ll * sum_x - sum_l * sum_xl) / spread
        through_zero = b > 0  # the format has no minimum above zero
        a, b = torch.where(through_zero, sum_xl / sum_ll, a), b.clamp(max=0)
        error = sum_xx + a * (a * sum_ll + 2 * b * sum_l - 2 * sum_xl) + b * (b * sum_w - 2 * sum_x)
        # A group whose levels are all alike has no slope to fit; what it started with is exact.
        better = (spread > 1e-5 * sum_w * sum_ll) & (error < best) & (a > 0)
        best = torch.where(better, error, best)
        scale, minimum = torch.where(better, a, scale), torch.where(better, -b, minimum)
    return scale, minimum


def _importance(x: Tensor) -> Tensor:
    """The weight of each error: |x| + rms of its group, as large weights act most."""
    return x.abs() + x.square().mean(0).sqrt()


def _weighted_sums(weight: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w l and Σ w l² over the columns."""
    product = weight * levels
    return product.sum(0), product.mul_(levels).sum(0)


def _fit_centred(x: Tensor, half_levels: int, stretches: tuple[float, ...]) -> Tensor:
    """Scale of either sign, float32 [groups], such that x ≈ scale · (-half_levels..half_levels - 1).

    The largest |x| falls near the end that has one level more; otherwise as `_fit_affine`.
    """
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    weight = _importance(x)
    weighted = weight * x
    scale = extreme / -half_levels
    best = torch.zeros_like(scale)
    for stretch in stretches:
        levels = (x * _inverse(extreme, -(half_levels + stretch))).round_().clamp_(-half_levels, half_levels - 1)
        sum_xl = (weighted * levels).sum(0)
        sum_ll = _weighted_sums(weight, levels)[1]
        gain = sum_xl.square() * _inverse(sum_ll)  # how much of Σ w x² the fit explains
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, sum_xl / sum_ll, scale)
    return scale


def _quantize_scales(scales: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales >= 0 [blocks, groups] as fp16-exact float32 [blocks, 1] times whole numbers 0..top (float32)."""
    unit = (scales.amax(1, keepdim=True) / top).half().float()
    return unit, (scales * _inverse(unit)).round_().clamp_(0, top)


def _quantize_signed_scales(scales: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The same for scales of either sign, times -half..half - 1; the largest becomes -half."""
    extreme = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    unit = (extreme / -half).half().float()
    return unit, (scales * _inverse(unit)).round_().clamp_(-half, half - 1)


def _affine_super_block(
    values: Tensor, group: int, top: int, scale_top: int, stretches: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp16 units as bytes [blocks, 4], scales and minima uint8 [blocks, groups], levels uint8 [blocks, 256]."""
    x = _columns(values, group)
    scale, minimum = _fit_affine(x, top, stretches)
    unit, scales = _quantize_scales(scale.view(-1, 256 // group), scale_top)
    minimum_unit, minima = _quantize_scales(minimum.view(-1, 256 // group), scale_top)
    stored, stored_minimum = (unit * scales).view(-1), (minimum_unit * minima).view(-1)
    levels = (x + stored_minimum).mul_(_inverse(stored)).round_().clamp_(0, top)
    units = torch.cat([_bytes(unit, torch.float16), _bytes(minimum_unit, torch.float16)], dim=1)
    return units, scales.to(torch.uint8), minima.to(torch.uint8), _rows(levels)


def _centred_super_block(
    values: Tensor, half_levels: int, scale_half: int, stretches: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """fp16 unit as bytes [blocks, 2], scales float32 [blocks, 16], levels from 0 uint8 [blocks, 256]."""
    x = _columns(values, 16)
    unit, scales = _quantize_signed_scales(_fit_centred(x, half_levels, stretches).view(-1, 16), scale_half)
    stored = (unit * scales).view(-1)
    levels = (x * _inverse(stored)).round_().clamp_(-half_levels, half_levels - 1)
    return _bytes(unit, torch.float16), scales, _rows(levels + half_levels)


def _crumbs(quants: Tensor) -> Tensor:
    """The low 2 bits of [blocks, 256] as 64 bytes: weight 128 n + 32 j + l in bits 2j.. of byte 32 n + l."""
    return _gather_bits((quants & 3).view(-1, 2, 4, 32), torch.tensor([0, 2, 4, 6]), dim=2).view(-1, 64)


def _six_bit_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima of 6 bits in 12 bytes (Q4_K and Q5_K)."""
    first = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    second = minima[:, :4] | (minima[:, 4:] >> 4) << 6
    return torch.cat([first, second, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], dim=1)


def _paired_nibbles(quants: Tensor) -> Tensor:
    """The low 4 bits of [blocks, 256] as 128 bytes: each run of 32 bytes holds two groups of 32."""
    pairs = (quants & 15).view(-1, 4, 2, 32)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def _q2_k(values: Tensor) -> Tensor:
    units, scales, minima, quants = _affine_super_block(values, 16, 3, 15, _WIDE)
    return torch.cat([scales | minima << 4, _crumbs(quants), units], dim=1)


def _q3_k(values: Tensor) -> Tensor:
    unit, signed, quants = _centred_super_block(values, 4, 32, _Q3_STRETCHES)
    scales = (signed + 32).to(torch.uint8)
    low = (scales[:, :8] & 15) | (scales[:, 8:] & 15) << 4
    high = _gather_bits((scales >> 4).view(-1, 4, 4), torch.tensor([0, 2, 4, 6]), dim=1)
    third = _gather_bits((quants >> 2).view(-1, 8, 32), torch.arange(8), dim=1)
    return torch.cat([third, _crumbs(quants), low, high, unit], dim=1)


def _q4_k(values: Tensor) -> Tensor:
    units, scales, minima, quants = _affine_super_block(values, 32, 15, 63, _NARROW)
    return torch.cat([units, _six_bit_scales(scales, minima), _paired_nibbles(quants)], dim=1)


def _q5_k(values: Tensor) -> Tensor:
    units, scales, minima, quants = _affine_super_block(values, 32, 31, 63, _NARROW)
    fifth = _gather_bits((quants >> 4).view(-1, 8, 32), torch.arange(8), dim=1)
    return torch.cat([units, _six_bit_scales(scales, minima), fifth, _paired_nibbles(quants)], dim=1)


def _q6_k(values: Tensor) -> Tensor:
    unit, scales, quants = _centred_super_block(values, 32, 128, _Q6_STRETCHES)
    low = (quants & 15).view(-1, 2, 2, 64)
    packed = (low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128)
    return torch.cat([packed, _crumbs(quants >> 4), _bytes(scales, torch.int8), unit], dim=1)


# The roundings tried, chosen by measurement: twice as many gain 2 % of the error at most.
_NARROW = (-1.0, -0.7, -0.4, -0.2, 0.0, 0.2, 0.5, 0.9)
_WIDE = (-0.8, -0.6, -0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8)
_Q3_STRETCHES = (-1.2, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6)
_Q6_STRETCHES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)

_BY_TYPE: dict[QuantType, Callable[[Tensor], Tensor]] = {
    quant.F32: _cast(torch.float32),
    quant.F16: _cast(torch.float16),
    quant.BF16: _cast(torch.bfloat16),
    quant.Q8_0: quantize_q8_0,
    quant.Q4_0: _q4_0,
    quant.Q4_1: _q4_1,
    quant.Q5_0: _q5_0,
    quant.Q5_1: _q5_1,
    quant.Q2_K: _q2_k,
    quant.Q3_K: _q3_k,
    quant.Q4_K: _q4_k,
    quant.Q5_K: _q5_k,
    quant.Q6_K: _q6_k,
}
