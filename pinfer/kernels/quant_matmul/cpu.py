"""quant_matmul on the CPU core; many float32 tokens go through torch's GEMM."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import Matmul, aligned, floats, matrix, pointer, run, scratch
from pinfer.kernels.dequantize.cpu import dequantize
from pinfer.kernels.quant_matmul.reference import check_inputs
from pinfer.quant import QuantTensor

# In float32, unpacking a row costs about as much as eight dot products with it; past this many
# tokens torch's GEMM over unpacked rows wins.
GEMM_FROM_TOKENS = 12
# Weights unpacked at a time for GEMM: 16 MB of floats, so that no model is ever expanded whole.
GEMM_CHUNK_WEIGHTS = 4 * 1024 * 1024


def quant_matmul(
    x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None, *, int8: bool = False
) -> torch.Tensor:
    check_inputs(x, weight, bias)
    x, bias = floats(x), None if bias is None else floats(bias)
    tokens = x.shape[0]
    out = torch.empty(tokens, weight.rows)
    int8 = int8 and weight.type.block_size > 1
    if tokens >= GEMM_FROM_TOKENS and not int8:
        return _through_gemm(x, weight, bias, out)
    memory = scratch(tokens, weight.columns) if int8 else None
    arguments = Matmul(
        matrix(weight),
        pointer(x),
        tokens,
        int8,
        pointer(bias),
        pointer(out),
        None if memory is None else aligned(memory),
    )
    run(arguments, x.numel() * weight.rows, weight.blocks, x, bias, out, memory)
    return out


def _through_gemm(x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    chunk = max(1, GEMM_CHUNK_WEIGHTS // weight.columns)
    for first in range(0, weight.rows, chunk):
        out[:, first : first + chunk] = x @ dequantize(weight[first : first + chunk]).T
    return out if bias is None else out.add_(bias)
