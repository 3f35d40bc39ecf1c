"""quant_matmul on the CPU core: row by row for a few tokens, through GEMM for many."""

from __future__ import annotations

import ctypes

import torch

from pinfer.kernels.cpp.binding import floats, matrix, pointer, threads
from pinfer.kernels.cpp.build import load_core
from pinfer.kernels.dequantize.cpu import dequantize
from pinfer.kernels.quant_matmul.reference import check_inputs
from pinfer.quant import QuantTensor

# Unpacking a row costs about as much as eight dot products with it; past this many tokens
# torch's GEMM over unpacked rows wins.
GEMM_FROM_TOKENS = 12
# Weights unpacked at a time for GEMM: 16 MB of floats, so that no model is ever expanded whole.
GEMM_CHUNK_WEIGHTS = 4 * 1024 * 1024


def quant_matmul(x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
    check_inputs(x, weight)
    x = floats(x)
    out = torch.empty(x.shape[0], weight.rows)
    if x.shape[0] < GEMM_FROM_TOKENS:
        load_core().pinfer_matmul(
            ctypes.byref(matrix(weight)), pointer(x), ctypes.c_int64(x.shape[0]), pointer(out),
            threads(x.numel() * weight.rows),
        )  # fmt: skip
        return out
    chunk = max(1, GEMM_CHUNK_WEIGHTS // weight.columns)
    for first in range(0, weight.rows, chunk):
        out[:, first : first + chunk] = x @ dequantize(weight[first : first + chunk]).T
    return out
