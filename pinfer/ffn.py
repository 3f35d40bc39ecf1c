"""The FFN blocks of a model, interchangeable: `ffn(x, residual) -> y`.

y = Σ_i act(g_i · x)(u_i · x) d_i over the neurons i. DenseFFN computes all of them, SparseFFN the
ones its predictor names, HybridFFN adds a hot and a cold shard: any split of the neurons, over
skips or over devices, is exact for the neurons it keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from pinfer.kernels.activation import activate
from pinfer.kernels.ops import quant_matmul, sparse_ffn
from pinfer.predictors import Prediction, Predictor
from pinfer.quant import QuantTensor


@dataclass(frozen=True)
class FFNWeights:
    """Neuron-major weights: row i of each [N, D] matrix belongs to neuron i.

    `down` is transposed from the file, at a relative RMS error of `down_error` where it had to be
    requantised. An ungated FFN has its up matrix as `gate` and no `up`.
    """

    gate: QuantTensor
    up: QuantTensor | None
    down: QuantTensor
    down_error: float = 0.0

    def __post_init__(self) -> None:
        for name in ("up", "down"):
            weight = getattr(self, name)
            if weight is not None and weight.shape != self.gate.shape:
                raise ValueError(f"{name} is {weight.shape}, expected gate's {self.gate.shape} (neurons, width)")

    @property
    def n_neurons(self) -> int:
        return self.gate.rows

    def shard(self, neurons: torch.Tensor) -> FFNWeights:
        """Some of the neurons (int64 [H]), numbered in that order; copies their rows."""
        up = None if self.up is None else self.up[neurons]
        return FFNWeights(self.gate[neurons], up, self.down[neurons], self.down_error)


@dataclass
class Activity:
    """How many neurons were computed: `active` float64 [1], on the device, over `tokens` tokens."""

    n_neurons: int
    tokens: int = 0
    active: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def record(self, prediction: Prediction, tokens: int) -> None:
        counted = prediction.active.count if prediction.mask is None else prediction.mask.sum()
        self.active = self.active.to(counted.device) + counted
        self.tokens += tokens

    def reset(self) -> None:
        self.tokens = 0
        self.active = torch.zeros_like(self.active)

    @property
    def density(self) -> float:
        """Active over total neurons; 1 before any token."""
        return float(self.active) / (self.tokens * self.n_neurons) if self.tokens else 1.0


class DenseFFN(nn.Module):
    """Every neuron. gate, up: QuantTensor [N, D]; down: [D, N] as the file has it; up may be None."""

    def __init__(self, gate: QuantTensor, up: QuantTensor | None, down: QuantTensor, activation: str) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """x, residual: float32 [T, D]; returns float32 [T, D]."""
        hidden = activate(self.activation, quant_matmul(x, self.gate))
        if self.up is not None:
            hidden = hidden * quant_matmul(x, self.up)
        return quant_matmul(hidden, self.down)


class SparseFFN(nn.Module):
    """The neurons its predictor names, on one device."""

    def __init__(self, weights: FFNWeights, predictor: Predictor, activation: str) -> None:
        super().__init__()
        self.weights, self.predictor, self.activation = weights, predictor, activation
        self.activity = Activity(weights.n_neurons)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        prediction: Prediction = self.predictor(x, residual)
        self.activity.record(prediction, x.shape[0])
        return sparse_ffn(
            x,
            self.weights.gate,
            self.weights.up,
            self.weights.down,
            prediction.active,
            activation=self.activation,
            mask=prediction.mask,
            gate_values=prediction.gate_values,
        )

    def shard(self, neurons: torch.Tensor) -> SparseFFN:
        return SparseFFN(self.weights.shard(neurons), self.predictor.shard(neurons), self.activation)


class HybridFFN(nn.Module):
    """A hot and a cold shard, each with its part of the predictor, added. Both are on the CPU so far."""

    def __init__(self, hot: SparseFFN, cold: SparseFFN) -> None:
        super().__init__()
        self.hot, self.cold = hot, cold

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return self.hot(x, residual) + self.cold(x, residual)
