"""sign_bits (SparseInfer, Shin et al. 2024): guesses a ReLU's outcome from the signs of weights and inputs.

A product g_i · x with many more positive than negative terms is likely positive. One bit a weight is
kept, 1/32 of what the gate has in float32, and counted by xor and popcount. Nothing is trained: one
threshold a layer is set so that a share `recall` of the truly active neurons of a calibration text passes.

Where the gate product has a bias b, or a neuron counts only above a cutoff c, a neuron's threshold moves by
(c - b_i) / s_i: s_i is the product that a point of its score stands for, by least squares over that text.
"""

from __future__ import annotations

import math

import torch

from pinfer.kernels.activation import ZERO_BELOW_ZERO
from pinfer.kernels.ops import quant_matmul, sign_select
from pinfer.kernels.sign_select import pack_signs
from pinfer.kernels.sign_select.reference import sign_scores
from pinfer.predictors.base import Prediction, Predictor, PredictorQuality, share_of
from pinfer.predictors.cuts import Cuts
from pinfer.quant import QuantTensor

SMALLEST_SLOPE = 0.1  # of the mean, which a product a point of score is taken to be at least
LARGEST_SCORE = 2**24  # more than any width, and a whole float32


class SignBits(Predictor):
    """signs: int32 [N, ceil(D / 32)] of `pack_signs`; threshold: int32 [1] or [N], a score must exceed it."""

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
        threshold = self.threshold if self.threshold.numel() == 1 else self.threshold[neurons]
        part = SignBits(self.signs[neurons], threshold, self.quality)
        part.density = self.density
        return part


def fit_sign_bits(
    gate: QuantTensor,
    activation: str,
    x: torch.Tensor,
    held_out: torch.Tensor,
    recall: float,
    *,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> SignBits:
    """A predictor for the gate [N, D] that lets a share `recall` in (0, 1] of active neurons pass on inputs x [T, D].

    gate_bias: float32 [N] or None, added to the gate product. Its `quality` is of `held_out` [T, D]. ValueError unless the activation is zero below zero and gates are finite.
    """
    if activation not in ZERO_BELOW_ZERO:
        raise ValueError(
            f"sign_bits needs a ReLU model; this one's activation is {activation}: try shift_threshold with a sparsity"
        )
    signs = pack_signs(gate)
    scores, products = _scores_and_products(gate, signs, x)
    one = torch.ones(1, device=gate.device)
    bar = _bar(gate, gate_bias, cutoff)
    base = 0 * one if gate_bias is None and not cutoff else _points(bar, scores, products)
    margins = scores - base
    cuts = Cuts.of(margins, base, one)
    needed = margins[products > bar]
    lost = int((1 - recall) * needed.numel())
    # Just below the least that has to pass: a whole score below it where scores are all that counts.
    cut = math.ceil(float(needed.kthvalue(lost + 1).values)) - 1 if needed.numel() else gate.columns
    threshold = _whole(base + cut)
    scores, products = _scores_and_products(gate, signs, held_out)
    named, active = scores > threshold, products > bar
    quality = PredictorQuality(share_of(named, active), float(active.float().mean()), float(named.float().mean()))
    return SignBits(signs, threshold, quality, cuts)


def _whole(threshold: torch.Tensor) -> torch.Tensor:
    """int32 [1] or [N]: a whole score exceeds it where it exceeds `threshold`."""
    return threshold.floor().clamp(-LARGEST_SCORE, LARGEST_SCORE).int()


def _bar(gate: QuantTensor, gate_bias: torch.Tensor | None, cutoff: float) -> torch.Tensor:
    """float32 [1] or [N]: what g_i · x exceeds where neuron i is truly active."""
    bar = torch.full((1,), float(cutoff), device=gate.device)
    return bar if gate_bias is None else bar - gate_bias


def _points(bar: torch.Tensor, scores: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """float32 [N]: the score that stands for the product `bar`, from scores and products [T, N]."""
    scores = scores.float()
    slope = (scores * products).sum(0) / scores.square().sum(0).clamp_min(1e-20)
    least = SMALLEST_SLOPE * slope.abs().mean()  # a neuron that its signs say nothing of
    return bar / slope.clamp_min(float(least) or 1.0)


def _scores_and_products(gate: QuantTensor, signs: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 and float32 [T, N]: scores, and g_i · x."""
    gates = quant_matmul(x, gate)
    if not bool(gates.isfinite().all()):
        raise ValueError("a gate or its inputs are not finite: the weights are damaged")
    return sign_scores(x, signs), gates
