"""The Lagrangian relaxation: memory at a price instead of a budget.

At a price of p seconds a byte every layer takes its best way and its best number of hot neurons by itself, but for the
crossings between neighbours, which a shortest path over the layers accounts for (two states: where the residual is).
For every p, min Σ(seconds + p · bytes) - p · capacity is below the time of every placement that fits (Geoffrion 1974),
and a minimiser is the fastest of all that take no more memory than it does. The memory of minimisers falls with p, so
a search over p brackets the budget between two of them. The prices tried do not depend on the budget but by
which bracket is entered, so that budgets in one bracket see the same two minimisers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pinfer.placement.options import ON_GPU, WAYS, Curve, Layer

GRID, ROUNDS, FINE = 256, 4, 48
WIDE = 4  # a range of prices by this factor is divided by ratios
LOWEST = 1e-9  # of the price of reading a byte on the CPU: less is free


class Tables(NamedTuple):
    """Float64 [layers, ways, K] at K prices: seconds, bytes and, as int64, hot neurons; infinite where there is no way."""

    seconds: np.ndarray
    bytes: np.ndarray
    counts: np.ndarray

    @classmethod
    def at(cls, layers: Sequence[Layer], prices: np.ndarray) -> Tables:
        shape = (len(layers), len(WAYS), len(prices))
        tables = cls(np.full(shape, np.inf), np.zeros(shape), np.zeros(shape, dtype=np.int64))
        for number, layer in enumerate(layers):
            for way, curve in enumerate(layer.curves):
                if curve is not None:
                    counts = curve.counts(prices)
                    tables.counts[number, way] = counts
                    tables.seconds[number, way] = curve.time(counts)
                    tables.bytes[number, way] = curve.bytes(counts)
        return tables


class Path(NamedTuple):
    """The best ways int64 [layers, K] at K prices, with their seconds (crossings included) and bytes float64 [K]."""

    ways: np.ndarray
    seconds: np.ndarray
    bytes: np.ndarray


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers in order, the head last. to_gpu_s, to_cpu_s: what a change of device between two of them costs."""

    layers: Sequence[Layer]
    to_gpu_s: float
    to_cpu_s: float

    def shortest(self, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The least sum float64 [K] of costs float64 [layers, ways, K] and crossings, and the ways int64 [layers, K]."""
        sides = (np.flatnonzero(~ON_GPU), np.flatnonzero(ON_GPU))  # a token starts on the CPU
        best = np.stack([side[costs[:, side].argmin(axis=1)] for side in sides])  # [2, layers, K]
        least = np.stack([costs[:, side].min(axis=1) for side in sides])
        stay, back = np.array([0.0, np.inf])[:, None] + np.zeros(costs.shape[-1]), []
        for number in range(len(costs)):
            to_cpu, to_gpu = stay[1] + self.to_cpu_s, stay[0] + self.to_gpu_s
            back.append(np.stack([to_cpu < stay[0], to_gpu >= stay[1]]).astype(np.int64))  # where from, 1: the GPU
            stay = np.stack([np.minimum(stay[0], to_cpu), np.minimum(stay[1], to_gpu)]) + least[:, number]
        side, column = (stay[1] < stay[0]).astype(np.int64), np.arange(costs.shape[-1])
        ways = np.empty((len(costs), costs.shape[-1]), dtype=np.int64)
        for number in reversed(range(len(costs))):
            ways[number] = best[side, number, column]
            side = back[number][side, column]
        return stay.min(axis=0), ways

    def at_home(self, on_gpu: np.ndarray) -> Chain:
        """The same with the attention of each layer, and the head, where bool [layers] says."""
        layers = [
            Layer(layer.rates, tuple(one if ON_GPU[way] == here else None for way, one in enumerate(layer.curves)))
            for layer, here in zip(self.layers, on_gpu, strict=True)
        ]
        return Chain(layers, self.to_gpu_s, self.to_cpu_s)

    def crossings_s(self, on_gpu: np.ndarray) -> np.ndarray:
        """Float64 [...] of homes bool [..., layers], where that is the GPU."""
        before = np.concatenate([np.zeros((*on_gpu.shape[:-1], 1), dtype=bool), on_gpu[..., :-1]], axis=-1)
        return self.to_gpu_s * (on_gpu & ~before).sum(-1) + self.to_cpu_s * (before & ~on_gpu).sum(-1)

    def path(self, prices: np.ndarray) -> Path:
        tables = Tables.at(self.layers, prices)
        _, ways = self.shortest(tables.seconds + prices * tables.bytes)
        seconds, count = (np.take_along_axis(one, ways[:, None], axis=1)[:, 0].sum(0) for one in tables[:2])
        return Path(ways, seconds + self.crossings_s(ON_GPU[ways.T]), count)

    def bound(self, prices: np.ndarray, capacity: int) -> float:
        """Seconds that no placement of any choice of neurons is below; the best that these prices prove."""
        return float((self.shortest(self._floors(prices))[0] - prices * capacity).max())

    def counted_bound(self, prices: np.ndarray, capacity: int, counted: np.ndarray) -> float:
        """The same, branching on how many layers are placed in a way of `counted`, bool [ways].

        Layers that are alike go over at one price, and the relaxation lets a fraction of one do so; with the number
        given each has a price of its own. The shortest paths of all numbers are found at once, the number being a
        second state.
        """
        floors = self._floors(prices)
        counts, n_prices = len(floors) + 1, len(prices)
        stay = np.full((2, counts, n_prices), np.inf)  # by where the residual is and the number so far
        stay[0, 0] = 0.0
        sides = [
            [floors[:, side & of].min(axis=1, initial=np.inf) for of in (~counted, counted)]
            for side in (~ON_GPU, ON_GPU)
        ]
        for number in range(len(floors)):
            moved = np.minimum(stay, stay[::-1] + np.array([self.to_cpu_s, self.to_gpu_s])[:, None, None])
            for side, (others, ones) in enumerate(sides):
                stay[side] = moved[side] + others[number]
                stay[side, 1:] = np.minimum(stay[side, 1:], moved[side, :-1] + ones[number])
        return float((stay.min(axis=0) - prices * capacity).max(axis=1).min())

    def _floors(self, prices: np.ndarray) -> np.ndarray:
        """`Curve.floor` of every way, float64 [layers, ways, K]; infinite where there is none."""
        floors = np.full((len(self.layers), len(WAYS), len(prices)), np.inf)
        for number, layer in enumerate(self.layers):
            for way, curve in enumerate(layer.curves):
                if curve is not None:
                    floors[number, way] = curve.floor(prices)
        return floors

    def curve(self, number: int, way: int) -> Curve:
        found = self.layers[number].curves[way]
        assert found is not None, f"layer {number} has no way {way}"
        return found


class Bracket(NamedTuple):
    """Two prices: minimisers at `high` fit, those at `low` do not, unless both are 0, where everything fits."""

    low: float
    high: float
    fitting: np.ndarray
    exceeding: np.ndarray


def bracket(chain: Chain, capacity: int, cpu_byte_s: float) -> Bracket | None:
    """The two minimisers around a budget, as ways int64 [layers] each; None where not even the smallest placement fits.

    cpu_byte_s: the price of reading a byte on the CPU, which sets the scale.
    """
    most = sum(max(float(one.seconds[0]) for one in layer.curves if one is not None) for layer in chain.layers)
    # At the highest price a byte costs more than all that time could bring.
    highest = 2 * (most + len(chain.layers) * (chain.to_gpu_s + chain.to_cpu_s))
    prices = np.concatenate([[0.0], np.geomspace(LOWEST * cpu_byte_s, highest, GRID)])
    for _ in range(ROUNDS):
        path = chain.path(prices)
        fits = path.bytes <= capacity
        if not fits[-1]:
            return None
        high = int(np.argmax(fits))  # memory falls with the price
        low = max(high - 1, 0)
        found = Bracket(prices[low], prices[high], path.ways[:, high], path.ways[:, low])
        if high == 0:
            break
        prices = np.linspace(found.low, found.high, FINE)
    return found


def filled(chain: Chain, ways: np.ndarray, capacity: int, prices: np.ndarray) -> np.ndarray | None:
    """The best numbers of hot neurons int64 [layers] for fixed ways, by giving memory to the most useful neurons first.

    prices: rising, from one at which they exceed the capacity, or 0, to one at which they fit. None where they never do.
    """
    curves = [chain.curve(number, int(way)) for number, way in enumerate(ways)]
    for _ in range(ROUNDS):
        counts = np.stack([curve.counts(prices) for curve in curves])
        total = np.sum([curve.bytes(one) for curve, one in zip(curves, counts, strict=True)], axis=0)
        fits = total <= capacity
        if not fits[-1]:
            return None
        at = int(np.argmax(fits))
        if at == 0:
            return counts[:, 0]
        low, high = prices[at - 1], prices[at]
        prices = np.geomspace(low, high, FINE) if high > WIDE * low > 0 else np.linspace(low, high, FINE)
    return _topped_up(curves, counts[:, at], counts[:, at - 1], capacity - int(total[at]))


def _topped_up(curves: Sequence[Curve], fitting: np.ndarray, more: np.ndarray, left: int) -> np.ndarray:
    """Neurons of the last bracket in the order of the layers, up to the first that does not fit."""
    counts = fitting.copy()
    for number, curve in enumerate(curves):
        wanted = int(more[number] - fitting[number])
        if wanted:
            taken = min(wanted, left // curve.unit_bytes)
            counts[number] += taken
            left -= taken * curve.unit_bytes
            if taken < wanted:
                break
    return counts
