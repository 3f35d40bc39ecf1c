"""input_sparse_matmul on the CPU core, MANY_TOKENS at a time."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import InputSparse, floats, matrix, pointer, run
from pinfer.kernels.input_sparse_matmul.reference import check_inputs
from pinfer.kernels.sparse_ffn.cpu import MANY_TOKENS
from pinfer.quant import QuantTensor


def input_sparse_matmul(x: torch.Tensor, weight: QuantTensor, threshold: torch.Tensor) -> torch.Tensor:
    check_inputs(x, weight, threshold)
    x, threshold = floats(x), floats(threshold)
    out = torch.empty(x.shape[0], weight.columns)
    for first in range(0, x.shape[0], MANY_TOKENS):
        some, y = x[first : first + MANY_TOKENS], out[first : first + MANY_TOKENS]
        hidden = torch.empty(weight.rows, len(some))
        arguments = InputSparse(
            matrix(weight), pointer(some), len(some), pointer(threshold), pointer(y), pointer(hidden)
        )
        run(arguments, some.numel() * weight.columns, weight.blocks, some, threshold, y, hidden)
    return out
