"""Fits a model's predictors to a text, and keeps them in a solved directory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pinfer.config import Method, ModelConfig, RunConfig
from pinfer.engine.solved import CALIBRATION, PREDICTOR, Solved
from pinfer.engine.text import Text, cut, walk_settings
from pinfer.ffn import DenseFFN
from pinfer.formats import ModelFile
from pinfer.formats.powerinfer import factors, sparse_threshold
from pinfer.formats.tokenizer import Tokenizer
from pinfer.models import Transformer
from pinfer.predictors import MLP, GateOf, LowRankSettings, Packed, Predictor, pack, unpack
from pinfer.sparsify import (
    LEAST_SEQUENCES,
    SPARSITY_NEEDED,
    THRESHOLDED,
    fit_gate_threshold_predictors,
    fit_low_rank_predictors,
    fit_sign_predictors,
    fit_weighted_predictors,
)

STAGE, CALIBRATE = "predictor", "calibrate"
# Quantiles want more tokens than a closed form, and both more than some contexts hold. Twice as many
# take a tenth off the neurons that low_rank names beside the active ones, and twice the time.
FIT_TOKENS, THRESHOLD_TOKENS, FIT_SEQUENCE = 2048, 4096, 256
FIT_VERSION = 3  # of the rules that predictors are fitted by: what is kept of another is fitted anew


@dataclass(frozen=True)
class FitSettings:
    """How predictors are fitted: rank, recall and sparsity are low_rank's, recall is sign_bits' too.

    The thresholded methods are fitted for every sparsity at once.
    """

    method: Method
    rank: int = 128
    recall: float = 0.99
    sparsity: float | None = None

    @classmethod
    def of(cls, run: RunConfig, method: Method) -> FitSettings:
        """Those of a run whose method is resolved, without what that method does not look at."""
        if method in THRESHOLDED:
            return cls(method)
        if method == "sign_bits":
            return cls(method, recall=run.recall)
        return cls(method, run.predictor_rank, run.recall, run.sparsity)

    def check(self, config: ModelConfig) -> None:
        """ValueError where the model cannot take them."""
        if self.method == "low_rank":
            self.low_rank().check(config.activation, config.d_ffn, config.d_model)

    def low_rank(self) -> LowRankSettings:
        return LowRankSettings(self.rank, self.recall, self.sparsity)


def sequences_to_fit_on(
    method: Method, tokenizer: Tokenizer, text: Text, context: int, tokens: int | None = None
) -> list[torch.Tensor]:
    """Sequences int64 [T] of a text, as many tokens as the method wants if not said."""
    wanted = tokens or (THRESHOLD_TOKENS if method in SPARSITY_NEEDED else FIT_TOKENS)
    return cut(tokenizer, text, wanted, context, FIT_SEQUENCE, LEAST_SEQUENCES)


def fit_settings_key(how: FitSettings, model: Transformer, sequences: list[torch.Tensor], int8: bool) -> dict[str, Any]:
    """All that fitted predictors depend on beside the model's file, as plain data."""
    return dataclasses.asdict(how) | {"version": FIT_VERSION} | walk_settings(sequences, model, int8)


def fit_predictors(
    model: Transformer,
    how: FitSettings,
    sequences: Sequence[torch.Tensor],
    progress: Callable[[str], None] = lambda _: None,
) -> Sequence[Predictor]:
    """One predictor a layer for a dense model, from its activations on sequences int64 [T].

    Those of the thresholded methods name every neuron until `at_density` sets them. ValueError for a
    method or settings that the model cannot take.
    """
    if how.method == "gate_threshold":
        return fit_gate_threshold_predictors(model, sequences, progress)
    if how.method in ("weighted_threshold", "shift_threshold"):
        return fit_weighted_predictors(model, sequences, progress, shifted=how.method == "shift_threshold")
    if how.method == "low_rank":
        return fit_low_rank_predictors(model, sequences, how.low_rank(), progress)
    if how.method == "sign_bits":
        return fit_sign_predictors(model, sequences, how.recall, progress)
    raise ValueError(f"method {how.method} has nothing to fit")


def gates_of(model: Transformer) -> list[GateOf]:
    """What predictors read of a dense model, layer by layer."""
    dense = (ffn for ffn in model.ffns() if isinstance(ffn, DenseFFN))
    return [GateOf(ffn.gate, ffn.activation, ffn.gate_bias, ffn.cutoff) for ffn in dense]


def keep_predictors(
    solved: Solved, predictors: Sequence[Predictor], method: Method, settings: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Write fitted predictors, and how they came about, into a solved directory that is locked."""
    packed = pack(predictors)
    solved.write(
        PREDICTOR,
        packed.tensors,
        stage=STAGE,
        settings=settings | {"method": method},
        figures=figures | {"layers": packed.layers},
    )


def kept_predictors(solved: Solved, model: Transformer) -> list[Predictor]:
    """The predictors of a solved directory, for the dense model they were fitted to.

    ValueError if it has none, or they do not fit.
    """
    tensors = solved.read_tensors(PREDICTOR)
    layers = solved.stages[STAGE].figures["layers"]
    try:
        return unpack(Packed(tensors, layers), gates_of(model))
    except ValueError as problem:
        raise ValueError(f"{solved.path / PREDICTOR}: {problem}") from problem


def mlp_predictors(file: ModelFile, config: ModelConfig) -> list[MLP]:
    """The predictors that a file has of PowerInfer's form, one a layer, as views of it."""
    at_least = sparse_threshold(file)
    return [MLP(*factors(file, layer), at_least) for layer in range(config.n_layers)]


def kept_method(solved: Solved, asked: Method) -> Method:
    """The method of a solved directory's predictors; ValueError if there are none or another was asked for."""
    if STAGE not in solved.stages:
        raise ValueError(f"{solved.path}: no predictors in it; stages done: {', '.join(solved.stages) or 'none'}")
    method: Method = solved.stages[STAGE].settings["method"]
    if asked not in ("auto", method):
        raise ValueError(f"{solved.path}: its predictors are for method {method}, not {asked}")
    return method


def predictors_for(method: Method, solved: Solved) -> Solved | None:
    """The same directory if its predictors are for that method."""
    made_for = solved.stages[STAGE].settings.get("method") if STAGE in solved.stages else None
    return solved if made_for == method else None


def check_activation(solved: Solved, config: ModelConfig) -> None:
    """ValueError where a solved directory's predictors were made for another activation than the model runs with."""
    made_for = solved.stages[STAGE].settings.get("activation", config.activation)
    if made_for != config.activation:
        raise ValueError(
            f"{solved.path}: its predictors are for activation {made_for}, and the model runs with "
            f"{config.activation}: say --activation {made_for}"
        )


def kept_densities(solved: Solved) -> list[float] | None:
    """Per layer, the density that calibration chose for the directory's predictors; None without a calibration."""
    if CALIBRATE not in solved.stages:
        return None
    return [float(one) for one in solved.read_json(CALIBRATION)["densities"]]
