"""Makes a dense model sparse: replaces each FFN by one that asks a predictor what to compute.

Modules are replaced; nothing is rebound. The dense baseline is the same model without this call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn

from pinfer.config import Method, ModelConfig
from pinfer.ffn import (
    Activity,
    DenseFFN,
    FFNWeights,
    HybridFFN,
    SparseFFN,
)
from pinfer.input_sparse_ffn import InputMajorWeights, InputSparseFFN
from pinfer.kernels.activation import CLAMPS_UP, ZERO_BELOW_ZERO
from pinfer.kernels.transpose import transpose_weights
from pinfer.models import Experts, LayerWalk, Transformer
from pinfer.neuron_major_ffn import NeuronMajorFFN
from pinfer.overlap import Lane
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
    fit_gate_threshold,
    fit_input_threshold,
    fit_low_rank,
    fit_sign_bits,
    fit_weighted_threshold,
)
from pinfer.quant import QuantTensor

# One predictor for each of `Transformer.ffns`, made from its number there, which without experts is the layer's, and the
# dense FFN.
PredictorMaker = Callable[[int, DenseFFN], Predictor]
# An FFN's `down` as rows [N, D], and the relative RMS error of that.
DownMaker = Callable[[int, DenseFFN], tuple[QuantTensor, float]]
# A layer's weights by what they are multiplied with.
InputMajorMaker = Callable[[int, DenseFFN], InputMajorWeights]

Progress = Callable[[str], None]
V = TypeVar("V")

LEAST_SEQUENCES = 4
LEAST_EXPERT_TOKENS = 16  # an expert that fewer were sent to is fitted on all of its layer's
# Methods whose predictors are fitted for every sparsity at once, and those that run at none of their own.
THRESHOLDED: tuple[Method, ...] = ("gate_threshold", "weighted_threshold", "shift_threshold")
SPARSITY_NEEDED: tuple[Method, ...] = (*THRESHOLDED, "input_threshold")
OF_EXPERTS: tuple[Method, ...] = ("dense", "exact", "gate_threshold")
# Of the sequences that low_rank is calibrated on, by number modulo 4: two parts to fit on, one for
# the threshold, one to report on.
_FIT, _THRESHOLD, _REPORT = (0, 2), (1,), (3,)


def resolve_method(method: Method, config: ModelConfig, sparsity: float | None) -> Method:
    """What `auto` means for this model; ValueError where a method cannot work with the other settings."""
    activation, fires = config.activation, config.activation in ZERO_BELOW_ZERO
    if method not in ("auto", *OF_EXPERTS):
        config.without_experts(f"method {method}")
    if method == "auto":
        if sparsity is None:
            return "exact" if fires else "dense"
        if not config.gated or config.experts:
            return "gate_threshold"
        return "weighted_threshold" if fires else "shift_threshold"
    needs_sparsity = method in SPARSITY_NEEDED or (method == "low_rank" and not fires)
    if needs_sparsity and sparsity is None:
        model = f" for a model whose activation is {activation}" if method == "low_rank" else ""
        raise ValueError(f"method {method} needs a sparsity{model}, such as 0.5")
    if method == "sign_bits" and not fires:
        raise ValueError(f"sign_bits needs a ReLU model; this one's activation is {activation}: try shift_threshold")
    if method == "shift_threshold" and activation in CLAMPS_UP:
        raise ValueError(f"shift_threshold has no meaning for {activation}, which clamps up products: try exact")
    if method in ("exact", "dense", "sign_bits") and sparsity is not None:
        raise ValueError(
            f"sparsity {sparsity:g} has no meaning for method {method}: "
            f"it applies to {', '.join(SPARSITY_NEEDED)} and low_rank"
        )
    return method


def exact_predictors(layer: int, ffn: DenseFFN) -> Predictor:
    """ExactPredictor for every layer; ValueError unless the model is ReLU-activated."""
    return ExactPredictor(ffn.gate, ffn.activation, **_of_gate(ffn))


def _of_gate(ffn: DenseFFN) -> dict[str, Any]:
    """What predictors take of the gate beside its matrix and its activation."""
    return {"gate_bias": ffn.gate_bias, "cutoff": ffn.cutoff}


def fit_gate_threshold_predictors(
    model: Transformer, sequences: Sequence[torch.Tensor], progress: Progress = lambda _: None
) -> list[GateThreshold]:
    """GateThreshold for every layer of a dense model, from its own inputs on sequences int64 [T], to be set by density."""

    def fit(ffn: DenseFFN, inputs: list[torch.Tensor]) -> GateThreshold:
        return fit_gate_threshold(ffn.gate, ffn.activation, _later(inputs), **_of_gate(ffn))

    return _fit_layers(model, sequences, fit, progress)


def fit_weighted_predictors(
    model: Transformer, sequences: Sequence[torch.Tensor], progress: Progress = lambda _: None, *, shifted: bool
) -> list[WeightedThreshold]:
    """WeightedThreshold for every layer, as `fit_gate_threshold_predictors`. ValueError where the FFN has no gate."""

    def fit(ffn: DenseFFN, inputs: list[torch.Tensor]) -> WeightedThreshold:
        if ffn.up is None:
            raise ValueError("this model's FFN has no gate to rank neurons by: try exact or low_rank")
        matrices = FFNMatrices(ffn.gate, ffn.up, ffn.down, ffn.activation, **_of_gate(ffn))
        return fit_weighted_threshold(matrices, _later(inputs), shifted=shifted)

    return _fit_layers(model, sequences, fit, progress)


def fit_input_thresholds(
    model: Transformer, sequences: Sequence[torch.Tensor], sparsity: float, progress: Progress = lambda _: None
) -> list[InputThreshold]:
    """InputThreshold for every layer, as `fit_gate_threshold_predictors`."""

    def fit(ffn: DenseFFN, inputs: list[torch.Tensor]) -> InputThreshold:
        return fit_input_threshold(_later(inputs), ffn.gate, ffn.up, ffn.activation, sparsity, **_of_gate(ffn))

    return _fit_layers(model, sequences, fit, progress)


def fit_low_rank_predictors(
    model: Transformer,
    sequences: Sequence[torch.Tensor],
    settings: LowRankSettings,
    progress: Progress = lambda _: None,
) -> list[LowRank]:
    """LowRank for every layer of a dense model, from its own inputs on sequences int64 [T].

    Half of the sequences, taken evenly from all over, are fitted on; a quarter sets the thresholds
    and a quarter measures what is reached. ValueError for fewer than four sequences.
    """

    def fit(ffn: DenseFFN, inputs: list[torch.Tensor]) -> LowRank:
        parts = CalibrationInputs(
            torch.cat([x for i, x in enumerate(inputs) if i % 4 in _FIT]),
            *(_later([x for i, x in enumerate(inputs) if i % 4 in part]) for part in (_THRESHOLD, _REPORT)),
        )
        return fit_low_rank(ffn.gate, ffn.activation, parts, settings, **_of_gate(ffn))

    _check_count("low_rank", sequences)
    return _fit_layers(model, sequences, fit, progress)


def fit_sign_predictors(
    model: Transformer, sequences: Sequence[torch.Tensor], recall: float, progress: Progress = lambda _: None
) -> list[SignBits]:
    """SignBits for every layer of a dense ReLU model, from its own inputs on sequences int64 [T].

    Three quarters of the sequences set the thresholds, a quarter measures what is reached.
    ValueError as for `fit_low_rank_predictors`.
    """

    def fit(ffn: DenseFFN, inputs: list[torch.Tensor]) -> SignBits:
        seen, held_out = (
            _later([x for i, x in enumerate(inputs) if (i % 4 in _REPORT) == report]) for report in (False, True)
        )
        return fit_sign_bits(ffn.gate, ffn.activation, seen, held_out, recall, **_of_gate(ffn))

    _check_count("sign_bits", sequences)
    return _fit_layers(model, sequences, fit, progress)


def _later(inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The inputs [T, D] of several sequences together, without their first tokens, whose activations are outliers."""
    return torch.cat([x[1:] for x in inputs])


def _check_count(method: str, sequences: Sequence[torch.Tensor]) -> None:
    if len(sequences) < LEAST_SEQUENCES:
        raise ValueError(f"{method} is calibrated on at least {LEAST_SEQUENCES} sequences, not {len(sequences)}")


def _fit_layers(
    model: Transformer,
    sequences: Sequence[torch.Tensor],
    fit: Callable[[DenseFFN, list[torch.Tensor]], V],
    progress: Progress,
) -> list[V]:
    """What `fit` makes of each layer's dense FFN and its inputs [T, D] for each sequence, one layer at a time.

    ValueError names the layer that cannot be fitted.
    """
    _check_dense(model)
    if any(len(tokens) < 2 for tokens in sequences):
        raise ValueError("calibration needs sequences of at least 2 tokens")
    fitted = []
    n_ffns = len(model.ffns())
    for number, (ffn, inputs) in enumerate(ffn_inputs(model, sequences)):
        layer = number * model.config.n_layers // n_ffns + 1
        progress(f"fitting predictors, layer {layer} of {model.config.n_layers}")
        try:
            fitted.append(fit(ffn, inputs))
        except ValueError as problem:
            raise ValueError(f"{model.ffn_name(number)}: {problem}") from problem
        if isinstance(ffn, NeuronMajorFFN):  # else the whole model's would be in memory by the last layer
            ffn.turn_back()
    return fitted


def fitted_predictors(fitted: Sequence[Predictor]) -> PredictorMaker:
    """The fitted predictors, one a layer."""
    return lambda layer, ffn: fitted[layer]


def ffn_inputs(model: Transformer, sequences: Sequence[torch.Tensor]) -> Iterator[tuple[DenseFFN, list[torch.Tensor]]]:
    """Every FFN of a dense model, in order, with its inputs float32 [T, D] for each sequence int64 [T].

    The sequences go through the layers side by side, so that one layer's inputs are held at a time. An expert's are
    those of the tokens that are sent to it, and of the first of each sequence.
    """
    walk = LayerWalk(model, sequences)
    for block in model.layers:
        seen: list[torch.Tensor] = []
        hook = block.ffn.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        try:
            walk.advance()
        finally:
            hook.remove()
        if isinstance(block.ffn, Experts):
            yield from _expert_inputs(block.ffn, seen)
        else:
            yield cast(DenseFFN, block.ffn), seen


def _expert_inputs(experts: Experts, seen: list[torch.Tensor]) -> Iterator[tuple[DenseFFN, list[torch.Tensor]]]:
    """Of a layer's inputs [T, D] by sequence, each expert's: of too few tokens, all, as if they had been sent to it."""
    chosen = [experts.routed(x)[1] for x in seen]
    for number, ffn in enumerate(experts.ffns):
        sent = [(to == number).any(1) for to in chosen]
        if sum(int(one[1:].sum()) for one in sent) < LEAST_EXPERT_TOKENS:
            sent = [torch.ones_like(one) for one in sent]
        for one in sent:
            one[0] = True  # a first token is left out by those who fit
        yield cast(DenseFFN, ffn), [x[one] for x, one in zip(seen, sent, strict=True)]


def _check_dense(model: Transformer) -> None:
    if any(not isinstance(ffn, DenseFFN) for ffn in model.ffns()):
        raise ValueError("predictors are calibrated on a dense model; this one is sparse already")


def transposed_down(layer: int, ffn: DenseFFN) -> tuple[QuantTensor, float]:
    """`down` of a layer, transposed here and now, and its error (see `transpose_weights`)."""
    return transpose_weights(ffn.down)


def sparsify(
    model: Transformer,
    predictors: PredictorMaker,
    plan: Plan | None = None,
    downs: DownMaker = transposed_down,
    *,
    lane: Lane | None = None,
    release: Callable[[QuantTensor], None] = lambda _: None,
) -> Transformer:
    """Replace every DenseFFN in place by a SparseFFN, or by a HybridFFN over the plan's hot and cold neurons.

    `downs` gives `down` as neuron-major rows. A layer whose neurons are all hot or all cold keeps its weights as they
    are; of one that is split, the shards are copies, and `release` is told of each matrix they were copied from. `lane`
    runs the cold shards. Returns the same model, all of it still where it was. ValueError for a plan of experts.
    """
    if plan is not None:
        model.config.without_experts("a plan")

    def replaced(number: int, dense: nn.Module) -> nn.Module:
        if not isinstance(dense, DenseFFN):
            raise ValueError(f"{model.ffn_name(number)} is not dense: it has a {type(dense).__name__}")
        down, error = downs(number, dense)
        weights = FFNWeights(dense.gate, dense.up, down, error, dense.gate_bias, dense.down_bias)
        sparse = SparseFFN(weights, predictors(number, dense), dense.activation, dense.cutoff)
        if plan is None or plan.layers[number].n_hot in (0, weights.n_neurons):
            return sparse
        hybrid = _hybrid(sparse, plan, number, lane)
        for weight in filter(None, (weights.gate, weights.up, weights.down)):
            release(weight)
        return hybrid

    model.replace_ffns(replaced)
    return model


def input_major(layer: int, ffn: DenseFFN) -> InputMajorWeights:
    """The weights of a layer, transposed here and now."""
    gate, gate_error = transpose_weights(ffn.gate)
    up, up_error = (None, 0.0) if ffn.up is None else transpose_weights(ffn.up)
    down, down_error = transpose_weights(ffn.down)
    errors = (max(gate_error, up_error), down_error)
    return InputMajorWeights(gate, up, down, *errors, ffn.gate_bias, ffn.down_bias)


def sparsify_inputs(
    model: Transformer, thresholds: Sequence[InputThreshold], weights: InputMajorMaker = input_major
) -> Transformer:
    """Replace every DenseFFN in place by an InputSparseFFN, thresholds one a layer. Returns the same model.

    ValueError for a model with experts.
    """
    model.config.without_experts("method input_threshold")
    for layer, block in enumerate(model.blocks):
        dense = block.ffn
        if not isinstance(dense, DenseFFN):
            raise ValueError(f"layer {layer} is not dense: it has a {type(dense).__name__}")
        block.ffn = InputSparseFFN(weights(layer, dense), thresholds[layer], dense.activation, dense.cutoff)
    return model


def _hybrid(sparse: SparseFFN, plan: Plan, layer: int, lane: Lane | None) -> HybridFFN:
    hot, cold = plan.split(layer)
    return HybridFFN.of(sparse, hot, [cold], lane, one_predictor=plan.layers[layer].predictor == "gpu")


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
    """Neurons computed in one layer, as a share of its N, since the last reset; or their worth (see InputActivity).

    Of a layer with experts N is one expert's, and a token counts for each expert that it was sent to.
    """

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
    for layer, block in enumerate(model.layers):
        parts = [part.activity for part in _parts(block.ffn)]
        if parts:
            active = sum(float(part.active) for part in parts)
            if isinstance(block.ffn, Experts):
                tokens, neurons = sum(part.tokens for part in parts), parts[0].n_neurons
            else:
                tokens, neurons = parts[0].tokens, sum(part.n_neurons for part in parts)
            densities.append(LayerDensity(layer, active, tokens, neurons))
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
    predictors = {id(shard.predictor): shard.predictor for ffn in model.ffns() for shard in _shards(ffn)}
    whole = sum(one.own_bytes for one in predictors.values())
    experts = model.config.experts
    return whole if experts is None else whole * experts.used // experts.count


def reset_activity(model: Transformer) -> None:
    for activity in activities(model):
        activity.reset()


def _shards(ffn: torch.nn.Module) -> list[SparseFFN]:
    """The sparse parts of a layer's FFN: itself, a hybrid's two, or none of a dense one's."""
    return [module for module in ffn.modules() if isinstance(module, SparseFFN)]


def _parts(ffn: torch.nn.Module) -> Sequence[SparseFFN | InputSparseFFN]:
    """The parts of a layer's FFN that skip anything, and count what they do not."""
    return [ffn] if isinstance(ffn, InputSparseFFN) else _shards(ffn)
