"""Makes a dense model sparse: replaces each FFN by one that asks a predictor what to compute.

Modules are replaced; nothing is rebound. The dense baseline is the same model without this call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from pinfer.config import Method
from pinfer.ffn import (
    Activity,
    DenseFFN,
    FFNWeights,
    HybridFFN,
    InputMajorWeights,
    InputSparseFFN,
    SparseFFN,
)
from pinfer.kernels.activation import CLAMPS_UP, ZERO_BELOW_ZERO
from pinfer.kernels.transpose import transpose_weights
from pinfer.models import KVCache, LayerWalk, Transformer
from pinfer.placement import Plan
from pinfer.predictors import (
    CalibrationInputs,
    ExactPredictor,
    FFNMatrices,
    GateThreshold,
    InputThreshold,
    LowRank,
    LowRankSettings,
    Predictor,
    PredictorQuality,
    SignBits,
    WeightedThreshold,
    fit_input_threshold,
    fit_low_rank,
    fit_sign_bits,
    fit_weighted_threshold,
    gate_threshold_for,
)
from pinfer.quant import QuantTensor

# One predictor a layer, made from the layer's number and its dense FFN.
PredictorMaker = Callable[[int, DenseFFN], Predictor]
# A layer's `down` as rows [N, D], and the relative RMS error of that.
DownMaker = Callable[[int, DenseFFN], tuple[QuantTensor, float]]
# A layer's weights by what they are multiplied with.
InputMajorMaker = Callable[[int, DenseFFN], InputMajorWeights]

THRESHOLDED: tuple[Method, ...] = ("gate_threshold", "weighted_threshold", "shift_threshold", "input_threshold")
# Of the sequences that low_rank is calibrated on, by number modulo 4: two parts to fit on, one for
# the threshold, one to report on.
_FIT, _THRESHOLD, _REPORT = (0, 2), (1,), (3,)


def resolve_method(method: Method, activation: str, sparsity: float | None) -> Method:
    """What `auto` means for this model; ValueError where a method cannot work with the other settings."""
    if method == "auto":
        if sparsity is not None:
            return "gate_threshold"
        return "exact" if activation in ZERO_BELOW_ZERO else "dense"
    needs_sparsity = method in THRESHOLDED or (method == "low_rank" and activation not in ZERO_BELOW_ZERO)
    if needs_sparsity and sparsity is None:
        model = f" for a model whose activation is {activation}" if method == "low_rank" else ""
        raise ValueError(f"method {method} needs a sparsity{model}, such as 0.5")
    if method == "sign_bits" and activation not in ZERO_BELOW_ZERO:
        raise ValueError(f"sign_bits needs a ReLU model; this one's activation is {activation}: try shift_threshold")
    if method == "shift_threshold" and activation in CLAMPS_UP:
        raise ValueError(f"shift_threshold has no meaning for {activation}, which clamps up products: try exact")
    if method in ("exact", "dense", "sign_bits") and sparsity is not None:
        raise ValueError(
            f"sparsity {sparsity:g} has no meaning for method {method}: "
            f"it applies to {', '.join(THRESHOLDED)} and low_rank"
        )
    return method


def exact_predictors(layer: int, ffn: DenseFFN) -> Predictor:
    """ExactPredictor for every layer; ValueError unless the model is ReLU-activated."""
    return ExactPredictor(ffn.gate, ffn.activation)


def gate_threshold_predictors(thresholds: Sequence[float]) -> PredictorMaker:
    """GateThreshold with one threshold a layer."""
    return lambda layer, ffn: GateThreshold(ffn.gate, ffn.activation, thresholds[layer])


def calibrate_gate_thresholds(model: Transformer, tokens: torch.Tensor, sparsity: float) -> list[float]:
    """Per layer, the gate threshold that skips a share `sparsity` of neurons over tokens int64 [T].

    Runs the dense model once. The first token is left out: its activations are outliers.
    """
    thresholds: list[float] = []

    def measure(ffn: DenseFFN, inputs: tuple[torch.Tensor, ...]) -> None:
        thresholds.append(gate_threshold_for(inputs[0][1:], ffn.gate, ffn.activation, sparsity))

    _check_dense(model)
    if tokens.shape[0] < 2:
        raise ValueError(f"calibration needs at least 2 tokens, not {tokens.shape[0]}")
    hooks = [ffn.register_forward_pre_hook(measure) for ffn in model.ffns()]
    try:
        model(tokens, KVCache(model.config, tokens.shape[0]), last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return thresholds


def fit_weighted_predictors(
    model: Transformer,
    sequences: Sequence[torch.Tensor],
    sparsity: float,
    *,
    shifted: bool,
    progress: Callable[[str], None] = lambda _: None,
) -> list[WeightedThreshold]:
    """WeightedThreshold for every layer of a dense model, from its own inputs on sequences int64 [T].

    Leaves out each sequence's first token. ValueError for a sequence of a single token, or a model
    whose FFN has no gate.
    """
    _check_dense(model)
    if any(len(tokens) < 2 for tokens in sequences):
        raise ValueError("calibration needs sequences of at least 2 tokens")
    fitted = []
    for layer, (ffn, inputs) in enumerate(ffn_inputs(model, sequences), 1):
        progress(f"fitting predictors, layer {layer} of {model.config.n_layers}")
        if ffn.up is None:
            raise ValueError("this model's FFN has no gate to rank neurons by: try exact or low_rank")
        matrices = FFNMatrices(ffn.gate, ffn.up, ffn.down, ffn.activation)
        fitted.append(fit_weighted_threshold(matrices, torch.cat([x[1:] for x in inputs]), sparsity, shifted=shifted))
    return fitted


def fit_input_thresholds(
    model: Transformer,
    sequences: Sequence[torch.Tensor],
    sparsity: float,
    progress: Callable[[str], None] = lambda _: None,
) -> list[InputThreshold]:
    """InputThreshold for every layer of a dense model, from its own inputs on sequences int64 [T].

    Leaves out each sequence's first token. ValueError for a sequence of a single token.
    """
    _check_dense(model)
    if any(len(tokens) < 2 for tokens in sequences):
        raise ValueError("calibration needs sequences of at least 2 tokens")
    fitted = []
    for layer, (ffn, inputs) in enumerate(ffn_inputs(model, sequences), 1):
        progress(f"fitting thresholds, layer {layer} of {model.config.n_layers}")
        x = torch.cat([x[1:] for x in inputs])
        fitted.append(fit_input_threshold(x, ffn.gate, ffn.up, ffn.activation, sparsity))
    return fitted


def fit_low_rank_predictors(
    model: Transformer,
    sequences: Sequence[torch.Tensor],
    settings: LowRankSettings,
    progress: Callable[[str], None] = lambda _: None,
) -> list[LowRank]:
    """LowRank for every layer of a dense model, from its own inputs on sequences int64 [T].

    Half of the sequences, taken evenly from all over, are fitted on; a quarter sets the thresholds
    and a quarter measures what is reached. Both leave out a sequence's first token, as
    `calibrate_gate_thresholds` does. ValueError for fewer than four sequences, or one of a single token.
    """
    _check_dense(model)
    if len(sequences) < 4 or any(len(tokens) < 2 for tokens in sequences):
        raise ValueError("low_rank is calibrated on at least 4 sequences of at least 2 tokens")
    fitted = []
    for layer, (ffn, inputs) in enumerate(ffn_inputs(model, sequences), 1):
        progress(f"fitting predictors, layer {layer} of {model.config.n_layers}")
        parts = CalibrationInputs(
            torch.cat([x for i, x in enumerate(inputs) if i % 4 in _FIT]),
            torch.cat([x[1:] for i, x in enumerate(inputs) if i % 4 in _THRESHOLD]),
            torch.cat([x[1:] for i, x in enumerate(inputs) if i % 4 in _REPORT]),
        )
        fitted.append(fit_low_rank(ffn.gate, ffn.activation, parts, settings))
    return fitted


def fit_sign_predictors(
    model: Transformer,
    sequences: Sequence[torch.Tensor],
    recall: float,
    progress: Callable[[str], None] = lambda _: None,
) -> list[SignBits]:
    """SignBits for every layer of a dense ReLU model, from its own inputs on sequences int64 [T].

    Three quarters of the sequences set the thresholds, a quarter measures what is reached; a
    sequence's first token counts for neither. ValueError as for `fit_low_rank_predictors`.
    """
    _check_dense(model)
    if len(sequences) < 4 or any(len(tokens) < 2 for tokens in sequences):
        raise ValueError("sign_bits is calibrated on at least 4 sequences of at least 2 tokens")
    fitted = []
    for layer, (ffn, inputs) in enumerate(ffn_inputs(model, sequences), 1):
        progress(f"fitting predictors, layer {layer} of {model.config.n_layers}")
        seen, held_out = (
            torch.cat([x[1:] for i, x in enumerate(inputs) if (i % 4 in _REPORT) == report]) for report in (False, True)
        )
        fitted.append(fit_sign_bits(ffn.gate, ffn.activation, seen, held_out, recall))
    return fitted


def fitted_predictors(fitted: Sequence[Predictor]) -> PredictorMaker:
    """The fitted predictors, one a layer."""
    return lambda layer, ffn: fitted[layer]


def ffn_inputs(model: Transformer, sequences: Sequence[torch.Tensor]) -> Iterator[tuple[DenseFFN, list[torch.Tensor]]]:
    """Per layer of a dense model, its FFN and that FFN's inputs float32 [T, D] for each sequence int64 [T].

    The sequences go through the layers side by side, so that one layer's inputs are held at a time.
    """
    walk = LayerWalk(model, sequences)
    for block in model.blocks:
        seen: list[torch.Tensor] = []
        ffn = cast(DenseFFN, block.ffn)
        hook = ffn.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        try:
            walk.advance()
        finally:
            hook.remove()
        yield ffn, seen


def _check_dense(model: Transformer) -> None:
    if any(not isinstance(ffn, DenseFFN) for ffn in model.ffns()):
        raise ValueError("predictors are calibrated on a dense model; this one is sparse already")


def transposed_down(layer: int, ffn: DenseFFN) -> tuple[QuantTensor, float]:
    """`down` of a layer, transposed here and now, and its error (see `transpose_weights`)."""
    return transpose_weights(ffn.down)


def sparsify(
    model: Transformer, predictors: PredictorMaker, plan: Plan | None = None, downs: DownMaker = transposed_down
) -> Transformer:
    """Replace every DenseFFN in place by a SparseFFN, or by a HybridFFN over the plan's hot and cold neurons.

    `downs` gives `down` as neuron-major rows. Returns the same model.
    """
    for layer, block in enumerate(model.blocks):
        dense = block.ffn
        if not isinstance(dense, DenseFFN):
            raise ValueError(f"layer {layer} is not dense: it has a {type(dense).__name__}")
        weights = FFNWeights(dense.gate, dense.up, *downs(layer, dense))
        sparse = SparseFFN(weights, predictors(layer, dense), dense.activation)
        block.ffn = sparse if plan is None else _hybrid(sparse, *plan.split(layer))
    return model


def input_major(layer: int, ffn: DenseFFN) -> InputMajorWeights:
    """The weights of a layer, transposed here and now."""
    gate, gate_error = transpose_weights(ffn.gate)
    up, up_error = (None, 0.0) if ffn.up is None else transpose_weights(ffn.up)
    down, down_error = transpose_weights(ffn.down)
    return InputMajorWeights(gate, up, down, max(gate_error, up_error), down_error)


def sparsify_inputs(
    model: Transformer, thresholds: Sequence[InputThreshold], weights: InputMajorMaker = input_major
) -> Transformer:
    """Replace every DenseFFN in place by an InputSparseFFN, thresholds one a layer. Returns the same model."""
    for layer, block in enumerate(model.blocks):
        dense = block.ffn
        if not isinstance(dense, DenseFFN):
            raise ValueError(f"layer {layer} is not dense: it has a {type(dense).__name__}")
        block.ffn = InputSparseFFN(weights(layer, dense), thresholds[layer], dense.activation)
    return model


def _hybrid(sparse: SparseFFN, hot: torch.Tensor, cold: torch.Tensor) -> HybridFFN:
    return HybridFFN(sparse.shard(hot), sparse.shard(cold, compensated=False))


def down_error(model: Transformer) -> float:
    """Relative RMS error that transposing `down` brought, the mean over layers; 0 where it was exact or not done."""
    errors = [parts[0].weights.down_error for ffn in model.ffns() if (parts := _parts(ffn))]
    return sum(errors) / len(errors) if errors else 0.0


def input_error(model: Transformer) -> float:
    """The same of gate and up, which input_threshold has transposed."""
    errors = [ffn.weights.input_error for ffn in model.ffns() if isinstance(ffn, InputSparseFFN)]
    return sum(errors) / len(errors) if errors else 0.0


def predictor_qualities(model: Transformer) -> list[PredictorQuality]:
    """Per layer, what its predictor reached on held-out tokens; empty for those not fitted to a recall."""
    predictors = [parts[0].predictor for ffn in model.ffns() if (parts := _shards(ffn))]
    return [one.quality for one in predictors if one.quality is not None]


@dataclass(frozen=True)
class LayerDensity:
    """Neurons computed in one layer, as a share of its N, since the last reset; or their worth (see InputActivity)."""

    layer: int
    active: float
    tokens: int
    n_neurons: int

    @property
    def density(self) -> float:
        return self.active / (self.tokens * self.n_neurons) if self.tokens else 1.0


def layer_densities(model: Transformer) -> list[LayerDensity]:
    """Per layer, what was computed since `reset_activity`; empty for a dense model."""
    densities = []
    for layer, ffn in enumerate(model.ffns()):
        parts = [part.activity for part in _parts(ffn)]
        if parts:
            active = sum(float(part.active) for part in parts)
            neurons = sum(part.n_neurons for part in parts)
            densities.append(LayerDensity(layer, active, parts[0].tokens, neurons))
    return densities


def density(model: Transformer) -> float:
    """Share of all FFN neurons that were computed; 1 for a dense model."""
    layers = layer_densities(model)
    total = sum(layer.tokens * layer.n_neurons for layer in layers)
    return sum(layer.active for layer in layers) / total if total else 1.0


def activities(model: Transformer) -> list[Activity]:
    """The counts of every sparse part of the model."""
    return [part.activity for ffn in model.ffns() for part in _parts(ffn)]


def predictor_bytes(model: Transformer) -> int:
    """Bytes of the predictors' own weights, which every token reads."""
    return sum(shard.predictor.own_bytes for ffn in model.ffns() for shard in _shards(ffn))


def reset_activity(model: Transformer) -> None:
    for activity in activities(model):
        activity.reset()


def _shards(ffn: torch.nn.Module) -> list[SparseFFN]:
    """The sparse parts of a layer's FFN: itself, a hybrid's two, or none of a dense one's."""
    return [module for module in ffn.modules() if isinstance(module, SparseFFN)]


def _parts(ffn: torch.nn.Module) -> Sequence[SparseFFN | InputSparseFFN]:
    """The parts of a layer's FFN that skip anything, and count what they do not."""
    return [ffn] if isinstance(ffn, InputSparseFFN) else _shards(ffn)
