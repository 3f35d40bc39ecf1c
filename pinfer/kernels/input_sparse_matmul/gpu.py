"""input_sparse_matmul in Triton: the rows of the inputs that a token keeps, added up in registers.

The outputs are cut over the grid's first axis, the inputs over its second; each program writes its
part of the outputs and `combine` adds the parts in order, where TEAL adds with atomics in fp16. The
threshold is a mask on the loads, so small inputs' rows are not read. Several tokens share what is
read, on tensor cores (see `tensor_cores`): rows that at least one of them keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, Build
from pinfer.kernels.combine import summed
from pinfer.kernels.input_sparse_matmul.reference import check_inputs
from pinfer.kernels.planes import repack
from pinfer.kernels.tensor_cores import row_sums, row_sums_build
from pinfer.kernels.tiles import add_rows, build_over_rows, groups_of, load_raw, no_sums, store_sums, warps_here
from pinfer.quant import BY_NAME, QuantTensor

BLOCK_G, ROWS, NUM_WARPS = 64, 4, 8  # 2,048 outputs and four inputs at a time, a group of weights a thread
INPUTS_A_PROGRAM, INPUTS_INTERPRETED = 64, 1024  # 4,096 inputs and outputs: 128 programs


@triton.jit
def _input_sparse_kernel(
    x_ptr, weight_ptr, row_stride, threshold_ptr, partial_ptr, inputs, inputs_a_program,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    part = tl.program_id(1).to(tl.int64)
    threshold = tl.load(threshold_ptr)
    sums, minima = no_sums(ROWS, BLOCK_G)
    begin = tl.program_id(1) * inputs_a_program
    end = tl.minimum(begin + inputs_a_program, inputs)
    for first in range(begin, end, ROWS):
        j = first + tl.arange(0, ROWS)
        x = tl.load(x_ptr + j, mask=j < end, other=0.0).to(tl.float32)  # [ROWS]
        kept = tl.where(tl.abs(x) <= threshold, 0, 1)  # NaN is kept
        wanted = (kept != 0) & (j < end)
        raw = load_raw(weight_ptr + j.to(tl.int64) * row_stride, wanted, g, GROUPS, TYPE)
        sums, minima = add_rows(sums, minima, raw, tl.where(wanted, x, 0.0), TYPE)
    store_sums(partial_ptr + part * WIDTH, sums, minima, g, WIDTH, GROUPS, TYPE)


def input_sparse_matmul(x: torch.Tensor, weight: QuantTensor, threshold: torch.Tensor) -> torch.Tensor:
    """As the reference. Weights in blocks are repacked at every call: `repack` them once."""
    check_inputs(x, weight, threshold)
    x, weight = x.contiguous(), repack(weight)
    if x.shape[0] != 1:
        return summed(row_sums(torch.where(x.abs() <= threshold, 0.0, x.float()), weight))
    inputs = x.shape[1]
    some = INPUTS_A_PROGRAM if x.is_cuda else INPUTS_INTERPRETED
    parts, groups = triton.cdiv(inputs, some), groups_of(weight)
    partial = torch.empty(parts, 1, weight.columns, dtype=torch.float32, device=x.device)
    _input_sparse_kernel[(triton.cdiv(groups, BLOCK_G), parts)](
        x, weight.blocks, weight.blocks.stride(0), threshold, partial, inputs, some,
        WIDTH=weight.columns, GROUPS=groups, TYPE=weight.type.name, ROWS=ROWS, BLOCK_G=BLOCK_G,
        num_warps=warps_here(NUM_WARPS), num_stages=1,
    )  # fmt: skip
    return summed(partial)


def builds() -> list[Build]:
    """Every type at 4,096 outputs, and the widest of 7B, 13B and 70B."""
    return [
        *(_build(name, 4096) for name in BY_NAME),
        *(_build("Q4_K", outputs) for outputs in (5120, 11264, 28672)),
        _build("F16", 11008),
        row_sums_build("Q4_K", 4096, listed=False),
    ]


def _build(name: str, outputs: int) -> Build:
    arguments = {"x_ptr": FLOATS, "weight_ptr": BYTES, "row_stride": "i64", "threshold_ptr": FLOATS}
    arguments |= {"partial_ptr": FLOATS, **dict.fromkeys(("inputs", "inputs_a_program"), "i32")}
    constants = {"WIDTH": outputs, "GROUPS": -(-outputs // 32), "TYPE": name, "ROWS": ROWS, "BLOCK_G": BLOCK_G}
    label, strides = f"input_sparse_matmul {name} outputs={outputs}", ("row_stride", "inputs", "inputs_a_program")
    return build_over_rows(label, _input_sparse_kernel, arguments, constants, NUM_WARPS, name, strides=strides)
