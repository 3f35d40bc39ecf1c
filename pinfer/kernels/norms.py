"""Norms of a weight's rows and columns, a few megabytes unpacked at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pinfer.kernels.ops import dequantize
from pinfer.quant import QuantTensor

CHUNK_WEIGHTS = 1 << 20  # unpacked at a time: 4 MB


def row_norms(weight: QuantTensor) -> torch.Tensor:
    """float32 [rows], the Euclidean norm of each row of `weight` [rows, columns]: ‖d_i‖ of `down` by neuron."""
    return torch.cat([piece.norm(dim=1) for piece in _pieces(weight)])


def column_norms(weight: QuantTensor) -> torch.Tensor:
    """float32 [columns], the norm of each column of `weight` [rows, columns]: ‖d_i‖ of `down` as a file stores it."""
    squares = torch.zeros(weight.columns, dtype=torch.float64, device=weight.device)
    for piece in _pieces(weight):
        squares += piece.square().sum(0, dtype=torch.float64)
    return squares.sqrt().float()


def _pieces(weight: QuantTensor) -> Iterator[torch.Tensor]:
    step = max(1, CHUNK_WEIGHTS // weight.columns)
    return (dequantize(weight[start : start + step]) for start in range(0, weight.rows, step))
