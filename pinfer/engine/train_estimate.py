"""What training a model's predictors will take, from one layer sampled and a few steps on it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pinfer.engine.generate import peak_rss_bytes
from pinfer.engine.load import Engine
from pinfer.engine.measure import (
    DISK_BYTES_PER_S,
    HEAP_GROWTH,
    dense_ffn,
    layer_bytes,
    observed,
    release_layer,
    rss_bytes,
)
from pinfer.engine.pairs import RESIDENT_BYTES, CodedPairs, encode
from pinfer.engine.sample import sampled
from pinfer.engine.train import TrainSettings, plan_of
from pinfer.kernels.norms import column_norms
from pinfer.models import LayerWalk
from pinfer.predictors.low_rank import RANK_MULTIPLE
from pinfer.predictors.pair_source import PairSource
from pinfer.predictors.ranks import factor_bytes
from pinfer.predictors.training import LayerTraining, TrainingSettings
from pinfer.quant import BY_NAME, QuantTensor

MEASURED_STEPS = 3


@dataclass(frozen=True)
class TrainingEstimate:
    """What training will take: time without the model's loading, peak memory, and the checkpoint's folder at its largest.

    total_s: if no layer ends before its steps do. kept_tokens: of `tokens`, those that the disk budget
    lets be trained on or judged by. rank: about that of a layer.
    """

    tokens: int
    kept_tokens: int
    layers: int
    rank: int
    collect_s: float
    step_s: float
    layer_s: float
    total_s: float
    peak_rss_bytes: int
    disk_bytes: int


class _Held:
    """An Observer that keeps what it is shown as the files do, in memory."""

    def __init__(self, norms: torch.Tensor) -> None:
        self._norms = norms
        self.inputs, self.codes = list[torch.Tensor](), list[torch.Tensor]()

    def add(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, hidden: torch.Tensor) -> None:
        self.inputs.append(x.half())
        self.codes.append(encode(hidden.abs().mul_(self._norms)))

    def pairs(self) -> CodedPairs:
        inputs, codes = torch.cat(self.inputs), torch.cat(self.codes)
        return CodedPairs(inputs, codes, len(inputs) - max(1, len(inputs) // 8))


def estimate_training(engine: Engine, sequences: Sequence[torch.Tensor], settings: TrainSettings) -> TrainingEstimate:
    """Take some of the sequences int64 [T] through one layer and a few steps; nothing is written. ValueError as `train`."""
    settings.check(engine)
    plan = plan_of(engine, sequences, settings)
    n_layers = engine.config.n_layers
    sizes = [layer_bytes(engine, layer) for layer in range(n_layers)]
    with engine.computing():
        walk = LayerWalk(engine.model, sequences)
        walk.step(0)  # the first use of every kernel
        release_layer(engine, 0)
        walk.layer = min(1, n_layers - 1)
        pairs, token_s = _sampled_pairs(engine, walk)
    factors = dataclasses.replace(settings.factors, rank=_usual_rank(engine, settings))
    spent = _Spent.on(pairs, dense_ffn(engine, walk.layer).gate, factors)
    residuals = sum(residual.nbytes for residual in walk.residuals)
    collect_s = token_s * (plan.counted + len(sequences)) * statistics.fmean(sizes) / sizes[walk.layer]
    measurements = -(-factors.steps // factors.measure_every)
    written = 2 * plan.nbytes + residuals + measurements * spent.state_bytes  # the files are read as well
    train_s = spent.start_s + factors.steps * spent.step_s
    judge_s = (measurements + 1) * (plan.kept - plan.tokens) * spent.judge_token_s
    layer_s = collect_s + train_s + judge_s + written / DISK_BYTES_PER_S
    # A layer's spectrum, from which its rank is chosen, takes about as long as its start.
    chosen_s = 0.0 if settings.ffn_share is None else spent.start_s
    peak = max(peak_rss_bytes() + min(plan.nbytes, RESIDENT_BYTES), rss_bytes() + 2 * residuals)
    return TrainingEstimate(
        tokens=sum(len(one) for one in sequences),
        kept_tokens=plan.kept,
        layers=n_layers,
        rank=factors.rank,
        collect_s=collect_s,
        step_s=spent.step_s,
        layer_s=layer_s,
        total_s=n_layers * (layer_s + chosen_s),
        peak_rss_bytes=round(HEAP_GROWTH * (peak + max(sizes) - sizes[walk.layer] + n_layers * spent.result_bytes)),
        disk_bytes=plan.nbytes + 2 * (residuals + spent.state_bytes) + n_layers * spent.result_bytes,
    )


@dataclass(frozen=True)
class _Spent:
    """What the start of a layer's training, a step and a token judged took, and what it keeps."""

    start_s: float
    step_s: float
    judge_token_s: float
    state_bytes: int
    result_bytes: int

    @classmethod
    def on(cls, pairs: PairSource, gate: QuantTensor, settings: TrainingSettings) -> _Spent:
        start_s, training = _timed(lambda: LayerTraining(pairs, gate, settings))
        training.take_step()
        step_s = statistics.median(_timed(training.take_step)[0] for _ in range(MEASURED_STEPS))
        judge_s, _ = _timed(training.measure)
        state = sum(tensor.nbytes for tensor in training.state().values())
        result = factor_bytes(settings.rank, *gate.shape, BY_NAME[settings.weight_type]) + 4 * gate.rows
        return cls(start_s, step_s, judge_s / pairs.validation_tokens, state, result)


def _usual_rank(engine: Engine, settings: TrainSettings) -> int:
    """The rank that every layer has, or about the mean of what fills the budget."""
    if settings.ffn_share is None:
        return settings.factors.rank
    ranks = settings.ranks_of_equals(engine)
    return RANK_MULTIPLE * round(sum(ranks) / (RANK_MULTIPLE * len(ranks)))


def _sampled_pairs(engine: Engine, walk: LayerWalk) -> tuple[CodedPairs, float]:
    """Pairs of the walk's next layer on some of the sequences, and the time a token took."""
    held = _Held(column_norms(dense_ffn(engine, walk.layer).down))
    numbers = sampled([len(residual) for residual in walk.residuals])
    with observed(engine, walk.layer, held):
        started = time.perf_counter()
        for number in numbers:
            walk.step(number)
        spent_s = time.perf_counter() - started
    return held.pairs(), spent_s / sum(len(walk.residuals[number]) for number in numbers)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result
