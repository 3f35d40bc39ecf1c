"""weighted_threshold and shift_threshold: the gate alone, ranked by what a neuron is likely to add.

CATS ranks neurons by |act(g · x)|, though what neuron i adds is act(g_i · x) (u_i · x) d_i, and E|u_i · x|
differs from neuron to neuron. `weighted_threshold` ranks by |act(g_i · x)| · E|u_i · x|.

`shift_threshold` first takes away what needs no choice. SiLU and GELU dip below zero, and most gates lie
in the dip: act(g_i · x) is near a constant c_i of its own. So

    y = Σ over all i of c_i (u_i · x) d_i  +  Σ over kept i of (act(g_i · x) - c_i) (u_i · x) d_i

and the first sum is a matrix, M = Σ c_i d_i u_iᵀ, of D × D however many neurons there are. Neurons are
ranked by |act(g_i · x) - c_i| · E|u_i · x|: ‖d_i‖ as a further factor lost on Gemma (experiments/LOG.md). M is kept
in Q5_0, rounded so that M·x changes least for the inputs of the calibration text (`pinfer.error_feedback`). With
every neuron kept it is the dense FFN but for that.

Both cut at a quantile over a calibration text, so what is reached elsewhere is near the sparsity asked
for and not equal to it. Nothing is trained. A sequence's first token is computed whole: its activations
are outliers, which the compensation would be wrong for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from pinfer.error_feedback import error_feedback
from pinfer.kernels.activation import CLAMPS_UP, activate
from pinfer.kernels.ops import dequantize, quant_matmul, threshold_matmul
from pinfer.predictors.base import Prediction, Predictor
from pinfer.predictors.cuts import KEPT_VALUES, Cuts
from pinfer.quant import F16, Q5_0, QuantTensor
from pinfer.quantize import quantize

CHUNK_BYTES = 64 << 20  # of dequantised weights at a time


class FFNMatrices(NamedTuple):
    """An FFN as a file has it: gate and up QuantTensor [N, D], down [D, N]; its activation, and a cutoff of that.

    gate_bias: float32 [N] or None, added to the gate product.
    """

    gate: QuantTensor
    up: QuantTensor
    down: QuantTensor
    activation: str
    gate_bias: torch.Tensor | None = None
    cutoff: float = 0.0


class WeightedThreshold(Predictor):
    """Keeps neurons with |act(g_i · x) - shift_i| above their thresholds.

    gate: QuantTensor [N, D]; threshold: float32 [N]; shift: float32 [N] or None; compensation:
    QuantTensor [D, D] or None; gate_bias: float32 [N] or None, added to the gate product; cutoff: FATReLU's.
    """

    opens_dense = True
    reads_gate = True

    def __init__(
        self,
        gate: QuantTensor,
        activation: str,
        threshold: torch.Tensor,
        shift: torch.Tensor | None,
        compensation: QuantTensor | None,
        cuts: Cuts | None = None,
        *,
        gate_bias: torch.Tensor | None = None,
        cutoff: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate, self.activation, self.gate_bias, self.cutoff = gate, activation, gate_bias, cutoff
        self.threshold, self.shift, self.compensation, self.cuts = threshold, shift, compensation, cuts

    @property
    def own_bytes(self) -> int:
        return 0 if self.compensation is None else self.compensation.nbytes

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        named = threshold_matmul(
            x,
            self.gate,
            self.threshold,
            magnitude_of=self.activation,
            shift=self.shift,
            gate_bias=self.gate_bias,
            cutoff=self.cutoff,
        )
        return Prediction(named.active, named.mask, named.values, self.shift)

    def shard(self, neurons: torch.Tensor) -> WeightedThreshold:
        shift, bias = (None if one is None else one[neurons] for one in (self.shift, self.gate_bias))
        gate, threshold = self.gate[neurons], self.threshold[neurons]
        part = WeightedThreshold(gate, self.activation, threshold, shift, None, gate_bias=bias, cutoff=self.cutoff)
        part.density = self.density
        return part


def fit_weighted_threshold(ffn: FFNMatrices, x: torch.Tensor, *, shifted: bool) -> WeightedThreshold:
    """A predictor for inputs like x float32 [T, D], first tokens left out, to be set by `at_density`.

    `shifted` tells shift_threshold from weighted_threshold. ValueError unless the inputs are finite,
    and for a shift under dReLU, whose sum M·x is not.
    """
    if shifted and ffn.activation in CLAMPS_UP:
        raise ValueError(f"shift_threshold needs up products as they are; {ffn.activation} clamps them")
    if not bool(x.isfinite().all()):
        raise ValueError("an FFN's inputs are not finite: the weights are damaged")
    centers, weights, sizes = [], [], []
    for part in _chunks(ffn.gate, x.shape[0]):
        bias = None if ffn.gate_bias is None else ffn.gate_bias[part]
        values = activate(ffn.activation, quant_matmul(x, ffn.gate[part], bias), ffn.cutoff)  # [T, n]
        centers.append(values.median(dim=0).values if shifted else torch.zeros_like(values[0]))
        up = quant_matmul(x, ffn.up[part])
        counts = up.clamp_min(0) if ffn.activation in CLAMPS_UP else up.abs()
        weights.append(counts.mean(dim=0).clamp_min(1e-20))
        sizes.append(((values - centers[-1]).abs() * weights[-1])[_sample(x.shape[0], ffn.gate.rows)])
    center, scale = torch.cat(centers), 1 / torch.cat(weights)
    cuts = Cuts.of(torch.cat(sizes, dim=1), scale.new_zeros(1), scale)
    shift, compensation = (center, compensation_of(ffn, center, x)) if shifted else (None, None)
    return WeightedThreshold(
        ffn.gate,
        ffn.activation,
        cuts.threshold(1.0),
        shift,
        compensation,
        cuts,
        gate_bias=ffn.gate_bias,
        cutoff=ffn.cutoff,
    )


def compensation_of(ffn: FFNMatrices, center: torch.Tensor, x: torch.Tensor) -> QuantTensor:
    """M = Σ over neurons i of center_i · d_i u_iᵀ, [D, D], in Q5_0, or F16 where D fills no whole blocks.

    Q5_0 is rounded with error feedback for inputs like x float32 [T, D].
    """
    total = torch.zeros(ffn.down.rows, ffn.up.columns, device=center.device)
    for columns in _chunks(ffn.down, 0):
        down = dequantize(ffn.down[columns]) * center  # [d, N]
        for rows in _chunks(ffn.up, 0):
            total[columns] += down[:, rows] @ dequantize(ffn.up[rows])
    if ffn.up.columns % Q5_0.block_size:
        return quantize(total, F16)
    return error_feedback(total, x.T @ x / len(x), Q5_0)


def _chunks(weight: QuantTensor, tokens: int) -> Iterator[slice]:
    """Runs of rows of which the floats, or a product with so many tokens, stay within CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (4 * max(weight.columns, tokens)))
    yield from (slice(start, start + step) for start in range(0, weight.rows, step))


def _sample(tokens: int, neurons: int) -> slice:
    """Every so many-th token, so that no more than KEPT_VALUES sizes are kept."""
    return slice(None, None, max(1, -(-tokens * neurons // KEPT_VALUES)))
