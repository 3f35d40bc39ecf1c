"""The dense FFN of a file that has `down` by neurons: turned round when it is first computed densely, and not before."""

from __future__ import annotations

import torch
from torch import nn

from pinfer.ffn import DenseFFN
from pinfer.kernels.transpose import transpose_weights
from pinfer.quant import QuantTensor


class NeuronMajorFFN(DenseFFN):
    """As DenseFFN, but over `down_rows` QuantTensor [N, D], row i being neuron i's.

    `down` [D, N] is made of them when it is first asked for, which a sparse run never does; quantised rows become Q8_0
    (F16 where N is no multiple of 32), at a relative RMS error of `down_error`, floats stay exact.
    """

    down_error = 0.0

    def __init__(
        self,
        gate: QuantTensor,
        up: QuantTensor | None,
        down_rows: QuantTensor,
        activation: str,
        gate_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        cutoff: float = 0.0,
    ) -> None:
        self._turned: QuantTensor | None = None
        self._rows: QuantTensor | None = None
        self._first_rows = lambda: (
            down_rows
        )  # in no attribute, where it would be moved and counted beside what is turned
        super().__init__(gate, up, down_rows, activation, gate_bias, down_bias, cutoff)

    @property
    def down(self) -> QuantTensor:
        if self._turned is None:
            assert self._rows is not None
            self._turned, self.down_error = transpose_weights(self._rows)
            self._rows = None  # one of them is computed with, and moved
        return self._turned

    @down.setter
    def down(self, rows: QuantTensor) -> None:
        self._rows = rows

    def turn_back(self) -> None:
        """Forget the turned matrix, which is made again where it is asked for; for an FFN that was not moved since."""
        if self._turned is not None:
            self._turned, self._rows = None, self._first_rows()


def turn_down(model: nn.Module) -> None:
    """Turn the `down` of every such FFN now: before it is moved or laid out for a GPU, where it cannot be turned."""
    for ffn in _of(model):
        _ = ffn.down


def turned_error(model: nn.Module) -> float:
    """Relative RMS error that turning brought, the mean over layers; 0 where it was exact or not done."""
    errors = [ffn.down_error for ffn in _of(model)]
    return sum(errors) / len(errors) if errors else 0.0


def _of(model: nn.Module) -> list[NeuronMajorFFN]:
    return [one for one in model.modules() if isinstance(one, NeuronMajorFFN)]
