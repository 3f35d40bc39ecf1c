"""gate_threshold (CATS, Lee et al. 2024): computes the gate and keeps neurons with |act(g · x)| above a threshold.

Works for any activation without training; the threshold is a quantile of |act(g · x)| over a
calibration text, so the sparsity reached elsewhere is near its nominal value and not equal to it.
"""

from __future__ import annotations

import torch

from pinfer.kernels.activation import activate
from pinfer.kernels.ops import quant_matmul, threshold_matmul
from pinfer.predictors.base import Prediction, Predictor
from pinfer.predictors.cuts import Cuts
from pinfer.quant import QuantTensor


class GateThreshold(Predictor):
    """gate: QuantTensor [N, D]; threshold: float32 [1], neurons with |act(g · x)| above it are computed.

    gate_bias: float32 [N] or None, added to the gate product; cutoff: FATReLU's.
    """

    reads_gate = True

    def __init__(
        self,
        gate: QuantTensor,
        activation: str,
        threshold: torch.Tensor,
        cuts: Cuts | None = None,
        *,
        gate_bias: torch.Tensor | None = None,
        cutoff: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_bias, self.cutoff = gate_bias, cutoff
        self.gate, self.activation, self.threshold, self.cuts = gate, activation, threshold, cuts

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        named = threshold_matmul(
            x, self.gate, self.threshold, magnitude_of=self.activation, gate_bias=self.gate_bias, cutoff=self.cutoff
        )
        return Prediction(*named)

    def shard(self, neurons: torch.Tensor) -> GateThreshold:
        bias = None if self.gate_bias is None else self.gate_bias[neurons]
        part = GateThreshold(self.gate[neurons], self.activation, self.threshold, gate_bias=bias, cutoff=self.cutoff)
        part.density = self.density
        return part


def fit_gate_threshold(
    gate: QuantTensor,
    activation: str,
    x: torch.Tensor,
    *,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> GateThreshold:
    """A predictor for inputs like x float32 [T, D] of a calibration text, to be set by `at_density`."""
    one = torch.ones(1, device=gate.device)
    cuts = Cuts.of(activate(activation, quant_matmul(x, gate, gate_bias), cutoff).abs(), 0 * one, one)
    return GateThreshold(gate, activation, cuts.threshold(1.0), cuts, gate_bias=gate_bias, cutoff=cutoff)
