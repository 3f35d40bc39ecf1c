"""Rows in planes against up to 16 tokens at once, on tensor cores: each row is read once for all of them.

    products(x, weights, active)   x · row for every listed row        [matrices, parts, T, N]
    row_sums(h, weight, active)    Σ over listed rows of h · row       [splits, T, D]

Tensor cores multiply bfloat16, so a float32 number goes in as two: the nearest bfloat16 and what is
left, rounded as well, some 17 bits together (Henry, Tang and Heinecke 2019). Three of the four
products are added up; low · low is below the rounding. The error is some 4e-6 of the factors' norms,
where one conversion to half precision leaves 3e-4, and bfloat16 has float32's range, so outliers in
x need no care. An infinite factor gives NaN. Every tile is summed from zero and then added in
float32: tensor cores cut sums off instead of rounding them, which adds up over a long chain.

Columns of results go by place in the list, not by neuron: column k belongs to the k-th listed row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, INTS, Build, interpreting
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.tiles import (
    build_over_rows,
    flat_columns_at,
    groups_of,
    is_exact_in_bfloat16,
    load_raw,
    scaled_plane,
    tile_size,
    warps_here,
)
from pinfer.kernels.tuning import launch_for
from pinfer.quant import QuantTensor

TOKENS = 16  # of a tile: what tensor cores take at least
FILLING = 512  # programs: what is beyond them, written in parts and read again, costs more than idle processors
PROGRAMS_INTERPRETED = 2  # without a device: few, as each costs the interpreter 0.3 ms
INTERPRETED = tl.constexpr(interpreting())


@dataclass(frozen=True)
class ProductsLaunch:
    """A tile's rows, its groups of 32 weights, warps, and the groups of a row that a program takes in all."""

    rows: int = 64
    block_g: int = 4
    num_warps: int = 8
    part_g: int = 32

    @classmethod
    def of(cls, types: Sequence[str], groups: int, row_tokens: int) -> ProductsLaunch:
        """Whole rows where rows times tiles of tokens fill a GPU, parts of them where they do not.

        A thread takes a group of weights, half a group of float32: what fits 128 registers everywhere.
        """
        part_g = max(32, triton.next_power_of_2(groups)) if row_tokens >= FILLING * 64 else 32
        return cls(num_warps=16 if "F32" in types else 8, part_g=part_g)

    @classmethod
    def variants(cls) -> Iterator[ProductsLaunch]:
        """What `tuning` tries."""
        for rows, num_warps, part_g in product((32, 64, 128), (4, 8, 16), (16, 32, 64, 128)):
            yield cls(rows=rows, num_warps=num_warps, part_g=part_g)


@dataclass(frozen=True)
class RowSumsLaunch:
    """A tile's rows, its groups of 32 weights, warps, and the shares that a list is cut into."""

    rows: int = 16
    block_g: int = 16
    num_warps: int = 8
    splits: int = 16

    @classmethod
    def of(cls, group_tokens: int) -> RowSumsLaunch:
        """Fewer shares of the list where groups times tiles of tokens fill a GPU."""
        return cls(splits=max(1, min(16, FILLING * 16 // max(1, group_tokens))))

    @classmethod
    def variants(cls) -> Iterator[RowSumsLaunch]:
        """What `tuning` tries."""
        for rows, block_g, splits in product((16, 32), (8, 16), (4, 8, 16, 32)):
            yield cls(rows=rows, block_g=block_g, num_warps=block_g // 2, splits=splits)


@triton.jit
def _nearest(v):
    """v rounded to bfloat16, as float32. A NaN may come out as a number."""
    bits = v.to(tl.uint32, bitcast=True)
    return ((bits + 0x8000) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _stored(v):
    """v, rounded before or soon to be, as tensor cores take it; as float32 in the interpreter, which knows no bfloat16."""
    if INTERPRETED:
        return tl.where(v == v, _nearest(v), v)
    else:
        return v.to(tl.bfloat16)


@triton.jit
def _halves(v, EXACT: tl.constexpr):
    """Two tiles that add up to v, the second one unused where v holds bfloat16 numbers; a NaN is in the last one used."""
    if EXACT:
        high = _stored(v)
        return high, high
    else:
        high = _nearest(v)
        return _stored(high), _stored(v - high)


@triton.jit
def _dot(a, b, acc, A_EXACT: tl.constexpr, B_EXACT: tl.constexpr):
    """acc + a · b for tiles of float32; EXACT says that one holds bfloat16 numbers only."""
    a_high, a_low = _halves(a, A_EXACT)
    b_high, b_low = _halves(b, B_EXACT)
    if not A_EXACT:
        acc = tl.dot(a_low, b_high, acc)
    if not B_EXACT:
        acc = tl.dot(a_high, b_low, acc)
    return tl.dot(a_high, b_high, acc)


@triton.jit
def _products_kernel(
    x_ptr, weight_ptr, row_stride, second_ptr, second_stride, indices_ptr, count_ptr, out_ptr, tokens, rows, parts,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr, LISTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_G: tl.constexpr, PART_G: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1) % parts
    if tl.program_id(1) >= parts:
        weight_ptr = second_ptr
        row_stride = second_stride
    t = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[None, :]
    out_ptr += tl.program_id(1).to(tl.int64) * tokens * rows
    count = rows
    if LISTED:
        count = tl.load(count_ptr)
    for first in range(tl.program_id(0) * ROWS, count, tl.num_programs(0) * ROWS):
        k = first + tl.arange(0, ROWS)
        wanted = k < count
        n = k.to(tl.int64)
        if LISTED:
            n = tl.load(indices_ptr + k, mask=wanted, other=0).to(tl.int64)
        acc = tl.zeros([ROWS, TOKENS], tl.float32)
        for c in range(0, PART_G, BLOCK_G):
            g = part * PART_G + c + tl.arange(0, BLOCK_G)
            raw = load_raw(weight_ptr + n * row_stride, wanted, g, GROUPS, TYPE)
            tile = tl.zeros([ROWS, TOKENS], tl.float32)
            for i in tl.static_range(8):
                row = tl.reshape(scaled_plane(raw, i, TYPE), [ROWS, 4 * BLOCK_G])
                column, inside = flat_columns_at(g, i, WIDTH, GROUPS, TYPE)
                x = tl.load(x_ptr + t * WIDTH + column[:, None], mask=inside[:, None] & (t < tokens), other=0.0)
                x = x.to(tl.float32) * tile_size(i, TYPE)  # [4 * BLOCK_G, TOKENS]
                tile = _dot(row, x, tile, is_exact_in_bfloat16(TYPE), False)
            acc += tile
        tl.store(out_ptr + t * rows + k[:, None], acc, mask=wanted[:, None] & (t < tokens))


@triton.jit
def _row_sums_kernel(
    h_ptr, weight_ptr, row_stride, indices_ptr, count_ptr, out_ptr, tokens, rows,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr, LISTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_G: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    split, splits = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    t = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    count = tl.zeros([], tl.int64) + rows
    if LISTED:
        count = tl.load(count_ptr).to(tl.int64)
    sums = ()
    for _ in tl.static_range(8):
        sums = sums + (tl.zeros([TOKENS, 4 * BLOCK_G], tl.float32),)
    last = (count * (split + 1) // splits).to(tl.int32)
    for first in range((count * split // splits).to(tl.int32), last, ROWS):
        k = first + tl.arange(0, ROWS)
        h = tl.load(h_ptr + t * rows + k[None, :], mask=(t < tokens) & (k < last)[None, :], other=0.0)  # [TOKENS, ROWS]
        wanted = tl.max(tl.where(h == 0.0, 0, 1), axis=0) != 0  # a row that no token uses is not read
        n = k.to(tl.int64)
        if LISTED:
            n = tl.load(indices_ptr + k, mask=wanted, other=0).to(tl.int64)
        raw = load_raw(weight_ptr + n * row_stride, wanted, g, GROUPS, TYPE)
        added = ()
        for i in tl.static_range(8):
            row = tl.reshape(scaled_plane(raw, i, TYPE), [ROWS, 4 * BLOCK_G])
            tile = _dot(h, row, tl.zeros([TOKENS, 4 * BLOCK_G], tl.float32), False, is_exact_in_bfloat16(TYPE))
            added = added + (sums[i] + tile,)
        sums = added
    for i in tl.static_range(8):
        column, inside = flat_columns_at(g, i, WIDTH, GROUPS, TYPE)
        total = sums[i] * tile_size(i, TYPE)
        tl.store(out_ptr + (split * tokens + t) * WIDTH + column[None, :], total, mask=inside[None, :] & (t < tokens))


def products(x: torch.Tensor, weights: Sequence[QuantTensor], active: Active | None = None) -> torch.Tensor:
    """x float [T, D] times the listed rows of one or two matrices [N, D] in planes, all rows without a list.

    Returns float32 [matrices, parts, T, N]: the sum over parts is the product; columns beyond the
    list's count are undefined.
    """
    first, (tokens, groups, token_tiles) = weights[0], _sizes(x, weights[0])
    types = tuple(dict.fromkeys(weight.type.name for weight in weights))
    launch = launch_for(
        "products", x.device, ProductsLaunch.of(types, groups, token_tiles * first.rows * len(weights)),
        candidates=ProductsLaunch.variants,
        rows=first.rows, columns=first.columns, types=" ".join(types), matrices=len(weights),
        listed=active is not None, token_tiles=token_tiles,
    )  # fmt: skip
    parts = triton.cdiv(groups, launch.part_g)
    out = torch.empty(len(weights), parts, tokens, first.rows, dtype=torch.float32, device=x.device)
    row_tiles = triton.cdiv(first.rows, launch.rows) if x.is_cuda else PROGRAMS_INTERPRETED
    # Matrices of one type in one launch, of two in two.
    shares = [(weights, out)] if len(types) == 1 else [([weight], out[at:]) for at, weight in enumerate(weights)]
    for share, into in shares:
        _products_kernel[(row_tiles, len(share) * parts, token_tiles)](
            x.contiguous(), share[0].blocks, share[0].blocks.stride(0), share[-1].blocks, share[-1].blocks.stride(0),
            *_list_or(active, first.blocks), into, tokens, first.rows, parts,
            WIDTH=first.columns, GROUPS=groups, TYPE=share[0].type.name, LISTED=active is not None,
            ROWS=launch.rows, BLOCK_G=launch.block_g, PART_G=_part_g(launch, groups), TOKENS=TOKENS,
            num_warps=warps_here(launch.num_warps), num_stages=1,
        )  # fmt: skip
    return out


def row_sums(h: torch.Tensor, weight: QuantTensor, active: Active | None = None) -> torch.Tensor:
    """Σ over k of h[:, k] times the k-th listed row of a matrix [N, D] in planes, or its k-th row without a list.

    h is float32 [T, N], its columns beyond the list's count not read; rows whose h is 0 for all of 16
    tokens are not read either. Returns float32 [splits, T, D], of which the sum is the result.
    """
    tokens, groups, token_tiles = _sizes(h, weight)
    launch = launch_for(
        "row_sums", h.device, RowSumsLaunch.of(token_tiles * groups), candidates=RowSumsLaunch.variants,
        rows=weight.rows, columns=weight.columns, type=weight.type.name,
        listed=active is not None, token_tiles=token_tiles,
    )  # fmt: skip
    splits = launch.splits if h.is_cuda else PROGRAMS_INTERPRETED
    out = torch.empty(splits, tokens, weight.columns, dtype=torch.float32, device=h.device)
    _row_sums_kernel[(triton.cdiv(groups, launch.block_g), splits, token_tiles)](
        h.contiguous(), weight.blocks, weight.blocks.stride(0), *_list_or(active, weight.blocks), out,
        tokens, weight.rows,
        WIDTH=weight.columns, GROUPS=groups, TYPE=weight.type.name, LISTED=active is not None,
        ROWS=launch.rows, BLOCK_G=launch.block_g, TOKENS=TOKENS,
        num_warps=warps_here(launch.num_warps), num_stages=1,
    )  # fmt: skip
    return out


def _sizes(x: torch.Tensor, weight: QuantTensor) -> tuple[int, int, int]:
    """Tokens, groups of 32 weights in a row, tiles of tokens."""
    return x.shape[0], groups_of(weight), triton.cdiv(x.shape[0], TOKENS)


def _list_or(active: Active | None, stand_in: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The list's tensors; without a list, a pointer that no kernel follows."""
    return (stand_in, stand_in) if active is None else (active.indices, active.count)


def _part_g(launch: ProductsLaunch, groups: int) -> int:
    """The groups a program takes: no more tiles than a short row has."""
    return min(launch.part_g, triton.cdiv(groups, launch.block_g) * launch.block_g)


def products_build(name: str, columns: int, *, listed: bool) -> Build:
    """What `products` launches for rows of this type and length."""
    arguments = {
        **dict.fromkeys(("x_ptr", "out_ptr"), FLOATS), **dict.fromkeys(("weight_ptr", "second_ptr"), BYTES),
        **dict.fromkeys(("indices_ptr", "count_ptr"), INTS if listed else BYTES),
        **dict.fromkeys(("row_stride", "second_stride"), "i64"),
        **dict.fromkeys(("tokens", "rows", "parts"), "i32"),
    }  # fmt: skip
    groups = -(-columns // 32)
    launch = ProductsLaunch.of([name], groups, 1)
    share = 0.0 if name == "F32" else 0.45  # half a group of float32 a thread: loads of 8 bytes
    more, strides = {"PART_G": _part_g(launch, groups)}, ("row_stride", "second_stride", "rows")
    return _build("products", _products_kernel, name, columns, listed, launch, arguments, more, strides, share)


def row_sums_build(name: str, columns: int, *, listed: bool) -> Build:
    """What `row_sums` launches for rows of this type and length."""
    arguments = {
        **dict.fromkeys(("h_ptr", "out_ptr"), FLOATS), "weight_ptr": BYTES,
        **dict.fromkeys(("indices_ptr", "count_ptr"), INTS if listed else BYTES), "row_stride": "i64",
        **dict.fromkeys(("tokens", "rows"), "i32"),
    }  # fmt: skip
    strides = ("row_stride", "rows")
    return _build("row_sums", _row_sums_kernel, name, columns, listed, RowSumsLaunch(), arguments, {}, strides, 0.8)


def _build(
    kernel_name: str,
    kernel: Any,
    name: str,
    columns: int,
    listed: bool,
    launch: ProductsLaunch | RowSumsLaunch,
    arguments: dict[str, str],
    more: dict[str, int],
    strides: tuple[str, ...],
    rows_share: float,
) -> Build:
    constants = {
        "WIDTH": columns, "GROUPS": -(-columns // 32), "TYPE": name, "LISTED": listed,
        "ROWS": launch.rows, "BLOCK_G": launch.block_g, "TOKENS": TOKENS, **more,
    }  # fmt: skip
    label = f"{kernel_name} {name} columns={columns} {'listed' if listed else 'all'}"
    return build_over_rows(
        label, kernel, arguments, constants, launch.num_warps, name, strides=strides, rows_share=rows_share
    )
