"""threshold_matmul on the CPU core: its three steps one after another, each a pass over values in cache."""

from __future__ import annotations

import torch

from pinfer.kernels.glu.cpu import glu
from pinfer.kernels.quant_matmul.cpu import quant_matmul
from pinfer.kernels.select_active.cpu import select_active
from pinfer.kernels.select_active.reference import passes
from pinfer.kernels.threshold_matmul.reference import Thresholded, check_inputs
from pinfer.quant import QuantTensor


def threshold_matmul(
    x: torch.Tensor,
    weight: QuantTensor,
    threshold: torch.Tensor,
    *,
    magnitude_of: str | None = None,
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
    int8: bool = False,
) -> Thresholded:
    check_inputs(x, weight, threshold, magnitude_of, shift, gate_bias, cutoff)
    values = quant_matmul(x, weight, gate_bias, int8=int8)
    scores = values
    if magnitude_of is not None:
        scores = glu(values, activation=magnitude_of, magnitude=True, shift=shift, cutoff=cutoff)
    mask = None if x.shape[0] == 1 else passes(scores, threshold)
    return Thresholded(select_active(scores, threshold), mask, values)
