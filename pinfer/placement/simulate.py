"""Plays one token through a plan: which device does what when, and how much of a token each of them works.

Times are those of `problem.evaluate`: bytes over bandwidth, the hand-over of layers that are split. They hold the
mean number of named neurons. A real token names more here and fewer there, and E[max(T_gpu, T_cpu)] >= max(E[T_gpu],
E[T_cpu]): the difference is `spread_s`, for neurons that are named independently of one another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pinfer.placement.plan import LayerPlan, Place, Plan
from pinfer.placement.problem import LayerTime, Problem, TokenTime, evaluate, speed
from pinfer.placement.shape import LayerShape

GPU: Place = "gpu"
CPU: Place = "cpu"
Part = Literal["attention", "predictor", "hot", "cold", "hand-over", "crossing", "head"]


@dataclass(frozen=True)
class Span:
    """Seconds, from the token's start, in which a lane does one part of a layer (None: of no layer)."""

    lane: Literal["gpu", "cpu", "link"]
    part: Part
    layer: int | None
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Simulation:
    """One decoded token: its times by layer, its timeline in order of starts, and what the spread of counts adds."""

    time: TokenTime
    spans: tuple[Span, ...]
    spread_s: float

    @property
    def token_s(self) -> float:
        return self.time.total_s

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s if self.token_s > 0 else math.inf

    def busy(self, lane: str) -> float:
        """The share of the token in which a lane works."""
        worked = math.fsum(span.end_s - span.start_s for span in self.spans if span.lane == lane)
        return worked / self.token_s if self.token_s > 0 else 0.0


def simulate(problem: Problem, plan: Plan) -> Simulation:
    """A token under a plan; ValueError for a plan of another shape."""
    time = evaluate(problem, plan)
    layers = zip(problem.shape.layers, plan.layers, problem.rates, time.layers, strict=True)
    spread = math.fsum(_spread_s(problem, *one) for one in layers)
    return Simulation(time, tuple(_spans(plan, time)), spread)


def _spans(plan: Plan, time: TokenTime) -> Iterator[Span]:
    now = 0.0
    for number, (layer, spent) in enumerate(zip(plan.layers, time.layers, strict=True)):
        yield from _span(layer.attention, "attention", number, now, spent.attention_s)
        now += spent.attention_s
        predicts: Place = layer.attention if layer.predictor == "split" else layer.predictor
        yield from _span(predicts, "predictor", number, now, spent.predictor_s)
        now += spent.predictor_s
        yield from _span("gpu", "hot", number, now, spent.gpu_s)
        yield from _span("cpu", "cold", number, now, spent.cpu_s)
        now += max(spent.gpu_s, spent.cpu_s)
        yield from _span("link", "hand-over", number, now, spent.sync_s)
        now += spent.sync_s
    yield from _span("link", "crossing", None, now, time.crossings_s)
    yield from _span(plan.head, "head", None, now + time.crossings_s, time.head_s)


def _span(
    lane: Literal["gpu", "cpu", "link"], part: Part, layer: int | None, now: float, seconds: float
) -> Iterator[Span]:
    if seconds > 0:
        yield Span(lane, part, layer, now, now + seconds)


def _spread_s(problem: Problem, shape: LayerShape, plan: LayerPlan, rates: np.ndarray, time: LayerTime) -> float:
    """E[max] - max of the means for two independent normals (Clark 1961, "The greatest of a finite set of random
    variables"): sums of many independent neurons are near to normal."""
    hot = plan.hot.numpy()
    variance = 0.0
    for place, named in ((GPU, rates[hot]), (CPU, rates[~hot])):
        each_s = shape.on(place).active_bytes / speed(problem.hardware, place)
        variance += float((named * (1 - named)).sum()) * each_s**2
    deviation = math.sqrt(variance)
    if deviation == 0 or not (time.gpu_s > 0 and time.cpu_s > 0):
        return 0.0
    ahead = abs(time.gpu_s - time.cpu_s) / deviation
    density = math.exp(-0.5 * ahead**2) / math.sqrt(2 * math.pi)
    return deviation * (density - ahead * 0.5 * math.erfc(ahead / math.sqrt(2)))
