"""exact: computes the whole gate and skips the neurons whose activation is zero. Skips nothing that counts, for ReLU models."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import ZERO_BELOW_ZERO, check_activation
from pinfer.kernels.ops import threshold_matmul
from pinfer.predictors.base import Prediction, Predictor
from pinfer.quant import QuantTensor


class ExactPredictor(Predictor):
    """gate: QuantTensor [N, D]; gate_bias: float32 [N] or None, added to the gate product; cutoff: FATReLU's.

    ValueError unless the activation is exactly zero for negative inputs, and for a cutoff it cannot have.
    """

    reads_gate = True

    def __init__(
        self, gate: QuantTensor, activation: str, gate_bias: torch.Tensor | None = None, cutoff: float = 0.0
    ) -> None:
        super().__init__()
        if activation not in ZERO_BELOW_ZERO:
            raise ValueError(
                f"the exact predictor needs a ReLU model; this one's activation is {activation}: try gate_threshold"
            )
        check_activation(activation, cutoff)
        self.gate, self.activation, self.gate_bias, self.cutoff = gate, activation, gate_bias, cutoff
        self.threshold = torch.full((1,), float(cutoff), device=gate.device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        return Prediction(*threshold_matmul(x, self.gate, self.threshold, gate_bias=self.gate_bias))

    def shard(self, neurons: torch.Tensor) -> ExactPredictor:
        bias = None if self.gate_bias is None else self.gate_bias[neurons]
        return ExactPredictor(self.gate[neurons], self.activation, bias, self.cutoff)
