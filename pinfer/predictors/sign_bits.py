"""sign_bits (SparseInfer, Shin et al. 2024): guesses a ReLU's outcome from the signs of weights and inputs.

A product g_i · x with many more positive than negative terms is likely positive. One bit a weight is
kept, 1/32 of what the gate has in float32, and counted by xor and popcount. Nothing is trained: one
threshold a layer is set so that a share `recall` of the truly active neurons of a calibration text passes.
"""

from __future__ import annotations

import torch

from pinfer.kernels.activation import ZERO_BELOW_ZERO
from pinfer.kernels.ops import quant_matmul, sign_select
from pinfer.kernels.sign_select import pack_signs
from pinfer.kernels.sign_select.reference import sign_scores
from pinfer.predictors.base import Prediction, Predictor, PredictorQuality, share_of
from pinfer.predictors.cuts import Cuts
from pinfer.quant import QuantTensor

LARGEST_SCORE = 2**24  # more than any width, and a whole float32


class SignBits(Predictor):
    """signs: int32 [N, ceil(D / 32)] of `pack_signs`; threshold: int32 [1], a score must exceed it."""

    def __init__(
        self,
        signs: torch.Tensor,
        threshold: torch.Tensor,
        quality: PredictorQuality | None = None,
        cuts: Cuts | None = None,
    ) -> None:
        super().__init__()
        self.signs, self.threshold, self.quality, self.cuts = signs, threshold, quality, cuts

    @property
    def own_bytes(self) -> int:
        return self.signs.element_size() * self.signs.numel()

    def at_density(self, density: float) -> SignBits:
        other = super().at_density(density)
        other.threshold = _whole(other.threshold)
        return other

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        named = sign_select(x, self.signs, self.threshold)
        return Prediction(named.active, named.mask, None)

    def shard(self, neurons: torch.Tensor) -> SignBits:
        part = SignBits(self.signs[neurons], self.threshold, self.quality)
        part.density = self.density
        return part


def fit_sign_bits(
    gate: QuantTensor, activation: str, x: torch.Tensor, held_out: torch.Tensor, recall: float
) -> SignBits:
    """A predictor for the gate [N, D] that lets a share `recall` in (0, 1] of active neurons pass on inputs x [T, D].

    Its `quality` is of `held_out` [T, D]. ValueError unless the activation is zero below zero and gates are finite.
    """
    if activation not in ZERO_BELOW_ZERO:
        raise ValueError(
            f"sign_bits needs a ReLU model; this one's activation is {activation}: try shift_threshold with a sparsity"
        )
    signs = pack_signs(gate)
    scores, active = _scores_and_active(gate, signs, x)
    one = torch.ones(1, device=gate.device)
    cuts = Cuts.of(scores, 0 * one, one)
    needed = scores[active]
    lost = int((1 - recall) * needed.numel())
    cut = int(needed.kthvalue(lost + 1).values) - 1 if needed.numel() else gate.columns
    scores, active = _scores_and_active(gate, signs, held_out)
    named = scores > cut
    quality = PredictorQuality(share_of(named, active), float(active.float().mean()), float(named.float().mean()))
    return SignBits(signs, _whole(cut * one), quality, cuts)


def _whole(threshold: torch.Tensor) -> torch.Tensor:
    """int32 [1]: a whole score exceeds it where it exceeds `threshold`."""
    return threshold.floor().clamp(-LARGEST_SCORE, LARGEST_SCORE).int()


def _scores_and_active(gate: QuantTensor, signs: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gates = quant_matmul(x, gate)
    if not bool(gates.isfinite().all()):
        raise ValueError("a gate or its inputs are not finite: the weights are damaged")
    return sign_scores(x, signs), gates > 0
