"""What solving a model will take, stage by stage, from one layer of it measured; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pinfer.engine import Engine
from pinfer.engine.fitting import fit_predictors
from pinfer.engine.generate import peak_rss_bytes
from pinfer.engine.measure import HEAP_GROWTH, dense_ffn, estimate_profile
from pinfer.engine.train import ffn_bytes
from pinfer.engine.train_estimate import estimate_training
from pinfer.models import LayerWalk
from pinfer.quality.calibrate import AROUND, PROBES, TRIALS
from pinfer.solve.parts import Parts
from pinfer.solve.predictors import PredictorPlan

MEASURED_LAYERS = 2  # fitted before one is timed: the first use of every kernel is not what later layers pay
LOGIT_BYTES = 3 * (64 << 20)  # of the dense and the sparse model, and their softmaxes


@dataclass(frozen=True)
class StageEstimate:
    """Time without the model's loading, peak memory of the process, and what lies on disk while the stage runs."""

    stage: str
    total_s: float
    layer_s: float
    peak_rss_bytes: int
    disk_bytes: int


class _Enough(Exception):
    pass


def estimate_predictors(engine: Engine, plan: PredictorPlan, sequences: Sequence[torch.Tensor]) -> StageEstimate:
    """Of fitting or training predictors on sequences int64 [T]."""
    if plan.train is not None:
        found = estimate_training(engine, sequences, plan.train)
        return StageEstimate("predictors", found.total_s, found.layer_s, found.peak_rss_bytes, found.disk_bytes)
    assert plan.fit is not None
    begun: list[float] = []

    def timed(_: str) -> None:
        begun.append(time.perf_counter())
        if len(begun) > MEASURED_LAYERS:
            raise _Enough

    started, n_layers, predictors = time.perf_counter(), engine.config.n_layers, None
    with engine.computing():
        try:
            predictors = fit_predictors(engine.model, plan.fit, sequences, timed)
        except _Enough:
            layer_s = begun[-1] - begun[-2]
    if predictors is not None:  # all there are
        layer_s = (time.perf_counter() - started) / n_layers
    own = _predictor_bytes(engine, plan)
    peak = round(HEAP_GROWTH * (peak_rss_bytes() + n_layers * own))
    return StageEstimate("predictors", n_layers * layer_s, layer_s, peak, n_layers * own)


def estimate_calibration(engine: Engine, plan: PredictorPlan, parts: Parts) -> StageEstimate:
    """Of calibrating to a quality, at most; another target takes less."""
    n_layers, tokens = engine.config.n_layers, [sum(map(len, part)) for part in (parts.search, parts.validation)]
    block_s, head_s = _token_times(engine, parts.search[0])
    blocks = tokens[0] * (n_layers + 1) / 2 * (len(AROUND) + 2) + PROBES * tokens[0] + (2 * TRIALS + 3) * tokens[1]
    passes = tokens[0] * (len(AROUND) + 2) / 2 + PROBES * tokens[0] / n_layers + (2 * TRIALS + 3) * tokens[1] / n_layers
    layer_s = block_s * blocks + head_s * passes
    residuals = 4 * engine.config.d_model * sum(tokens)
    own = 0 if plan.train is None else _predictor_bytes(engine, plan)
    peak = peak_rss_bytes() + 3 * residuals + LOGIT_BYTES + n_layers * own
    return StageEstimate("calibration", n_layers * layer_s, layer_s, round(HEAP_GROWTH * peak), 1 << 20)


def estimate_stages(
    engine: Engine, plan: PredictorPlan, parts: Parts, profiled: Sequence[torch.Tensor]
) -> list[StageEstimate]:
    """Of profile, predictors and calibration, in the order that they run in."""
    profile = estimate_profile(engine, profiled)
    return [
        StageEstimate("profile", profile.total_s, profile.layer_s, profile.peak_rss_bytes, profile.disk_bytes),
        estimate_predictors(engine, plan, parts.fit),
        estimate_calibration(engine, plan, parts),
    ]


def _predictor_bytes(engine: Engine, plan: PredictorPlan) -> int:
    """Of one layer's, about."""
    width, neurons = engine.config.d_model, engine.config.d_ffn
    if plan.train is not None:
        return round(ffn_bytes(dense_ffn(engine, 0)) * (plan.train.ffn_share or 0.05))
    if plan.method == "shift_threshold":
        return width * width * 34 // 32 + 16 * neurons
    return neurons * width // 8 if plan.method == "sign_bits" else 16 * neurons


def _token_times(engine: Engine, sequence: torch.Tensor) -> tuple[float, float]:
    """Seconds that a token takes in a block and in the head."""
    with engine.computing():
        walk = LayerWalk(engine.model, [sequence])
        walk.step(0)
        block_s = _timed(lambda: walk.step(0))
        state = engine.model.states(sequence, engine.model.new_cache())
        head_s = _timed(lambda: engine.model.logits(state[:16])) / 16
    return block_s / len(sequence), head_s


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
