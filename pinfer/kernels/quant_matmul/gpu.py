"""quant_matmul in Triton: a tile of rows a program, one token a grid column."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, Build
from pinfer.kernels.dequantize.gpu import weights_at
from pinfer.kernels.quant_matmul.reference import check_inputs
from pinfer.kernels.rounding import rounded_for
from pinfer.quant import BY_NAME, QuantTensor

# 16 x 256 tiles spill on sm_80 to sm_90 for Q3_K, Q6_K and F32, 8 x 256 for Q5_0 and Q5_1 on sm_80.
BLOCK_N, BLOCK_K, NUM_WARPS = 8, 128, 4


@triton.jit
def _quant_matmul_kernel(
    x_ptr,
    blocks_ptr,
    row_stride,
    out_ptr,
    rows,
    columns,
    TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1).to(tl.int64)
    row_ptr = blocks_ptr + row.to(tl.int64)[:, None] * row_stride
    sums = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, columns, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + token * columns + column, mask=column < columns, other=0.0).to(tl.float32)  # [BLOCK_K]
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        weight = weights_at(row_ptr, column[None, :], mask, TYPE)  # [BLOCK_N, BLOCK_K]
        sums += tl.sum(weight * x[None, :], axis=1)
    tl.store(out_ptr + token * rows + row, sums, mask=row < rows)


def quant_matmul(x: torch.Tensor, weight: QuantTensor, *, int8: bool = False) -> torch.Tensor:
    check_inputs(x, weight)
    x = (rounded_for(x.float(), weight) if int8 else x).contiguous()
    out = torch.empty(x.shape[0], weight.rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(weight.rows, BLOCK_N), x.shape[0])
    _quant_matmul_kernel[grid](
        x, weight.blocks, weight.blocks.stride(0), out, weight.rows, weight.columns,
        TYPE=weight.type.name, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    arguments = {"x_ptr": FLOATS, "blocks_ptr": BYTES, "row_stride": "i64", "out_ptr": FLOATS}
    arguments |= {"rows": "i32", "columns": "i32"}
    return [
        Build(
            f"quant_matmul {name}",
            _quant_matmul_kernel,
            arguments,
            {"TYPE": name, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
            NUM_WARPS,
        )
        for name in BY_NAME
    ]
