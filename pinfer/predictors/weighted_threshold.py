"""weighted_threshold and shift_threshold: the gate alone, ranked by what a neuron is likely to add.

CATS ranks neurons by |act(g · x)|, though what neuron i adds is act(g_i · x) (u_i · x) d_i, and E|u_i · x|
differs from neuron to neuron. `weighted_threshold` ranks by |act(g_i · x)| · E|u_i · x|.

`shift_threshold` first takes away what needs no choice. SiLU and GELU dip below zero, and most gates lie
in the dip: act(g_i · x) is near a constant c_i of its own. So

    y = Σ over all i of c_i (u_i · x) d_i  +  Σ over kept i of (act(g_i · x) - c_i) (u_i · x) d_i

and the first sum is a matrix, M = Σ c_i d_i u_iᵀ, of D × D however many neurons there are. Neurons are
ranked by |act(g_i · x) - c_i| · E|u_i · x|. With every neuron kept it is the dense FFN but for M's rounding.

Both cut at a quantile over a calibration text, so what is reached elsewhere is near the sparsity asked
for and not equal to it. Nothing is trained. A sequence's first token is computed whole: its activations
are outliers, which the compensation would be wrong for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pinfer.kernels.activation import CLAMPS_UP, activate
from pinfer.kernels.ops import dequantize, quant_matmul, threshold_matmul
from pinfer.predictors.base import Prediction, Predictor
from pinfer.quant import F16, Q8_0, QuantTensor
from pinfer.quantize import quantize

CHUNK_BYTES = 64 << 20  # of dequantised weights at a time
KEPT_VALUES = 1 << 24  # of the sizes that a threshold is a quantile of


class FFNMatrices(NamedTuple):
    """An FFN as a file has it: gate and up QuantTensor [N, D], down [D, N]; its activation."""

    gate: QuantTensor
    up: QuantTensor
    down: QuantTensor
    activation: str


class WeightedThreshold(Predictor):
    """Keeps neurons with |act(g_i · x) - shift_i| above their thresholds.

    gate: QuantTensor [N, D]; threshold: float32 [N]; shift: float32 [N] or None; compensation:
    QuantTensor [D, D] or None; density: share of neurons kept over the calibration text.
    """

    opens_dense = True

    def __init__(
        self,
        gate: QuantTensor,
        activation: str,
        threshold: torch.Tensor,
        shift: torch.Tensor | None,
        compensation: QuantTensor | None,
        density: float,
    ) -> None:
        super().__init__()
        self.gate, self.activation = gate, activation
        self.threshold, self.shift, self.compensation, self.density = threshold, shift, compensation, density

    @property
    def own_bytes(self) -> int:
        return 0 if self.compensation is None else self.compensation.nbytes

    @property
    def expected_density(self) -> float | None:
        return self.density

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        named = threshold_matmul(x, self.gate, self.threshold, magnitude_of=self.activation, shift=self.shift)
        return Prediction(named.active, named.mask, named.values, self.shift)

    def shard(self, neurons: torch.Tensor) -> WeightedThreshold:
        shift = None if self.shift is None else self.shift[neurons]
        return WeightedThreshold(
            self.gate[neurons], self.activation, self.threshold[neurons], shift, None, self.density
        )


def fit_weighted_threshold(ffn: FFNMatrices, x: torch.Tensor, sparsity: float, *, shifted: bool) -> WeightedThreshold:
    """A predictor that skips a share `sparsity` of neurons over inputs x [T, D], first tokens left out.

    `shifted` tells shift_threshold from weighted_threshold. ValueError unless sparsity lies in [0, 1)
    and the inputs are finite, and for a shift under dReLU, whose sum M·x is not.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} must lie in [0, 1)")
    if shifted and ffn.activation in CLAMPS_UP:
        raise ValueError(f"shift_threshold needs up products as they are; {ffn.activation} clamps them")
    if not bool(x.isfinite().all()):
        raise ValueError("an FFN's inputs are not finite: the weights are damaged")
    centers, weights, sizes = [], [], []
    for part in _chunks(ffn.gate, x.shape[0]):
        values = activate(ffn.activation, quant_matmul(x, ffn.gate[part]))  # [T, n]
        centers.append(values.median(dim=0).values if shifted else torch.zeros_like(values[0]))
        up = quant_matmul(x, ffn.up[part])
        counts = up.clamp_min(0) if ffn.activation in CLAMPS_UP else up.abs()
        weights.append(counts.mean(dim=0).clamp_min(1e-20))
        sizes.append(((values - centers[-1]).abs() * weights[-1])[_sample(x.shape[0], ffn.gate.rows)])
    center, cut = torch.cat(centers), quantile(torch.cat(sizes, dim=1), sparsity)
    threshold = cut / torch.cat(weights)
    if not shifted:
        return WeightedThreshold(ffn.gate, ffn.activation, threshold, None, None, 1 - sparsity)
    return WeightedThreshold(ffn.gate, ffn.activation, threshold, center, compensation_of(ffn, center), 1 - sparsity)


def compensation_of(ffn: FFNMatrices, center: torch.Tensor) -> QuantTensor:
    """M = Σ over neurons i of center_i · d_i u_iᵀ, [D, D], in Q8_0, or F16 where D fills no whole blocks."""
    total = torch.zeros(ffn.down.rows, ffn.up.columns, device=center.device)
    for columns in _chunks(ffn.down, 0):
        down = dequantize(ffn.down[columns]) * center  # [d, N]
        for rows in _chunks(ffn.up, 0):
            total[columns] += down[:, rows] @ dequantize(ffn.up[rows])
    return quantize(total, Q8_0 if ffn.up.columns % Q8_0.block_size == 0 else F16)


def _chunks(weight: QuantTensor, tokens: int) -> Iterator[slice]:
    """Runs of rows of which the floats, or a product with so many tokens, stay within CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (4 * max(weight.columns, tokens)))
    yield from (slice(start, start + step) for start in range(0, weight.rows, step))


def _sample(tokens: int, neurons: int) -> slice:
    """Every so many-th token, so that no more than KEPT_VALUES sizes are kept."""
    return slice(None, None, max(1, -(-tokens * neurons // KEPT_VALUES)))


def quantile(sizes: torch.Tensor, share: float) -> torch.Tensor:
    """What a share of the sizes does not exceed; below all of them for 0."""
    if share == 0:
        return sizes.new_tensor(-1.0)
    return sizes.flatten().kthvalue(max(1, round(share * sizes.numel()))).values
