"""The placement that makes a token fastest within a budget, with a proof of how near to the best it is.

1. The Lagrangian relaxation (`dual`) brackets the budget between two placements that are the fastest for their memory,
   and bounds from below what any choice of neurons can reach.
2. Between the two, layers go over one by one (rounding), and any one layer may be placed otherwise (local improvement);
   for each such choice of ways the memory goes to the most useful neurons, which is exact but for less than a neuron.
3. If more than TOLERANCE is left, or the instance is small enough to be exact, HiGHS decides the fixed costs (`exact`).

Steps 1 and 2 try the same choices for all budgets between the same two placements, and each choice is only helped by
memory; so time never rises with the budget.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pinfer.placement.dual import Bracket, Chain, Tables, bracket, filled
from pinfer.placement.exact import by_highs
from pinfer.placement.memory import Memory, capacity
from pinfer.placement.options import ON_GPU, head_ways, layer_ways
from pinfer.placement.plan import Plan
from pinfer.placement.problem import Problem, TokenTime, crossing_s, evaluate

TOLERANCE = 1e-3
SMALL = 600  # points (a layer, a way, a number of hot neurons) that HiGHS takes exactly
NEIGHBOURHOOD, PRICES = 16.0, 33  # prices around the bracket's that a choice of ways is bounded at


@dataclass(frozen=True, eq=False)
class Solution:
    """A plan and what is known of it.

    bound_s: no placement of any choice of neurons takes less. price_s_per_byte: the seconds of a token that one more
    byte of GPU memory is worth at the margin, 0 where more brings nothing. method: "dual", or "highs" where it helped.
    """

    plan: Plan
    time: TokenTime
    memory: Memory
    bound_s: float
    price_s_per_byte: float
    method: str
    solve_seconds: float

    @property
    def token_s(self) -> float:
        return self.time.total_s

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def gap(self) -> float:
        """(token_s - bound_s) / token_s: by how much the best placement may be better."""
        return max(0.0, 1 - self.bound_s / self.token_s)


class Choice(NamedTuple):
    """Ways and hot neurons int64 [layers and head], and what they take."""

    ways: np.ndarray
    counts: np.ndarray
    seconds: float


def solve(problem: Problem) -> Solution:
    """The best placement found. ValueError, with what would fit, where the pinned layers do not."""
    start = time.perf_counter()
    chain = chain_of(problem)
    room = capacity(problem.shape, problem.budget, problem.reserves)
    if not problem.pinned:
        room = max(room, 0)  # a GPU without room for anything stays out of it
    found = bracket(chain, room, 1 / problem.hardware.cpu_speed)
    if found is None:
        raise ValueError(refusal(problem))
    best, prices = _search(chain, room, found)
    bound, method = chain.bound(prices, room), "dual"
    small = sum(curve.most - curve.least + 1 for layer in chain.layers for curve in layer.curves if curve) <= SMALL
    if best.seconds - bound > (1e-12 if small else TOLERANCE) * best.seconds:
        ways, proven, counts = by_highs(chain, room, found.high, best.seconds, exact=small)
        bound = max(bound, proven)
        if counts is None and ways is not None:
            counts = filled(chain, ways, room, 0.0, prices[-1])
        if ways is not None and counts is not None and (other := _choice(chain, ways, counts)).seconds < best.seconds:
            best, method = other, "highs"
    plan = _plan(problem, chain, best)
    took = time.perf_counter() - start
    return Solution(plan, evaluate(problem, plan), problem.memory(plan), bound, found.high, method, took)


def chain_of(problem: Problem) -> Chain:
    """The layers' ways and the head's."""
    n_layers, sorted_rates = len(problem.shape.layers), {}
    layers = []
    for number, rates in enumerate(problem.rates):
        if id(rates) not in sorted_rates:  # layers that are alike may share one array
            sorted_rates[id(rates)] = np.sort(rates)[::-1]
        pinned = number >= n_layers - problem.pinned
        layers.append(layer_ways(problem, number, sorted_rates[id(rates)], pinned=pinned))
    layers.append(head_ways(problem, pinned=problem.pinned > n_layers))
    return Chain(layers, crossing_s(problem, "gpu"), crossing_s(problem, "cpu"))


def _search(chain: Chain, room: int, found: Bracket) -> tuple[Choice, np.ndarray]:
    """The best of the choices around a bracket, and the prices that they were bounded at.

    A choice of ways cannot beat the best yet if at some price even its Lagrangian value does not.
    """
    if found.high == 0:
        prices = np.zeros(1)
        counts = Tables.at(chain.layers, prices).counts[np.arange(len(found.fitting)), found.fitting, 0]
        return _choice(chain, found.fitting, counts), prices
    around = found.high * np.geomspace(1 / NEIGHBOURHOOD, NEIGHBOURHOOD, PRICES)
    prices = np.concatenate([[0.0], np.unique(np.append(around, [found.low, found.high])), [found.high * 1e12]])
    tables = Tables.at(chain.layers, prices)
    choices = np.array(list(_choices(tables, found)))
    rows = np.arange(choices.shape[1])
    seconds = sum(tables.seconds[row, choices[:, row]] for row in rows) + chain.crossings_s(choices)[:, None]
    count = sum(tables.bytes[row, choices[:, row]] for row in rows)
    bounds = (seconds + prices * (count - room)).max(axis=1)
    best: Choice | None = None
    for number in np.argsort(bounds, kind="stable"):
        if best is not None and bounds[number] >= best.seconds:
            break
        fits = np.flatnonzero(count[number] <= room)
        if not len(fits):
            continue
        low = max(fits[0] - 1, 0)
        counts = filled(chain, choices[number], room, prices[low], prices[fits[0]])
        if counts is not None and (other := _choice(chain, choices[number], counts)).seconds < (
            best.seconds if best else np.inf
        ):
            best = other
    assert best is not None, "the fitting end of the bracket fits"
    return best, prices


def _choices(tables: Tables, found: Bracket) -> Iterator[np.ndarray]:
    """Ways to round between the two ends of a bracket, int64 [layers] each; none depends on the budget."""
    differing = np.flatnonzero(found.fitting != found.exceeding)
    for order in (differing, differing[::-1]):
        for count in range(len(order) + 1):
            mixed = found.fitting.copy()
            mixed[order[:count]] = found.exceeding[order[:count]]
            yield mixed
    exists = np.isfinite(tables.seconds[:, :, 0])
    for base in (found.fitting, found.exceeding):
        for number, way in np.argwhere(exists):
            if base[number] != way:
                other = base.copy()
                other[number] = way
                yield other


def _choice(chain: Chain, ways: np.ndarray, counts: np.ndarray) -> Choice:
    seconds = sum(
        float(chain.curve(number, int(way)).time(count))
        for number, (way, count) in enumerate(zip(ways, counts, strict=True))
    )
    return Choice(ways, counts, seconds + float(chain.crossings_s(ways)))


def _plan(problem: Problem, chain: Chain, best: Choice) -> Plan:
    layers = tuple(
        layer.plan(int(way), int(count)) for layer, way, count in zip(chain.layers, best.ways, best.counts, strict=True)
    )
    head = "gpu" if ON_GPU[best.ways[-1]] else "cpu"
    return Plan(layers[:-1], head, problem.context, problem.budget)
