"""Products that skip small inputs: y = Σ over j with |x_j| > t of x_j · w_j (TEAL, Liu et al. 2024), in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.dequantize.reference import dequantize
from pinfer.quant import QuantTensor


def input_sparse_matmul(x: torch.Tensor, weight: QuantTensor, threshold: torch.Tensor) -> torch.Tensor:
    """Multiply tokens by an input-major matrix, leaving out each token's small inputs.

    x:         float [T, inputs].
    weight:    QuantTensor [inputs, outputs]: row j holds what input j adds to every output, so that
               a skipped input is a row that is never read (`transpose_weights` makes it from a file's).
    threshold: float32 [1]; inputs of at most this magnitude are skipped, NaN never is.

    Returns float32 [T, outputs].
    """
    check_inputs(x, weight, threshold)
    kept = torch.where(x.abs() <= threshold, 0.0, x.float())
    return kept @ dequantize(weight)


def check_inputs(x: torch.Tensor, weight: QuantTensor, threshold: torch.Tensor) -> None:
    """ValueError unless the shapes belong together; every implementation calls it."""
    if x.dim() != 2 or x.shape[1] != weight.rows:
        raise ValueError(f"x is {list(x.shape)}, expected [T, {weight.rows}] for input-major {weight!r}")
    check_threshold(threshold)


def check_threshold(threshold: torch.Tensor) -> None:
    """ValueError unless a threshold is one float32."""
    if threshold.numel() != 1 or threshold.dtype != torch.float32:
        raise ValueError(f"threshold is {threshold.dtype} {list(threshold.shape)}, expected torch.float32 [1]")
