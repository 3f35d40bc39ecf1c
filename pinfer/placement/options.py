"""A layer's ways to be placed, each with its time and its bytes on the GPU as functions of how many neurons are hot.

Within one way the hottest neurons are the hot ones, and the time falls convexly with their number H up to the balance of
both devices: the CPU's part C(H) is convex and falling, the GPU's part G(H) rises, and beyond their crossing more hot
neurons cost time and memory both. So a way is a point or a convex curve, and at a price for memory (seconds a byte)
the best H is found by one search among the sorted rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pinfer.placement.memory import placed_items
from pinfer.placement.plan import LayerPlan, Place, PredictorPlace
from pinfer.placement.problem import Problem, attention_s, ffn_s, head_s, hot_prefix, logits_s, predictor_s
from pinfer.placement.shape import LayerShape


class Way(NamedTuple):
    """Where a layer's attention is, who predicts, and how many neurons are hot: none, some or all."""

    home: Place
    predictor: PredictorPlace
    hot: str


# Who has all neurons predicts for them, and the CPU never for both: it is the slower one.
WAYS = (
    Way("gpu", "cpu", "none"),
    Way("gpu", "split", "some"),
    Way("gpu", "gpu", "some"),
    Way("gpu", "split", "all"),
    Way("cpu", "cpu", "none"),
    Way("cpu", "split", "some"),
    Way("cpu", "gpu", "some"),
    Way("cpu", "split", "all"),
)
WHOLE = WAYS.index(Way("gpu", "split", "all"))
ON_GPU = np.array([way.home == "gpu" for way in WAYS])


@dataclass(frozen=True, eq=False)
class Curve:
    """Seconds and bytes of one way for H = least … most, where the last is the balance or all but one.

    seconds: float64 [most - least + 1], falling and convex. slopes: float64 [most - least], what each further neuron
    adds, below 0 and never falling. first_bytes: at H = least. unit_bytes: of a further neuron. floor_s: no choice of neurons
    whatever takes less. balance: the fractional H, above `least`, at which hottest-first would reach it.
    """

    least: int
    seconds: np.ndarray
    slopes: np.ndarray
    first_bytes: int
    unit_bytes: int
    floor_s: float
    balance: float

    @property
    def most(self) -> int:
        return self.least + len(self.slopes)

    def counts(self, prices: np.ndarray) -> np.ndarray:
        """The best H int64 [K] at prices float64 [K]; among equals the largest."""
        return self.least + np.searchsorted(self.slopes, -prices * self.unit_bytes, side="right")

    def time(self, counts: np.ndarray) -> np.ndarray:
        return self.seconds[counts - self.least]

    def bytes(self, counts: np.ndarray) -> np.ndarray:
        return self.first_bytes + self.unit_bytes * (counts - self.least)

    def floor(self, prices: np.ndarray) -> np.ndarray:
        """Float64 [K]: at most seconds + price · bytes of any choice of neurons, not of the hottest alone.

        Of H neurons whatever, C is least for the hottest, and max(G, C) is never below the balance: a convex function
        whose corners are the whole numbers up to the balance, and the balance.
        """
        counts = np.minimum(self.counts(prices), max(self.least, int(self.balance)))
        at_counts = np.maximum(self.time(counts), self.floor_s) + prices * self.bytes(counts)
        at_balance = self.floor_s + prices * (self.first_bytes + self.unit_bytes * (self.balance - self.least))
        return np.minimum(at_counts, at_balance)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's ways, in the order of WAYS; None where a way does not exist or is not allowed."""

    rates: np.ndarray
    curves: tuple[Curve | None, ...]

    def plan(self, way: int, count: int) -> LayerPlan:
        chosen = WAYS[way]
        return LayerPlan(chosen.home, hot_prefix(self.rates, count), chosen.predictor)


def layer_ways(problem: Problem, number: int, hottest: np.ndarray, *, pinned: bool) -> Layer:
    """The ways of layer `number`. hottest: its rates float64 [N], falling. pinned: it must be whole on the GPU."""
    held = np.concatenate([[0.0], np.cumsum(hottest)])
    parts = {predicts: _Parts.of(problem, problem.shape.layers[number], held, predicts) for predicts in (True, False)}
    return Layer(
        problem.rates[number],
        tuple(
            None if pinned and index != WHOLE else _curve(problem, problem.shape.layers[number], hottest, parts, way)
            for index, way in enumerate(WAYS)
        ),
    )


def head_ways(problem: Problem, *, pinned: bool) -> Layer:
    """The head as a last layer without neurons: whole on the GPU, or on the CPU."""
    on_gpu = _point(head_s(problem, "gpu") + logits_s(problem), problem.shape.head("gpu"))
    on_cpu = None if pinned else _point(head_s(problem, "cpu"), 0)
    ways: list[Curve | None] = [None] * len(WAYS)
    ways[WHOLE], ways[WAYS.index(Way("cpu", "cpu", "none"))] = on_gpu, on_cpu
    return Layer(np.empty(0), tuple(ways))


def _curve(
    problem: Problem, layer: LayerShape, hottest: np.ndarray, parts: dict[bool, _Parts | None], way: Way
) -> Curve | None:
    """One way as a curve or a point; None where it does not exist."""
    n, total = layer.n_neurons, float(hottest.sum())
    if way.predictor == "gpu" and not layer.own_predictor:
        return None
    fixed = attention_s(problem, layer, way.home)
    if way.predictor != "split":
        fixed += predictor_s(problem, layer, way.predictor)
    if way.hot != ("all" if way.home == "gpu" else "none"):
        fixed += problem.hardware.sync_s

    def count(n_hot: int) -> int:
        return sum(placed_items(layer, way.home, way.predictor, n_hot, "gpu", problem.context).values())

    if way.hot == "none":
        return _point(fixed + ffn_s(problem, layer, "cpu", n, total, predicts=False, compensates=True), count(0))
    if way.hot == "all":
        return _point(fixed + ffn_s(problem, layer, "gpu", n, total, predicts=True, compensates=True), count(n), n)
    split = parts[way.predictor == "split"]
    if split is None:
        return None
    seconds = fixed + np.maximum(split.gpu, split.cpu)[: split.most]
    slopes = -(split.a_neuron_s + split.a_name_s * hottest[1 : split.most])
    if len(slopes):
        slopes[-1] = max(slopes[-1], seconds[-1] - seconds[-2])  # the GPU's part may be the longer one at the last
    return Curve(1, seconds, slopes, count(1), count(2) - count(1), fixed + split.floor_s, split.balance)


def _point(seconds: float, count: int, neurons: int = 0) -> Curve:
    return Curve(neurons, np.array([seconds]), np.empty(0), count, 0, seconds, float(neurons))


@dataclass(frozen=True, eq=False)
class _Parts:
    """A split layer's parts, float64 [N - 1]: seconds on either device for H = 1 … N - 1.

    most: the H of the least maximum. a_neuron_s, a_name_s: what a neuron takes off the CPU, and each naming of it.
    floor_s: the least maximum of any choice of neurons. balance: the fractional H, 1 to N - 1, of that of hottest-first.
    """

    gpu: np.ndarray
    cpu: np.ndarray
    most: int
    a_neuron_s: float
    a_name_s: float
    floor_s: float
    balance: float

    @classmethod
    def of(cls, problem: Problem, layer: LayerShape, held: np.ndarray, predicts: bool) -> _Parts | None:
        """held: float64 [N + 1], rates of the hottest 0 … N. predicts: each device predicts for its own neurons. None
        where one device cannot predict for both, or there is nothing to split."""
        n = layer.n_neurons
        if n < 2 or not (predicts or layer.own_predictor):
            return None
        hot = np.arange(n + 1)
        gpu = _Rate.of(problem, layer, "gpu", predicts)
        cpu = _Rate.of(problem, layer, "cpu", predicts)
        on_gpu, on_cpu = gpu.seconds(hot, held), cpu.seconds(n - hot, held[-1] - held)
        balance, floor_s = _balance(on_gpu, on_cpu)
        if gpu.a_neuron_s * cpu.a_name_s < gpu.a_name_s * cpu.a_neuron_s:  # colder neurons would balance earlier
            floor_s = min(floor_s, _least_maximum(gpu, cpu, n, float(held[-1])))
        if balance > n - 1:
            floor_s = max(floor_s, float(on_cpu[n - 1]))
        on_gpu, on_cpu = on_gpu[1:n], on_cpu[1:n]
        most = int(np.argmin(np.maximum(on_gpu, on_cpu))) + 1
        return cls(on_gpu, on_cpu, most, cpu.a_neuron_s, cpu.a_name_s, floor_s, min(max(balance, 1.0), n - 1.0))


class _Rate(NamedTuple):
    """One device's seconds for its part: so much whatever it is, for each neuron, for each that is named."""

    base_s: float
    a_neuron_s: float
    a_name_s: float

    @classmethod
    def of(cls, problem: Problem, layer: LayerShape, place: Place, predicts: bool) -> _Rate:
        """`ffn_s` of a split layer is linear in its neurons and in those named."""

        def seconds(neurons: int, named: float) -> float:
            return ffn_s(problem, layer, place, neurons, named, predicts=predicts, compensates=place == "gpu")

        a_neuron = seconds(2, 0.0) - seconds(1, 0.0)
        return cls(seconds(1, 0.0) - a_neuron, a_neuron, seconds(1, 1.0) - seconds(1, 0.0))

    def seconds(self, neurons: np.ndarray, named: np.ndarray) -> np.ndarray:
        return self.base_s + self.a_neuron_s * neurons + self.a_name_s * named


def _balance(gpu: np.ndarray, cpu: np.ndarray) -> tuple[float, float]:
    """The fractional H where the parts float64 [N + 1] cross, and their seconds there; gpu - cpu rises with H."""
    after = int(np.searchsorted(gpu - cpu, 0.0))
    if after in (0, len(gpu)):
        end = min(after, len(gpu) - 1)
        return float(end), float(max(gpu[end], cpu[end]))
    (g0, g1), (c0, c1) = gpu[after - 1 : after + 1], cpu[after - 1 : after + 1]
    share = (c0 - g0) / ((c0 - g0) + (g1 - c1))
    return after - 1 + float(share), float(c0 + share * (c1 - c0))


def _least_maximum(gpu: _Rate, cpu: _Rate, n: int, total: float) -> float:
    """Below the longer part of every split: all CPU seconds could move at the better of the two exchange rates."""
    rates = [(g / c) for g, c in ((gpu.a_neuron_s, cpu.a_neuron_s), (gpu.a_name_s, cpu.a_name_s)) if c > 0]
    exchange, movable = min(rates, default=0.0), cpu.a_neuron_s * n + cpu.a_name_s * total
    moved = min(max((cpu.base_s + movable - gpu.base_s) / (1 + exchange), 0.0), movable)
    return max(gpu.base_s + exchange * moved, cpu.base_s + movable - moved)
