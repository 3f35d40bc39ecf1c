"""The FFN blocks of a model, interchangeable: `ffn(x, residual, opens=False) -> y`.

y = Σ_i act(g_i · x)(u_i · x) d_i over the neurons i, u_i · x clamped at 0 under dReLU. DenseFFN
computes all of them, SparseFFN the ones its predictor names, HybridFFN adds a hot and a cold shard:
any split of the neurons, over skips or over devices, is exact for the neurons it keeps. `opens` says
that x's first row is the first token of its sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pinfer.kernels.ops import add, glu, quant_matmul, sparse_ffn, tally
from pinfer.kernels.select_active import Active
from pinfer.kernels.tuning import expect_density
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


class Activity:
    """How many neurons were computed. `totals` int64 [2], on the device: (token, neuron) pairs, and tokens."""

    def __init__(self, n_neurons: int, device: torch.device) -> None:
        self.n_neurons = n_neurons
        with torch.inference_mode(False):  # it is reset outside of inference as well
            self.totals = torch.zeros(2, dtype=torch.int64, device=device)

    def record(self, prediction: Prediction, tokens: int) -> None:
        tally(prediction.active, self.totals, tokens=tokens, mask=prediction.mask)

    def reset(self) -> None:
        self.totals.zero_()

    @property
    def active(self) -> int:
        return int(self.totals[0])

    @property
    def tokens(self) -> int:
        return int(self.totals[1])

    @property
    def density(self) -> float:
        """Active over total neurons; 1 before any token."""
        return self.active / (self.tokens * self.n_neurons) if self.tokens else 1.0


class DenseFFN(nn.Module):
    """Every neuron. gate, up: QuantTensor [N, D]; down: [D, N] as the file has it; up may be None."""

    def __init__(self, gate: QuantTensor, up: QuantTensor | None, down: QuantTensor, activation: str) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.activation = gate, up, down, activation

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        """x, residual: float32 [T, D]; returns float32 [T, D]."""
        up = None if self.up is None else quant_matmul(x, self.up)
        return quant_matmul(glu(quant_matmul(x, self.gate), up, activation=self.activation), self.down)


class SparseFFN(nn.Module):
    """The neurons its predictor names, on one device, and what compensates for the others."""

    def __init__(self, weights: FFNWeights, predictor: Predictor, activation: str) -> None:
        super().__init__()
        self.weights, self.predictor, self.activation = weights, predictor, activation
        self.observe: Callable[[torch.Tensor, Prediction], None] | None = None  # called with what is computed
        self.activity = Activity(weights.n_neurons, weights.gate.device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        if not (opens and self.predictor.opens_dense):
            return self._compensated(x, residual)
        first = self._compute(x[:1], Prediction(self._everything(), None, None))
        return torch.cat([first, self._compensated(x[1:], residual[1:])]) if x.shape[0] > 1 else first

    def _compensated(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = self._compute(x, self.predictor(x, residual))
        compensation = self.predictor.compensation
        return y if compensation is None else add(y, quant_matmul(x, compensation))

    def _compute(self, x: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        self.activity.record(prediction, x.shape[0])
        if self.observe is not None:
            self.observe(x, prediction)
        with expect_density(self.predictor.expected_density):
            return sparse_ffn(
                x,
                self.weights.gate,
                self.weights.up,
                self.weights.down,
                prediction.active,
                activation=self.activation,
                mask=prediction.mask,
                gate_values=prediction.gate_values,
                shift=prediction.shift,
            )

    def _everything(self) -> Active:
        device, count = self.weights.gate.device, self.weights.n_neurons
        every = torch.arange(count, dtype=torch.int32, device=device)
        return Active(every, torch.full((1,), count, dtype=torch.int32, device=device))

    def shard(self, neurons: torch.Tensor, *, compensated: bool = True) -> SparseFFN:
        """The same for some of the neurons (int64 [H]); of all shards, one is to be compensated."""
        predictor = self.predictor.shard(neurons)
        predictor.compensation = self.predictor.compensation if compensated else None
        return SparseFFN(self.weights.shard(neurons), predictor, self.activation)


class HybridFFN(nn.Module):
    """A hot and a cold shard, each with its part of the predictor, added. Both are on the CPU so far."""

    def __init__(self, hot: SparseFFN, cold: SparseFFN) -> None:
        super().__init__()
        self.hot, self.cold = hot, cold

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        return add(self.hot(x, residual, opens), self.cold(x, residual, opens))
