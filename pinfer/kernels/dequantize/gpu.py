"""dequantize in Triton: a row of the planes layout, some groups of 32 weights a program, to float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, Build
from pinfer.kernels.planes import repack
from pinfer.kernels.tiles import groups_of, store_row
from pinfer.quant import BY_NAME, QuantTensor

BLOCK_G, NUM_WARPS = 32, 1  # a group a thread


@triton.jit
def _dequantize_kernel(
    weight_ptr, row_stride, out_ptr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    out_ptr += tl.program_id(0).to(tl.int64) * WIDTH
    one = tl.full([1], 1.0, tl.float32)
    store_row(weight_ptr + row * row_stride, row >= 0, one, out_ptr, g, WIDTH, GROUPS, TYPE)


def dequantize(weight: QuantTensor) -> torch.Tensor:
    """As the reference. Weights in blocks are repacked at every call: `repack` them once."""
    weight = repack(weight)
    out = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    groups = groups_of(weight)
    _dequantize_kernel[(weight.rows, triton.cdiv(groups, BLOCK_G))](
        weight.blocks, weight.blocks.stride(0), out,
        WIDTH=weight.columns, GROUPS=groups, TYPE=weight.type.name, BLOCK_G=BLOCK_G, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    arguments = {"weight_ptr": BYTES, "row_stride": "i64", "out_ptr": FLOATS}
    return [
        Build(
            f"dequantize {name}", _dequantize_kernel, arguments,
            {"WIDTH": 4096, "GROUPS": 128, "TYPE": name, "BLOCK_G": BLOCK_G}, NUM_WARPS, multiples_of_16=("row_stride",),
        )
        for name in BY_NAME
    ]  # fmt: skip
