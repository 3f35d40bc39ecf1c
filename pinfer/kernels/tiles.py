"""Rows in the planes layout as tiles of registers: what every Triton kernel over weights is built of.

A thread holds one group of 32 weights of a row: eight tiles ("planes") [ROWS, BLOCK_G, 4] float32,
tile i holding what `columns_at(…, i)` names.

Quants are never converted. A word masked to the bits of one quant *is* a float, the denormal number
q · 2^(at - 149), `at` being where the quant lies; FMA units take it at full rate and exactly. x is
scaled by 2^(100 - at) once a program, so that products are ordinary numbers again, and sums by the
rest. So a quant costs a mask and an FMA: two instructions, where shifting, masking and converting it
cost eight (an integer conversion runs at a quarter to an eighth of an FMA's rate, and the fused FFN
over Q4_K would be bound by it on large GPUs). What quants lose before they are scaled (8 of Q4_0's,
128 of Q8_0's) is a minimum as K-quants have them: Σ (q - 8) x = Σ q x - 8 Σ x. It needs denormals
not to be flushed, which tests/test_aot.py looks after, and |x| or |h · scale| below 2^27.

    raw = load_raw(row_ptr, wanted, …)      16-byte loads; nothing is computed, so loads can be issued early
    dots(raw, x, …)                         g · x for each row [ROWS]
    add_rows(sums, raw, h, …)               sums += h · row
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import Build
from pinfer.quant import BY_NAME, QuantTensor, QuantType


def groups_of(weight: QuantTensor) -> int:
    """Groups of 32 weights in a row, the last one of floats filled up."""
    return -(-weight.columns // 32)


def warps_of_64(num_warps: int) -> int:
    """As many threads in AMD's warps of 64: twice the threads would take half the bytes each."""
    return max(1, num_warps // 2)


def warps_here(num_warps: int) -> int:
    """`num_warps` warps of 32 threads in the warps of the installed torch's GPUs."""
    return warps_of_64(num_warps) if torch.version.hip else num_warps


def rows_and_warps(block_g: int) -> tuple[int, int]:
    """Rows at a time and warps for tiles of `block_g` groups: a group of 32 weights a thread, 256 threads where it can be.

    More groups a thread spill at 128 registers; fewer leave loads narrower than 16 bytes.
    """
    rows = max(1, min(16, 256 // block_g))
    return rows, min(32, max(1, rows * block_g // 32))


def wide_share(*kinds: QuantType) -> float | None:
    """What 16-byte loads must carry of the bytes named in a loop over rows of these types.

    Scales are loads of 2 or 4 bytes, and those that 256 weights share are named by every thread of
    theirs. With 2-bit quants nothing is as wide as 16 bytes.
    """
    if any(kind.name in ("Q2_K", "Q3_K") for kind in kinds):
        return None
    return min(
        {"Q6_K": 0.37, "Q5_K": 0.4, "Q4_K": 0.45}.get(kind.name, 0.5 if kind.block_size > 1 else 0.9) for kind in kinds
    )


def build_over_rows(
    label: str,
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int,
    *kinds: str,
    strides: tuple[str, ...],
    rows_share: float = 1.0,
) -> Build:
    """A Build of a kernel over rows of these types, with the 16-byte loads that it promises.

    strides:    integer arguments that are multiples of 16.
    rows_share: what rows have of the bytes that the loop's load instructions name, where x takes the rest.
    """
    share = wide_share(*(BY_NAME[kind] for kind in kinds))
    return Build(
        label,
        kernel,
        arguments,
        constants,
        num_warps,
        multiples_of_16=strides,
        wide_share=None if share is None else rows_share * share,
        warps_of_64=warps_of_64(num_warps),
    )


# Facts about types, known when a kernel is compiled.


@triton.constexpr_function
def is_float(kind):
    return kind in ("F32", "F16", "BF16")


@triton.constexpr_function
def has_two_scales(kind):
    """Whether each half of a group, that is the even or the odd planes, has its own scale."""
    return kind in ("Q2_K", "Q3_K", "Q6_K")


@triton.constexpr_function
def has_super_scales(kind):
    return kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


@triton.constexpr_function
def _quant_bits(kind):
    """Of the first plane: what is loaded for four weights of each thread's eight planes."""
    return {"Q8_0": 8, "IQ4_NL": 8, "IQ4_XS": 8, "Q2_K": 2, "Q3_K": 2}.get(kind, 4)


@triton.constexpr_function
def _higher_bits(kind):
    return {"Q6_K": 2, "Q5_0": 1, "Q5_1": 1, "Q5_K": 1, "Q3_K": 1}.get(kind, 0)


@triton.constexpr_function
def _offset(kind):
    """What a quant loses before it is scaled."""
    offsets = {"Q8_0": 128, "IQ4_NL": 128, "IQ4_XS": 128, "Q4_0": 8, "Q5_0": 16, "Q6_K": 32, "Q3_K": 4}
    return offsets.get(kind, 0)


@triton.constexpr_function
def _bit_of(i, kind):
    """Where plane i's quants lie in their word, after `_quants_of` has shifted it by 16 or not."""
    bits = _quant_bits(kind)
    if bits == 8:
        return 8 * (i % 2)
    return 4 * (i % 4) + (2 * (i // 4) if bits == 2 else 0)


@triton.constexpr_function
def _size(i, kind):
    """2^at, what plane i's quants are too large by; 1 for floats."""
    return 1.0 if is_float(kind) else float(1 << _bit_of(i, kind))


@triton.constexpr_function
def _raise(kind):
    """What meets quants is scaled by this before, and by `_lower` after: 2^149 at once is no float."""
    return 1.0 if is_float(kind) else 2.0**100


@triton.constexpr_function
def _lower(kind):
    return 1.0 if is_float(kind) else 2.0**49


@triton.constexpr_function
def _at(plane, groups, kind):
    """The byte of a row at which its higher bits (1), scales (2) or supers (3) begin."""
    room = (groups + 7) // 8 * 8
    scale_bytes = 4 if kind in ("Q4_1", "Q5_1") else 2
    sizes = (4 * _quant_bits(kind), 4 * _higher_bits(kind), scale_bytes)
    return room * sum(sizes[:plane])


@triton.jit
def columns_at(g, i: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """Which columns plane i holds of the groups g [BLOCK_G]: int32 [BLOCK_G, 4]."""
    w = tl.arange(0, 4)[None, :]
    if TYPE == "F32":  # eight loads, an eighth of the row each
        return i * (4 * GROUPS) + 4 * g[:, None] + w
    elif is_float(TYPE):  # four loads, a quarter of the row each, two weights to a word
        return (i // 2) * (8 * GROUPS) + 8 * g[:, None] + 2 * w + i % 2
    elif _quant_bits(TYPE) == 8:  # two loads, of each half of a group
        return 32 * g[:, None] + 16 * (i // 4) + 4 * w + i % 4
    else:
        return 32 * g[:, None] + 16 * (i % 2) + 4 * w + i // 2


@triton.jit
def load_x(x_ptr, g, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """x for `dots`: eight tiles [BLOCK_G, 4] at `columns_at`, scaled for what will multiply them; 0 beyond WIDTH."""
    x = ()
    for i in tl.static_range(8):
        column = columns_at(g, i, GROUPS, TYPE)
        inside = (column < WIDTH) & (g < GROUPS)[:, None]
        x = x + (tl.load(x_ptr + column, mask=inside, other=0.0).to(tl.float32) * (_raise(TYPE) / _size(i, TYPE)),)
    return x


@triton.jit
def sums_of(x, TYPE: tl.constexpr):
    """What minima are multiplied with: sums of x over each group's even and odd planes, two [BLOCK_G]."""
    even, odd = x[0] * _size(0, TYPE), x[1] * _size(1, TYPE)
    for i in tl.static_range(2, 8, 2):
        even += x[i] * _size(i, TYPE)
        odd += x[i + 1] * _size(i + 1, TYPE)
    return tl.sum(even, axis=1) / _raise(TYPE), tl.sum(odd, axis=1) / _raise(TYPE)


@triton.jit
def _words(row_ptr, g, offset, WORD: tl.constexpr, n_bytes: tl.constexpr, inside):
    """Four words of each group, group g's at offset + 4 n_bytes g: [ROWS, BLOCK_G, 4]."""
    at = 4 * g[:, None] + tl.arange(0, 4)[None, :]
    words_ptr = (row_ptr + offset).to(tl.pointer_type(WORD), bitcast=True)
    return tl.load(words_ptr[:, None, None] + at[None], mask=inside[:, :, None], other=0)


@triton.jit
def load_raw(row_ptr, wanted, g, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """The stored words of the rows at `row_ptr` (pointers to uint8 [ROWS]), all 0 where `wanted` [ROWS] is false."""
    inside = wanted[:, None] & (g < GROUPS)[None, :]
    ROOM: tl.constexpr = (GROUPS + 7) // 8 * 8
    if TYPE == "F32":
        raw = ()
        for i in tl.static_range(8):
            raw = raw + (_words(row_ptr, g, 16 * GROUPS * i, tl.float32, 4, inside),)
    elif is_float(TYPE):
        raw = ()
        for i in tl.static_range(4):
            raw = raw + (_words(row_ptr, g, 16 * GROUPS * i, tl.uint32, 4, inside),)
    elif _quant_bits(TYPE) == 8:
        raw = (
            _words(row_ptr, g, 0, tl.uint32, 4, inside),
            _words(row_ptr, g, 16 * ROOM, tl.uint32, 4, inside),
        )
    elif TYPE == "Q2_K" or TYPE == "Q3_K":
        raw = (_words(row_ptr, g, 0, tl.uint16, 2, inside).to(tl.uint32),)
    else:
        raw = (_words(row_ptr, g, 0, tl.uint32, 4, inside),)
    if _higher_bits(TYPE) == 2:
        raw = raw + (_words(row_ptr, g, _at(1, GROUPS, TYPE), tl.uint16, 2, inside).to(tl.uint32),)
    elif _higher_bits(TYPE) == 1:
        raw = raw + (_words(row_ptr, g, _at(1, GROUPS, TYPE), tl.uint8, 1, inside).to(tl.uint32),)
    return raw + _load_scales(row_ptr, inside, g, GROUPS, TYPE)


@triton.jit
def _load_scales(row_ptr, inside, g, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """The words of scales that belong to each group, [ROWS, BLOCK_G] each: none, one or two."""
    scales = ()
    if not is_float(TYPE):
        WORD: tl.constexpr = tl.uint32 if TYPE == "Q4_1" or TYPE == "Q5_1" else tl.uint16
        scales_ptr = (row_ptr + _at(2, GROUPS, TYPE)).to(tl.pointer_type(WORD), bitcast=True)
        scales = (tl.load(scales_ptr[:, None] + g[None, :], mask=inside, other=0),)
    if has_super_scales(TYPE):
        supers_ptr = (row_ptr + _at(3, GROUPS, TYPE)).to(tl.pointer_type(tl.uint32), bitcast=True)
        scales = scales + (tl.load(supers_ptr[:, None] + (g // 8)[None, :], mask=inside, other=0),)
    return scales


@triton.jit
def _half(word):
    """The fp16 number in the low 16 bits of a word."""
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def scales_of(raw, TYPE: tl.constexpr):
    """Scales of the even and the odd planes and what is taken off, four float32 [ROWS, BLOCK_G], of quants."""
    if TYPE == "Q4_1" or TYPE == "Q5_1":  # they add their minimum
        scale, minimum = _half(raw[-1]), -_half(raw[-1] >> 16)
        return scale, scale, minimum, minimum
    elif not has_super_scales(TYPE):
        scale = _half(raw[-1])
        return scale, scale, scale * _offset(TYPE), scale * _offset(TYPE)
    else:
        d, dmin, scales = _half(raw[-1]), _half(raw[-1] >> 16), raw[-2]
        low, high = scales & 255, scales >> 8
        if TYPE == "Q2_K":
            return (
                d * (low & 15).to(tl.float32), d * (high & 15).to(tl.float32),
                dmin * (low >> 4).to(tl.float32), dmin * (high >> 4).to(tl.float32),
            )  # fmt: skip
        elif TYPE == "IQ4_XS":
            scale = d * low.to(tl.int8).to(tl.float32)
            return scale, scale, scale * _offset(TYPE), scale * _offset(TYPE)
        elif not has_two_scales(TYPE):  # Q4_K, Q5_K
            scale, minimum = d * low.to(tl.float32), dmin * high.to(tl.float32)
            return scale, scale, minimum, minimum
        else:
            even, odd = d * low.to(tl.int8).to(tl.float32), d * high.to(tl.int8).to(tl.float32)
            return even, odd, even * _offset(TYPE), odd * _offset(TYPE)


@triton.jit
def plane_of(raw, i: tl.constexpr, TYPE: tl.constexpr):
    """Plane i, float32 [ROWS, BLOCK_G, 4]: the weights of a float type, or quants times 2^(at - 149)."""
    if TYPE == "F32":
        return raw[i]
    elif TYPE == "F16":
        return _half(raw[i // 2] >> (16 * (i % 2)))
    elif TYPE == "BF16":
        word = raw[i // 2]
        return (word << 16 if i % 2 == 0 else word & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        return _quants_of(raw, i, TYPE).to(tl.float32, bitcast=True)


@triton.jit
def _quants_of(raw, i: tl.constexpr, TYPE: tl.constexpr):
    """Plane i's quants in place: uint32 [ROWS, BLOCK_G, 4], each shifted up by `_bit_of`."""
    BITS: tl.constexpr = _quant_bits(TYPE)
    AT: tl.constexpr = _bit_of(i, TYPE)
    if BITS == 8:
        word = raw[i // 4] >> (16 * (i % 4 // 2))
    elif BITS == 4:
        word = raw[0] >> (16 * (i // 4))
    else:
        word = raw[0]
    bits = word & (((1 << BITS) - 1) << AT)
    HIGHER: tl.constexpr = _higher_bits(TYPE)
    if HIGHER > 0:
        IN_WORD: tl.constexpr = i if HIGHER == 1 else 4 * (i % 4) + 2 * (i // 4)
        bits |= (raw[1] << (AT + BITS - IN_WORD)) & (((1 << HIGHER) - 1) << (AT + BITS))
    return bits


@triton.jit
def dots(raw, x, x_sums, TYPE: tl.constexpr):
    """Each row times x (from `load_x` and `sums_of` for the same type): float32 [ROWS]."""
    even, odd = plane_of(raw, 0, TYPE) * x[0][None], plane_of(raw, 1, TYPE) * x[1][None]
    for i in tl.static_range(2, 8, 2):
        even += plane_of(raw, i, TYPE) * x[i][None]
        odd += plane_of(raw, i + 1, TYPE) * x[i + 1][None]
    if is_float(TYPE):
        by_group = tl.sum(even + odd, axis=2)
    else:
        scale_even, scale_odd, min_even, min_odd = scales_of(raw, TYPE)
        if has_two_scales(TYPE):
            by_group = (tl.sum(even, axis=2) * scale_even + tl.sum(odd, axis=2) * scale_odd) * _lower(TYPE)
            by_group -= min_even * x_sums[0][None] + min_odd * x_sums[1][None]
        else:
            by_group = tl.sum(even + odd, axis=2) * _lower(TYPE) * scale_even - min_even * (x_sums[0] + x_sums[1])[None]
    return tl.sum(by_group, axis=1)


@triton.constexpr_function
def is_exact_in_bfloat16(kind):
    return kind == "BF16"


@triton.constexpr_function
def tile_size(i, kind):
    """What `scaled_plane` i is too small by."""
    return 1.0 if is_float(kind) else 2.0**49 / (1 << _bit_of(i, kind))


@triton.jit
def scaled_plane(raw, i: tl.constexpr, TYPE: tl.constexpr):
    """Plane i's weights divided by `tile_size`, float32 [ROWS, BLOCK_G, 4]: what tensor cores are given."""
    if is_float(TYPE):
        return plane_of(raw, i, TYPE)
    else:
        scales = scales_of(raw, TYPE)
        scale, minimum = scales[i % 2] * _raise(TYPE), scales[2 + i % 2] / tile_size(i, TYPE)
        return plane_of(raw, i, TYPE) * scale[:, :, None] - minimum[:, :, None]


@triton.jit
def flat_columns_at(g, i: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """`columns_at` in one dimension, as tensor cores take planes, and which are inside a row: two [4 · BLOCK_G]."""
    column = columns_at(g, i, GROUPS, TYPE)
    inside = (column < WIDTH) & (g < GROUPS)[:, None]
    return tl.reshape(column, [4 * g.shape[0]]), tl.reshape(inside, [4 * g.shape[0]])


@triton.jit
def no_sums(ROWS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Where `add_rows` begins: eight planes [ROWS, BLOCK_G, 4], and two [ROWS, BLOCK_G] for minima."""
    sums = ()
    for _ in tl.static_range(8):
        sums = sums + (tl.zeros([ROWS, BLOCK_G, 4], tl.float32),)
    return sums, (tl.zeros([ROWS, BLOCK_G], tl.float32), tl.zeros([ROWS, BLOCK_G], tl.float32))


@triton.jit
def add_rows(sums, minima, raw, h, TYPE: tl.constexpr):
    """Add h [ROWS] times each row; rows stay apart until `store_sums`."""
    if is_float(TYPE):
        even, odd = h[:, None], h[:, None]
    else:
        scale_even, scale_odd, min_even, min_odd = scales_of(raw, TYPE)
        raised = h[:, None] * _raise(TYPE)
        even, odd = raised * scale_even, raised * scale_odd  # [ROWS, BLOCK_G]
        if has_two_scales(TYPE):
            minima = (minima[0] + h[:, None] * min_even, minima[1] + h[:, None] * min_odd)
        else:
            minima = (minima[0] + h[:, None] * min_even, minima[1])
    added = ()
    for i in tl.static_range(8):
        factor = even if i % 2 == 0 or not has_two_scales(TYPE) else odd
        added = added + (sums[i] + factor[:, :, None] * plane_of(raw, i, TYPE),)
    return added, minima


@triton.jit
def store_sums(out_ptr, sums, minima, g, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """Write the sum over ROWS of what `add_rows` added up, float32 [WIDTH]."""
    for i in tl.static_range(8):
        total = tl.sum(sums[i], axis=0) * (_lower(TYPE) / _size(i, TYPE))
        if not is_float(TYPE):
            minimum = minima[1] if has_two_scales(TYPE) and i % 2 == 1 else minima[0]
            total -= tl.sum(minimum, axis=0)[:, None]
        column = columns_at(g, i, GROUPS, TYPE)
        tl.store(out_ptr + column, total, mask=(column < WIDTH) & (g < GROUPS)[:, None])


@triton.jit
def store_row(row_ptr, wanted, scale, out_ptr, g, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr):
    """Write scale [1] times the row at `row_ptr` (a pointer [1]) at the columns of the groups g, float32."""
    raw = load_raw(row_ptr, wanted, g, GROUPS, TYPE)
    sums, minima = no_sums(1, g.shape[0])
    sums, minima = add_rows(sums, minima, raw, scale, TYPE)
    store_sums(out_ptr, sums, minima, g, WIDTH, GROUPS, TYPE)
