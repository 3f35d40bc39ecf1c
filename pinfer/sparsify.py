"""Makes a dense model sparse: replaces each FFN by one that asks a predictor what to compute.

Modules are replaced; nothing is rebound. The dense baseline is the same model without this call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pinfer.config import Method
from pinfer.ffn import DenseFFN, FFNWeights, HybridFFN, SparseFFN
from pinfer.kernels.transpose import transpose_weights
from pinfer.models import KVCache, Transformer
from pinfer.placement import Plan
from pinfer.predictors import ZERO_BELOW_ZERO, ExactPredictor, GateThreshold, Predictor, gate_threshold_for

# One predictor a layer, made from the layer's number and its dense FFN.
PredictorMaker = Callable[[int, DenseFFN], Predictor]


def resolve_method(method: Method, activation: str, sparsity: float | None) -> Method:
    """What `auto` means for this model; ValueError where a method cannot work with the other settings."""
    if method == "auto":
        if sparsity is not None:
            return "gate_threshold"
        return "exact" if activation in ZERO_BELOW_ZERO else "dense"
    if method == "gate_threshold" and sparsity is None:
        raise ValueError("method gate_threshold needs a sparsity, such as 0.5")
    if method in ("exact", "dense") and sparsity is not None:
        raise ValueError(f"sparsity {sparsity:g} has no meaning for method {method}: it applies to gate_threshold")
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

    if any(not isinstance(ffn, DenseFFN) for ffn in model.ffns()):
        raise ValueError("thresholds are calibrated on a dense model; this one is sparse already")
    if tokens.shape[0] < 2:
        raise ValueError(f"calibration needs at least 2 tokens, not {tokens.shape[0]}")
    hooks = [ffn.register_forward_pre_hook(measure) for ffn in model.ffns()]
    try:
        model(tokens, KVCache(model.config, tokens.shape[0]), last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    return thresholds


def sparsify(model: Transformer, predictors: PredictorMaker, plan: Plan | None = None) -> Transformer:
    """Replace every DenseFFN in place by a SparseFFN, or by a HybridFFN over the plan's hot and cold neurons.

    Returns the same model. `down` is transposed to neuron-major rows on the way (see `transpose`).
    """
    for layer, block in enumerate(model.blocks):
        dense = block.ffn
        if not isinstance(dense, DenseFFN):
            raise ValueError(f"layer {layer} is not dense: it has a {type(dense).__name__}")
        weights = FFNWeights(dense.gate, dense.up, *transpose_weights(dense.down))
        sparse = SparseFFN(weights, predictors(layer, dense), dense.activation)
        block.ffn = sparse if plan is None else HybridFFN(*(sparse.shard(part) for part in plan.split(layer)))
    return model


def down_error(model: Transformer) -> float:
    """Relative RMS error that transposing `down` brought, the mean over layers; 0 where it was exact or not done."""
    errors = [parts[0].weights.down_error for ffn in model.ffns() if (parts := _shards(ffn))]
    return sum(errors) / len(errors) if errors else 0.0


@dataclass(frozen=True)
class LayerDensity:
    """Neurons computed in one layer, as a share of its N, since the last reset."""

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
        parts = [shard.activity for shard in _shards(ffn)]
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


def reset_activity(model: Transformer) -> None:
    for ffn in model.ffns():
        for shard in _shards(ffn):
            shard.activity.reset()


def _shards(ffn: torch.nn.Module) -> list[SparseFFN]:
    """The sparse parts of a layer's FFN: itself, a hybrid's two, or none of a dense one's."""
    return [module for module in ffn.modules() if isinstance(module, SparseFFN)]
