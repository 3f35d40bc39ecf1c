"""mlp: a small trained network on the residual says which neurons to compute, as in Deja Vu and PowerInfer.

Neuron i is computed where second_i · relu(first · residual) >= threshold, without biases (Liu et al. 2023; Song et al.
2024, §5.1; the form and what it reads are those of PowerInfer's files). It reads the residual before the FFN's norm.
"""

from __future__ import annotations

import math

import torch

from pinfer.kernels.ops import glu, quant_matmul, threshold_matmul
from pinfer.predictors.base import Prediction, Predictor
from pinfer.quant import QuantTensor


class MLP(Predictor):
    """first: QuantTensor [R, D]; second: QuantTensor [N, R]; at_least: what an output must reach.

    ValueError for matrices that do not fit each other.
    """

    def __init__(self, first: QuantTensor, second: QuantTensor, at_least: float = 0.0) -> None:
        super().__init__()
        if first.rows != second.columns:
            raise ValueError(f"first {first!r} and second {second!r}: expected [R, D] and [N, R]")
        self.first, self.second, self.at_least = first, second, at_least
        below = torch.tensor([at_least], dtype=torch.float32, device=first.device)
        self.threshold = torch.nextafter(below, torch.full_like(below, -math.inf))  # ops compare with >

    @property
    def own_bytes(self) -> int:
        return self.first.nbytes + self.second.nbytes

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        hidden = glu(quant_matmul(residual, self.first), activation="relu")
        named = threshold_matmul(hidden, self.second, self.threshold)
        return Prediction(named.active, named.mask, None)  # its values are no gate's

    def shard(self, neurons: torch.Tensor) -> MLP:
        part = MLP(self.first, self.second[neurons], self.at_least)
        part.density = self.density
        return part
