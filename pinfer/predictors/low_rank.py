"""low_rank: estimates the gate by two thin matrices and computes the neurons whose estimate passes a threshold.

The form is Deja Vu's and PowerInfer's (Liu et al. 2023, Song et al. 2024) without a nonlinearity
between the matrices, and without training: the matrices are the best low-rank approximation of the
gate's outputs over calibration inputs, in closed form. Scores estimate g_i · x itself, so that

- where large gates alone count (ReLU, or a bar above the activation's negative lobe) neuron i is
  computed if its score passes bar - c·σ_i, σ_i being the spread of its estimate's error;
- otherwise it is computed if |act(score)| passes one threshold.

c, or the threshold, is chosen on tokens held out from the fit so that a share `recall` of the truly
active neurons passes; what is reported comes from a third set of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pinfer.kernels.activation import ZERO_BELOW_ZERO, activate
from pinfer.kernels.ops import dequantize, glu, quant_matmul, threshold_matmul
from pinfer.kernels.select_active import passes
from pinfer.predictors.base import Prediction, Predictor, PredictorQuality, share_of
from pinfer.predictors.cuts import Cuts
from pinfer.quant import F16, Q8_0, QuantTensor, QuantType
from pinfer.quantize import quantize

RANK_MULTIPLE = Q8_0.block_size
# Random inputs stand for directions that the calibration text misses: this many beside the tokens,
# with this share of the tokens' energy. More costs rank that the text's own directions need.
NOISE_INPUTS, NOISE_ENERGY, NOISE_SEED = 128, 0.02, 20
CHUNK_BYTES = 64 << 20  # of dequantised gate at a time
NO_BAR = -1.0  # every |act(g)| exceeds it
SMALLEST_SINGULAR = 1e-5  # of the largest: below, float32 leaves no more than rounding noise


@dataclass(frozen=True)
class LowRankSettings:
    """rank R; recall, the share of truly active neurons to catch.

    A neuron is truly active where |act(g · x)| exceeds the size that a share `sparsity` of them does
    not exceed; for ReLU models without a sparsity, where it is not zero.
    """

    rank: int
    recall: float
    sparsity: float | None = None

    def check(self, activation: str, n_neurons: int, width: int) -> None:
        """ValueError where this model cannot take these settings."""
        limit = min(n_neurons, width)
        if self.rank % RANK_MULTIPLE or not 0 < self.rank <= limit:
            raise ValueError(
                f"predictor_rank must be a multiple of {RANK_MULTIPLE} and at most {limit}, "
                f"the smaller of the FFN's sides, not {self.rank}"
            )
        if self.sparsity is None and activation not in ZERO_BELOW_ZERO:
            raise ValueError(f"low_rank needs a sparsity, such as 0.5, for a model whose activation is {activation}")


class CalibrationInputs(NamedTuple):
    """Inputs of one layer's FFN, each float32 [T, D]: to fit on, to set the threshold on, to report on."""

    fit: torch.Tensor
    threshold: torch.Tensor
    report: torch.Tensor


class LowRank(Predictor):
    """first: QuantTensor [R, D]; second: QuantTensor [N, R]; threshold: float32 [1] or [N].

    The scores second · (first · x) are compared as they are, or by |act(score)| where
    `by_magnitude` says so. gate_bias: float32 [N] or None, of the gate product, and so of the scores of factors that
    were fitted to it; trained ones have learnt theirs. cutoff: FATReLU's.
    """

    def __init__(
        self,
        first: QuantTensor,
        second: QuantTensor,
        threshold: torch.Tensor,
        activation: str,
        *,
        by_magnitude: bool,
        quality: PredictorQuality | None = None,
        cuts: Cuts | None = None,
        gate_bias: torch.Tensor | None = None,
        cutoff: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_bias, self.cutoff = gate_bias, cutoff
        if first.rows != second.columns or threshold.shape not in ((1,), (second.rows,)):
            raise ValueError(
                f"first {first!r}, second {second!r} and threshold {list(threshold.shape)}: "
                "expected [R, D], [N, R] and [1] or [N]"
            )
        self.first, self.second, self.threshold = first, second, threshold
        self.activation, self.by_magnitude, self.quality, self.cuts = activation, by_magnitude, quality, cuts

    @property
    def own_bytes(self) -> int:
        return self.first.nbytes + self.second.nbytes

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        magnitude_of = self.activation if self.by_magnitude else None
        named = threshold_matmul(
            quant_matmul(x, self.first),
            self.second,
            self.threshold,
            magnitude_of=magnitude_of,
            gate_bias=self.gate_bias,
            cutoff=self.cutoff if self.by_magnitude else 0.0,
        )
        return Prediction(named.active, named.mask, None)  # its values are estimates of the gate

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """What `forward` compares with the threshold, float32 [T, N], for x float32 [T, D]; calibration wants all of it."""
        gates = quant_matmul(quant_matmul(x, self.first), self.second, self.gate_bias)
        if not self.by_magnitude:
            return gates
        return glu(gates, activation=self.activation, magnitude=True, cutoff=self.cutoff)

    def shard(self, neurons: torch.Tensor) -> LowRank:
        threshold = self.threshold if self.threshold.numel() == 1 else self.threshold[neurons]
        part = LowRank(
            self.first,
            self.second[neurons],
            threshold,
            self.activation,
            by_magnitude=self.by_magnitude,
            quality=self.quality,
            gate_bias=None if self.gate_bias is None else self.gate_bias[neurons],
            cutoff=self.cutoff,
        )
        part.density = self.density
        return part


def fit_low_rank(
    gate: QuantTensor,
    activation: str,
    inputs: CalibrationInputs,
    settings: LowRankSettings,
    *,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> LowRank:
    """A predictor for the gate [N, D], with its `quality` on `inputs.report`; the same one for the same inputs.

    gate_bias: float32 [N] or None, added to the gate product; cutoff: FATReLU's.

    ValueError for settings that the gate cannot take.
    """
    settings.check(activation, *gate.shape)
    first, second = approximate(gate, inputs.fit, settings.rank)
    bar = _bar(_sizes(activation, cutoff, quant_matmul(inputs.fit, gate, gate_bias)), settings.sparsity)
    everything = torch.full((1,), -math.inf, device=gate.device)
    signs = _both_signs_count(activation, bar)
    predictor = LowRank(first, second, everything, activation, by_magnitude=signs, gate_bias=gate_bias, cutoff=cutoff)
    _set_threshold(predictor, quant_matmul(inputs.threshold, gate, gate_bias), inputs.threshold, bar, settings.recall)
    named = passes(predictor.scores(inputs.report), predictor.threshold)
    sizes = _sizes(activation, cutoff, quant_matmul(inputs.report, gate, gate_bias))
    active = passes(sizes, sizes.new_tensor([bar]))
    predictor.quality = PredictorQuality(share_of(named, active), *(float(m.double().mean()) for m in (active, named)))
    return predictor


def approximate(gate: QuantTensor, inputs: torch.Tensor, rank: int) -> tuple[QuantTensor, QuantTensor]:
    """`closed_form` as it is stored: first QuantTensor [R, D] and second QuantTensor [N, R]."""
    first, second = closed_form(gate, inputs, rank)
    return quantize(first, stored_type(gate.columns)), quantize(second, stored_type(rank))


def closed_form(gate: QuantTensor, inputs: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """first float32 [R, D] and second [N, R] whose product is close to the gate [N, D] on inputs float32 [T, D].

    With S the inputs and some noise as columns and W the inverse of each neuron's RMS gate, first
    and second are Uᵀ·W·G and W⁻¹·U, U being the leading left singular vectors of W·G·S: no other
    rank-R matrix times G has a smaller error relative to what each neuron does. U comes through the
    eigenvectors of (W·G·S)ᵀ(W·G·S), so that G is dequantised in chunks, twice. ValueError for a gate
    or inputs that are not finite.
    """
    sketch = _with_noise(inputs, rank)  # [M, D]
    gram, sizes = _gram(gate, sketch, len(inputs))
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    singular = squares[-rank:].clamp_min(0).sqrt()
    sound = singular > SMALLEST_SINGULAR * singular[-1]
    vectors = torch.where(sound, vectors[:, -rank:] / singular.clamp_min(1e-300), 0)
    to_left = sketch.T @ vectors.float()  # [D, R]; G times it is U
    first, second = torch.zeros_like(to_left).T.contiguous(), []
    for rows, size in zip(_dequantised(gate), sizes, strict=True):
        left = rows @ to_left / size  # [rows, R], of U
        first += left.T @ (rows / size)
        second.append(left * size)
    # Both factors carry the root of what a direction matters: it costs the least rounding when
    # weights, or activations between the two products, share a scale in blocks of 32 directions.
    balance = (inputs @ first.T).square().mean(dim=0).sqrt().clamp_min(1e-20).sqrt()  # [R]
    first, left = first / balance[:, None], torch.cat(second) * balance
    return first, left


def spectrum(gate: QuantTensor, inputs: torch.Tensor) -> torch.Tensor:
    """float64 [min(T, D)], descending: the energy of each direction of the outputs of gate [N, D] on inputs [T, D].

    Every neuron's outputs are scaled to a mean square of 1: what `closed_form` leaves out at rank R is
    the sum of all but the first R.
    """
    gram, _ = _gram(gate, inputs, len(inputs))
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)[: min(inputs.shape)]


def _gram(gate: QuantTensor, sketch: torch.Tensor, tokens: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(W·G·S)ᵀ(W·G·S) float64 [M, M] for a sketch [M, D], and W⁻¹ in chunks [rows, 1] from its first `tokens` rows."""
    gram = torch.zeros(len(sketch), len(sketch), dtype=torch.float64, device=gate.device)
    sizes = []
    for rows in _dequantised(gate):
        outputs = rows @ sketch.T  # [rows, M]
        sizes.append(outputs[:, :tokens].square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-20))
        outputs = (outputs / sizes[-1]).double()
        gram += outputs.T @ outputs
    if not bool(gram.isfinite().all()):
        raise ValueError("a gate or its inputs are not finite: the weights are damaged")
    return gram, sizes


def with_moments_of(inputs: torch.Tensor) -> torch.Tensor:
    """Rows float32 [min(T, D), D] with the mean of x·xᵀ over inputs [T, D]: all that a closed form sees of them."""
    tokens, width = inputs.shape
    return inputs if tokens <= width else torch.linalg.qr(inputs, mode="r").R * math.sqrt(width / tokens)


def _with_noise(inputs: torch.Tensor, rank: int) -> torch.Tensor:
    """The inputs [T, D] and isotropic noise below them, at least `rank` rows together."""
    count = max(NOISE_INPUTS, rank - len(inputs))
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(count, inputs.shape[1], generator=generator).to(inputs.device)
    energy = NOISE_ENERGY * inputs.square().sum() / noise.square().sum()
    return torch.cat([inputs, noise * energy.sqrt()])


def _dequantised(gate: QuantTensor) -> Iterator[torch.Tensor]:
    step = max(1, CHUNK_BYTES // (4 * gate.columns))
    for start in range(0, gate.rows, step):
        yield dequantize(gate[start : start + step])


def stored_type(columns: int) -> QuantType:
    """How a predictor's matrices are kept: Q8_0, or F16 where `columns` fill no whole blocks."""
    return F16 if columns % Q8_0.block_size else Q8_0


def _sizes(activation: str, cutoff: float, gates: torch.Tensor) -> torch.Tensor:
    """What decides whether a neuron is truly active: |act(g)| of gates [T, N]."""
    return activate(activation, gates, cutoff).abs()


def _both_signs_count(activation: str, bar: float) -> bool:
    """Whether a negative gate can be truly active: the activation dips below zero by more than `bar`."""
    negative = torch.linspace(-20, 0, 20_001)
    return bool(_sizes(activation, 0.0, negative).max() > bar)


def _bar(sizes: torch.Tensor, sparsity: float | None) -> float:
    """What |act(g)| exceeds in truly active neurons, from such sizes [T, N]."""
    if sparsity is None:
        return 0.0
    sizes = sizes.flatten()
    return float(sizes.kthvalue(round(sparsity * sizes.numel())).values) if sparsity else NO_BAR


def _set_threshold(predictor: LowRank, gates: torch.Tensor, inputs: torch.Tensor, bar: float, recall: float) -> None:
    """Let a share `recall` of the active neurons pass, over inputs [T, D] with true gates [T, N]."""
    scores = predictor.scores(inputs)
    active = passes(_sizes(predictor.activation, predictor.cutoff, gates), gates.new_tensor([bar]))
    base, scale = gates.new_zeros(1), gates.new_ones(1)
    if not predictor.by_magnitude:
        error = (gates - scores).std(dim=0, correction=0)  # [N]
        scale = error.clamp_min(max(1e-20, 1e-4 * float(error.mean())))
        base = base + _edge(predictor.activation, predictor.cutoff, bar)
    margins = (scores - base) / scale
    predictor.cuts = Cuts.of(margins, base, scale)
    if bar != NO_BAR:
        predictor.threshold = base - _passed_by(-margins[active], recall, scores) * scale


def _passed_by(needed: torch.Tensor, share: float, like: torch.Tensor) -> torch.Tensor:
    """A float32 [1] just above the least allowance that a share of the `needed` ones is content with; 0 for none."""
    if not needed.numel():
        return like.new_zeros(1)
    enough = needed.kthvalue(max(1, math.ceil(share * needed.numel()))).values[None]
    return enough + 1e-5 * enough.abs() + 1e-12


def _edge(activation: str, cutoff: float, bar: float) -> float:
    """The gate g >= cutoff at which act(g) reaches `bar`, by bisection (act rises there)."""
    low, high = cutoff, max(1.0, 2 * cutoff)
    while float(activate(activation, torch.tensor(high))) < bar:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float(activate(activation, torch.tensor(middle))) <= bar else (low, middle)
    return low
