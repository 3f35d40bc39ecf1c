"""gate_threshold (CATS, Lee et al. 2024): computes the gate and keeps neurons with |act(g · x)| above a threshold.

Works for any activation without training; the threshold is a quantile of |act(g · x)| over a
calibration text, so the sparsity reached elsewhere is near its nominal value and not equal to it.
"""

from __future__ import annotations

import torch

from pinfer.kernels.activation import activate
from pinfer.kernels.ops import quant_matmul, threshold_matmul
from pinfer.predictors.base import Prediction, Predictor
from pinfer.quant import QuantTensor

KEEP_ALL = -1.0  # no |act| is below it


class GateThreshold(Predictor):
    """gate: QuantTensor [N, D]; threshold: neurons with |act(g · x)| above it are computed (KEEP_ALL: every neuron)."""

    def __init__(self, gate: QuantTensor, activation: str, threshold: float) -> None:
        super().__init__()
        self.gate = gate
        self.activation = activation
        self.threshold = torch.tensor([threshold], dtype=torch.float32, device=gate.device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        return Prediction(*threshold_matmul(x, self.gate, self.threshold, magnitude_of=self.activation))

    def shard(self, neurons: torch.Tensor) -> GateThreshold:
        return GateThreshold(self.gate[neurons], self.activation, float(self.threshold))


def gate_threshold_for(x: torch.Tensor, gate: QuantTensor, activation: str, sparsity: float) -> float:
    """The threshold that skips a share `sparsity` of neurons over the tokens x [T, D] of a calibration text."""
    if sparsity == 0:
        return KEEP_ALL
    sizes = activate(activation, quant_matmul(x, gate)).abs().flatten()
    rank = max(1, round(sparsity * sizes.numel()))
    return float(sizes.kthvalue(rank).values)
