"""quant_matmul in Triton: a tile of rows a program, one token a grid column."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.dequantize.gpu import weights_at
from pinfer.quant import QuantTensor

# 16 x 256 tiles spill on sm_80 to sm_90 for Q3_K, Q6_K and F32, 8 x 256 for Q5_0 and Q5_1 on sm_80.
BLOCK_N, BLOCK_K = 8, 128


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


def quant_matmul(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    if x.shape[1] != weight.columns:
        raise ValueError(f"x has {x.shape[1]} columns, the weight has {weight.columns}")
    x = x.contiguous()
    out = torch.empty(x.shape[0], weight.rows, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(weight.rows, BLOCK_N), x.shape[0])
    _quant_matmul_kernel[grid](
        x, weight.blocks, weight.blocks.stride(0), out, weight.rows, weight.columns,
        TYPE=weight.type.name, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
    )  # fmt: skip
    return out
