"""quant_matmul in Triton: x stays in registers while a program goes through its rows.

A row longer than a program holds is cut in even parts over the grid's second axis, and `combine` adds
the parts in order. Several tokens are multiplied on tensor cores, up to 16 for each reading of the
weights (see `tensor_cores`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, Build
from pinfer.kernels.combine import summed
from pinfer.kernels.planes import repack
from pinfer.kernels.quant_matmul.reference import check_inputs
from pinfer.kernels.rounding import rounded_for
from pinfer.kernels.tensor_cores import products, products_build
from pinfer.kernels.tiles import build_over_rows, dots, groups_of, load_raw, load_x, rows_and_warps, sums_of, warps_here
from pinfer.kernels.tuning import launch_for
from pinfer.quant import BY_NAME, QuantTensor

LARGEST_PART = 256  # groups of 32 weights: x takes 32 registers of each of 256 threads
ROWS_INTERPRETED = 256  # each program costs the interpreter 0.3 ms


@dataclass(frozen=True)
class Launch:
    """How the rows are cut: parts of a row, groups in each, rows at a time, warps, rows of a program."""

    parts: int
    block_g: int
    rows: int
    num_warps: int
    rows_a_program: int = 32  # 74 KB of Q4_K at 4,096 columns beside 16 KB of x; 11,008 rows make 344 programs

    @classmethod
    def of(cls, columns: int) -> Launch:
        """The fewest parts with at most a fifth of the lanes idle, or the least idle of up to eight parts."""
        groups = -(-columns // 32)
        least = -(-groups // LARGEST_PART)
        idle = {
            parts: parts * triton.next_power_of_2(-(-groups // parts)) / groups for parts in range(least, least + 8)
        }
        parts = next((parts for parts, lanes in idle.items() if lanes <= 1.25), min(idle, key=lambda p: idle[p]))
        if groups <= 64:  # a short row: another launch would cost more than idle lanes
            parts = 1
        block_g = triton.next_power_of_2(-(-groups // parts))
        return cls(parts, block_g, *rows_and_warps(block_g))

    @classmethod
    def variants(cls, columns: int) -> Iterator[Launch]:
        """What `tuning` tries."""
        default = cls.of(columns)
        for rows in {max(1, default.rows // 2), default.rows, 2 * default.rows}:
            num_warps = max(1, rows * default.block_g // 32)
            yield from (replace(default, rows=rows, num_warps=num_warps, rows_a_program=n) for n in (16, 32, 64, 128))


@triton.jit
def _quant_matmul_kernel(
    x_ptr, weight_ptr, row_stride, out_ptr, rows, rows_a_program, bias_ptr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    g = part * BLOCK_G + tl.arange(0, BLOCK_G)
    x = load_x(x_ptr, g, WIDTH, GROUPS, TYPE)
    x_sums = sums_of(x, TYPE)
    out_ptr += part.to(tl.int64) * rows
    begin = tl.program_id(0) * rows_a_program
    end = tl.minimum(begin + rows_a_program, rows)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        wanted = row < end
        raw = load_raw(weight_ptr + row.to(tl.int64) * row_stride, wanted, g, GROUPS, TYPE)
        if HAS_BIAS:  # the first part of a row brings it
            bias = tl.load(bias_ptr + row, mask=wanted & (part == 0), other=0.0)
            tl.store(out_ptr + row, dots(raw, x, x_sums, TYPE) + bias, mask=wanted)
        else:
            tl.store(out_ptr + row, dots(raw, x, x_sums, TYPE), mask=wanted)


def quant_matmul(
    x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None, *, int8: bool = False
) -> torch.Tensor:
    """As the reference. Weights in blocks are repacked at every call: `repack` them once."""
    check_inputs(x, weight, bias)
    x = (rounded_for(x.float(), weight) if int8 else x).contiguous()
    weight = repack(weight)
    if x.shape[0] != 1:
        out = summed(products(x, [weight])[0])
        return out if bias is None else out + bias
    launch = launch_for(
        "quant_matmul", x.device, Launch.of(weight.columns), candidates=lambda: Launch.variants(weight.columns),
        rows=weight.rows, columns=weight.columns, type=weight.type.name,
    )  # fmt: skip
    rows_a_program = launch.rows_a_program if x.is_cuda else ROWS_INTERPRETED
    out = torch.empty(launch.parts, 1, weight.rows, dtype=torch.float32, device=x.device)
    _quant_matmul_kernel[(triton.cdiv(weight.rows, rows_a_program), launch.parts)](
        x, weight.blocks, weight.blocks.stride(0), out, weight.rows, rows_a_program,
        x if bias is None else bias.contiguous(),
        WIDTH=weight.columns, GROUPS=groups_of(weight), TYPE=weight.type.name, HAS_BIAS=bias is not None,
        ROWS=launch.rows, BLOCK_G=launch.block_g, num_warps=warps_here(launch.num_warps), num_stages=1,
    )  # fmt: skip
    return summed(out)


def builds() -> list[Build]:
    """Every type at 7B's width; the dense down of 7B, 13B, 70B and Llama-3-8B, whose rows are cut."""
    return [
        *(_build(name, 4096) for name in BY_NAME),
        *(_build("Q4_K", columns) for columns in (640, 5120, 8192, 11008, 13824, 14336, 28672)),
        *(_build("Q8_0", columns) for columns in (128, 1024, 8192)),
        *(_build(name, 8192) for name in ("F16", "BF16", "Q6_K")),
        *(_build("Q8_0", columns, biased=True) for columns in (1024, 8192, 16_384)),
        _build("F16", 4096, biased=True),
        products_build("Q4_K", 28672, listed=False),
    ]


def _build(name: str, columns: int, biased: bool = False) -> Build:
    arguments = {
        **dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr"), FLOATS), "weight_ptr": BYTES, "row_stride": "i64",
    }  # fmt: skip
    arguments |= dict.fromkeys(("rows", "rows_a_program"), "i32")
    launch = Launch.of(columns)
    constants = {
        "WIDTH": columns, "GROUPS": -(-columns // 32), "TYPE": name, "HAS_BIAS": biased, "ROWS": launch.rows,
        "BLOCK_G": launch.block_g,
    }  # fmt: skip
    strides = ("row_stride", "rows", "rows_a_program")
    label = f"quant_matmul {name} columns={columns}{' + bias' if biased else ''}"
    return build_over_rows(label, _quant_matmul_kernel, arguments, constants, launch.num_warps, name, strides=strides)
