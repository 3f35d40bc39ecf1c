"""An FFN that skips small inputs and hidden values instead of neurons (TEAL): see `predictors.input_threshold`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from pinfer.ffn import Activity, check_biases, with_bias
from pinfer.kernels.activation import check_activation
from pinfer.kernels.ops import glu, input_sparse_matmul, tally_kept
from pinfer.predictors import InputThreshold
from pinfer.predictors.input_threshold import KEEP_ALL
from pinfer.quant import QuantTensor

Kept = TypeVar("Kept", float, torch.Tensor)
Thresholds = tuple[torch.Tensor, torch.Tensor]  # float32 [1] each: of inputs, of hidden values


@dataclass(frozen=True)
class InputMajorWeights:
    """Weights by what they are multiplied with: row j of gate and up [D, N] belongs to input j, row i of down [N, D]
    to hidden value i.

    All are transposed from the file, at relative RMS errors of `input_error` (the larger of gate's and up's) and
    `down_error` where they had to be requantised. An ungated FFN has its up matrix as `gate` and no `up`.
    gate_bias, down_bias: float32 [N] and [D] or None, of the gate product and of y.
    """

    gate: QuantTensor
    up: QuantTensor | None
    down: QuantTensor
    input_error: float = 0.0
    down_error: float = 0.0
    gate_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.up is not None and self.up.shape != self.gate.shape:
            raise ValueError(f"up is {self.up.shape}, expected gate's {self.gate.shape} (width, neurons)")
        if self.down.shape != self.gate.shape[::-1]:
            raise ValueError(f"down is {self.down.shape}, expected {self.gate.shape[::-1]} (neurons, width)")
        check_biases(self.gate_bias, self.down_bias, *self.down.shape)


class InputActivity(Activity):
    """What an InputSparseFFN computed. `totals` int64 [2, 2], on the device: (token, input) pairs that were kept and
    tokens, then the same of hidden values.

    `active` is in neurons' worth of multiply-adds, so that density is their share of the dense FFN's: each of its
    matrices takes as many, gate and up for the inputs that are kept, `down` for the hidden values.
    """

    def __init__(self, weights: InputMajorWeights) -> None:
        super().__init__(weights.down.rows, weights.gate.device, (2, 2))
        self._n_inputs, self._of_inputs = weights.gate.rows, 1 if weights.up is None else 2  # matrices that inputs meet
        self.inputs, self.hidden = self.totals.unbind()

    def move(self, put: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.inference_mode(False):
            super().move(put)
            self.inputs, self.hidden = self.totals.unbind()

    @property
    def active(self) -> float:
        return self.worth(int(self.inputs[0]), int(self.hidden[0]))

    @property
    def tokens(self) -> int:
        return int(self.hidden[1])

    def worth(self, inputs: Kept, hidden: Kept) -> Kept:
        """Neurons' worth of multiply-adds of so many kept inputs and hidden values; numbers, or tensors of one shape."""
        return (self._of_inputs * inputs * (self.n_neurons / self._n_inputs) + hidden) / (self._of_inputs + 1)


class InputSparseFFN(nn.Module):
    """The inputs and hidden values above their thresholds (TEAL, Liu et al. 2024): see `predictors.input_threshold`.

    Activations meet the weights as they are, in float32, also where `use_int8` rounds them elsewhere.
    cutoff: FATReLU's, for relu alone.
    """

    opens_dense = True  # as of Predictor

    def __init__(
        self, weights: InputMajorWeights, threshold: InputThreshold, activation: str, cutoff: float = 0.0
    ) -> None:
        super().__init__()
        check_activation(activation, cutoff)
        self.weights, self.activation, self.cutoff = weights, activation, cutoff
        # Called with some tokens, their hidden values and the thresholds of both.
        self.observe: Callable[[torch.Tensor, torch.Tensor, Thresholds], None] | None = None
        self.activity = InputActivity(weights)
        self.thresholds, self.everything = self._tensors(*threshold), self._tensors(KEEP_ALL, KEEP_ALL)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        if not opens:
            return self._compute(x, self.thresholds)
        first = self._compute(x[:1], self.everything)
        return torch.cat([first, self._compute(x[1:], self.thresholds)]) if x.shape[0] > 1 else first

    def _compute(self, x: torch.Tensor, thresholds: Thresholds) -> torch.Tensor:
        of_inputs, of_hidden = thresholds
        gate, up = self._products(x, of_inputs)
        hidden = glu(gate, up, activation=self.activation, gate_bias=self.weights.gate_bias, cutoff=self.cutoff)
        tally_kept(x, of_inputs, self.activity.inputs)
        tally_kept(hidden, of_hidden, self.activity.hidden)
        if self.observe is not None:
            self.observe(x, hidden, thresholds)
        return with_bias(input_sparse_matmul(hidden, self.weights.down, of_hidden), self.weights.down_bias)

    def _products(self, x: torch.Tensor, of_inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        gate, up = self.weights.gate, self.weights.up
        return (
            input_sparse_matmul(x, gate, of_inputs),
            None if up is None else input_sparse_matmul(x, up, of_inputs),
        )

    def products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gate products with their bias, and up products, float32 [T, N] each, with no input skipped."""
        gate, up = self._products(x, self.everything[0])
        return gate if self.weights.gate_bias is None else gate + self.weights.gate_bias, up

    def _tensors(self, of_inputs: float, of_hidden: float) -> Thresholds:
        device = self.weights.gate.device
        return torch.tensor([of_inputs], device=device), torch.tensor([of_hidden], device=device)
