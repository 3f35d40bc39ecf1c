"""exact: computes the whole gate and skips the neurons whose activation is zero. Skips nothing that counts, for ReLU models."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import ZERO_BELOW_ZERO
from pinfer.kernels.ops import threshold_matmul
from pinfer.predictors.base import Prediction, Predictor
from pinfer.quant import QuantTensor


class ExactPredictor(Predictor):
    """gate: QuantTensor [N, D]. ValueError unless the activation is exactly zero for negative inputs."""

    reads_gate = True

    def __init__(self, gate: QuantTensor, activation: str) -> None:
        super().__init__()
        if activation not in ZERO_BELOW_ZERO:
            raise ValueError(
                f"the exact predictor needs a ReLU model; this one's activation is {activation}: try gate_threshold"
            )
        self.gate = gate
        self.activation = activation
        self.threshold = torch.zeros(1, device=gate.device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        return Prediction(*threshold_matmul(x, self.gate, self.threshold))

    def shard(self, neurons: torch.Tensor) -> ExactPredictor:
        return ExactPredictor(self.gate[neurons], self.activation)
