"""The predictor stage: fitted to a text or trained on it, by what the method needs, and kept in the solved directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pinfer.config import Method, ModelConfig
from pinfer.engine import Engine
from pinfer.engine.fitting import (
    STAGE,
    FitSettings,
    fit_predictors,
    fit_settings_key,
    gates_of,
    keep_predictors,
    kept_predictors,
)
from pinfer.engine.solved import Solved
from pinfer.engine.text import walk_settings
from pinfer.engine.train import LayerResult, TrainSettings, Watcher, remove_checkpoint, train
from pinfer.kernels.activation import CLAMPS_UP, ZERO_BELOW_ZERO
from pinfer.predictors import GateOf, LowRank, Predictor, PredictorQuality
from pinfer.quant import Q4_0
from pinfer.sparsify import THRESHOLDED

ENOUGH_RECALL = 0.995  # weighted, that trained predictors are set to before any calibration


@dataclass(frozen=True)
class PredictorPlan:
    """How a model's predictors come about: `train` for low_rank, else `fit`."""

    method: Method
    fit: FitSettings | None
    train: TrainSettings | None

    @classmethod
    def of(cls, method: Method, config: ModelConfig, recall: float, training: TrainSettings) -> PredictorPlan:
        """For a method, or for the one that suits the model best (auto).

        ValueError for a method without predictors, or one that the model cannot take.
        """
        config.without_experts("a directory of predictors")
        fires = config.activation in ZERO_BELOW_ZERO
        if method == "auto":
            trainable = config.d_model % Q4_0.block_size == 0
            of_others: Method = "shift_threshold" if config.gated else "gate_threshold"
            method = of_others if not fires else "low_rank" if trainable else "sign_bits"
        if method == "low_rank":
            return cls(method, None, training)
        if method == "sign_bits" and not fires:
            raise ValueError(
                f"sign_bits needs a ReLU model; this one's activation is {config.activation}: try shift_threshold"
            )
        if method not in (*THRESHOLDED, "sign_bits"):
            raise ValueError(f"method {method} has no predictors to fit or train")
        if method == "shift_threshold" and config.activation in CLAMPS_UP:
            raise ValueError(
                f"shift_threshold has no meaning for {config.activation}, which clamps up products: try low_rank"
            )
        if method in ("weighted_threshold", "shift_threshold") and not config.gated:
            raise ValueError(f"{method} ranks neurons by their gate, and this model's FFN has none: try gate_threshold")
        if training.sparsity is not None or training.ffn_share is None:
            given = f"rank {training.factors.rank}" if training.sparsity is None else f"sparsity {training.sparsity:g}"
            raise ValueError(f"{given} has no meaning for {method}, which is not trained: it applies to low_rank")
        return cls(method, FitSettings(method, recall=recall) if method == "sign_bits" else FitSettings(method), None)

    def settings(self, engine: Engine, sequences: list[torch.Tensor]) -> dict[str, Any]:
        """All that the predictors depend on beside the model, as plain data."""
        if self.fit is not None:
            return fit_settings_key(self.fit, engine.model, sequences, engine.int8)
        assert self.train is not None
        return asdict(self.train) | walk_settings(sequences, engine.model, engine.int8)


def make_predictors(
    engine: Engine, solved: Solved, plan: PredictorPlan, sequences: list[torch.Tensor], watcher: Watcher | None = None
) -> Sequence[Predictor]:
    """The predictors of a dense model from sequences int64 [T], into a solved directory; those that are there already stay.

    Training goes on from where an interrupted run stopped. ValueError as `fit_predictors` and `train`,
    and while another process writes into the directory.
    """
    watcher = watcher or Watcher()
    settings = {**plan.settings(engine, sequences), "method": plan.method}
    with solved.lock():
        done = solved.stages.get(STAGE)
        if done is not None and done.settings == settings:
            watcher.note(f"{solved.path} holds these predictors already")
            return kept_predictors(solved, engine.model)
        if done is not None:
            watcher.note(f"{solved.path} holds predictors of another text or other settings, to be replaced")
        if plan.train is not None:
            found, figures = _trained(engine, solved, plan.train, sequences, watcher)
        else:
            assert plan.fit is not None
            with engine.computing():
                found, figures = list(fit_predictors(engine.model, plan.fit, sequences, watcher.note)), {}
        keep_predictors(solved, found, plan.method, settings, figures)
        if plan.train is not None:  # what another method finds there may be gone on with
            remove_checkpoint(solved.path)
    return found


def _trained(
    engine: Engine, solved: Solved, settings: TrainSettings, sequences: list[torch.Tensor], watcher: Watcher
) -> tuple[list[Predictor], dict[str, Any]]:
    results = train(engine, solved.path, sequences, settings, watcher)
    found: list[Predictor] = [
        trained_predictor(result, gate) for result, gate in zip(results, gates_of(engine.model), strict=True)
    ]
    return found, training_figures(results)


def trained_predictor(result: LayerResult, of: GateOf) -> LowRank:
    """A layer's trained factors as a predictor, set to the least density judged that ENOUGH_RECALL is reached at."""
    trained, figures = result.trained, result.trained.figures
    reached = [one for one in figures.frontier if one.weighted_recall >= ENOUGH_RECALL] or [figures.frontier[-1]]
    density = min(1.0, reached[0].named * figures.density)
    predictor = LowRank(
        trained.first,
        trained.second,
        trained.cuts.threshold(density),
        of.activation,
        by_magnitude=False,
        quality=PredictorQuality(reached[0].recall, figures.density, density),
        cuts=trained.cuts,
        cutoff=of.cutoff,
    )
    predictor.density = density
    return predictor


def training_figures(results: Sequence[LayerResult]) -> dict[str, Any]:
    """What training reached on its validation tokens, as plain data."""
    return {
        "rank": [result.rank for result in results],
        "predictor_bytes": sum(result.predictor_bytes for result in results),
        "ffn_bytes": sum(result.ffn_bytes for result in results),
        "steps": [result.trained.figures.steps for result in results],
        "layer_density": [result.trained.figures.density for result in results],
        "frontier": [[one._asdict() for one in result.trained.figures.frontier] for result in results],
    }


def with_rank(settings: TrainSettings, rank: int | None) -> TrainSettings:
    """The settings with one rank for every layer, in place of the budget's choice; None leaves them."""
    return settings if rank is None else replace(settings, factors=replace(settings.factors, rank=rank), ffn_share=None)
