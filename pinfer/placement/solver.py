"""The placement that makes a token fastest within a budget, with a proof of how near to the best it is.

1. The Lagrangian relaxation (`dual`) brackets the budget between two placements that are the fastest for their memory,
   and bounds from below what any choice of neurons can reach.
2. Between the two, layers go over one by one (rounding), and any one layer may be placed otherwise (local improvement);
   for each such choice of ways the memory goes to the most useful neurons, which is exact but for less than a neuron.
3. If more than TOLERANCE is left, or the instance is small enough to be exact, HiGHS decides the fixed costs (`exact`).

Steps 1 and 2 try the same choices for all budgets between the same two placements, each choice is only helped by memory,
and no budget below such a placement's own can do better than it: so time does not rise with the budget, but for the
ROUNDING that a choice must promise to be looked at. Where HiGHS decided (`Solution.method`), or more than LOOKED promise as
much, it does not by more than the gap.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from pinfer.placement.dual import Bracket, Chain, Tables, bracket, filled
from pinfer.placement.exact import by_highs
from pinfer.placement.memory import Memory, capacity
from pinfer.placement.options import ON_GPU, WAYS, WHOLE, head_ways, layer_ways
from pinfer.placement.plan import LayerPlan, Plan
from pinfer.placement.problem import Problem, TokenTime, crossing_s, evaluate

TOLERANCE = 1e-3
FINE_GAP = 1e-5  # above it the bound is worth a second look
SMALL = 600  # points (a layer, a way, a number of hot neurons) that HiGHS takes exactly
ROUNDING = 1e-5  # of the time: what a choice must promise to be looked at
NEIGHBOURHOOD, PRICES, FORBIDDEN = 16.0, 129, 1e12  # prices around the bracket's that a choice of ways is bounded at
CHOICES = 2000  # of ways that are bounded
LOOKED = 16_000  # layers of choices that are evaluated exactly; 80 layers: 200 choices, 0.6 s
MOST_MOVED, WIDEST = 3, {2: 48, 3: 16}  # pairs and threes are of so many of the best moves of a layer


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
        return 1 / self.token_s if self.token_s else np.inf

    @property
    def gap(self) -> float:
        """(token_s - bound_s) / token_s: by how much the best placement may be better."""
        return max(0.0, 1 - self.bound_s / self.token_s) if self.token_s else 0.0

    @property
    def figures(self) -> dict[str, Any]:
        """For the plan's JSON."""
        return {
            "token_s": self.token_s,
            "tokens_per_s": self.tokens_per_s,
            "bound_s": self.bound_s,
            "gap": self.gap,
            "method": self.method,
            "solve_seconds": self.solve_seconds,
            "gpu_bytes": dict(self.memory.gpu),
            "cpu_bytes": dict(self.memory.cpu),
        }


class Choice(NamedTuple):
    """Ways and hot neurons int64 [layers and head], and what they take."""

    ways: np.ndarray
    counts: np.ndarray
    seconds: float


def solve(problem: Problem) -> Solution:
    """The best placement found. ValueError, with what would fit, where the pinned layers do not."""
    start, byte_s = time.perf_counter(), 1 / problem.hardware.cpu_speed
    chain = chain_of(problem)
    room = capacity(problem.shape, problem.budget, problem.context, problem.reserves)
    if not problem.pinned:
        room = max(room, 0)  # a GPU without room for anything stays out of it
    found = bracket(chain, room, byte_s)
    if found is None:
        raise ValueError(refusal(problem))
    best = _search(chain, room, found, byte_s)
    prices, method = _prices(found), "dual"
    bound = chain.bound(prices, room)
    if best.seconds - bound > FINE_GAP * best.seconds:
        wholes = np.arange(len(WAYS)) == WHOLE
        bound = max(bound, *(chain.counted_bound(prices, room, counted) for counted in (wholes, ON_GPU)))
    small = sum(curve.most - curve.least + 1 for layer in chain.layers for curve in layer.curves if curve) <= SMALL
    if best.seconds - bound > (1e-12 if small else TOLERANCE) * best.seconds:
        ways, proven, counts = by_highs(chain, room, found.high, best.seconds, exact=small)
        bound = bound if small else max(bound, proven)
        if counts is None and ways is not None:
            counts = filled(chain, ways, room, prices)
        if ways is not None and counts is not None and (other := _choice(chain, ways, counts)).seconds < best.seconds:
            best, method = other, "highs"
    plan = _plan(problem, chain, best)
    predicted, taken = evaluate(problem, plan), problem.memory(plan)
    took = time.perf_counter() - start
    solution = Solution(plan, predicted, taken, bound, float(found.high), method, took)
    return dataclasses.replace(solution, plan=dataclasses.replace(plan, figures=solution.figures))


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


def _search(chain: Chain, room: int, found: Bracket, byte_s: float) -> Choice:
    """The best choice around a bracket.

    First where each layer's attention is: on the way from one end of the bracket to the other. With that given, layers
    are independent, and a bracket of their own is searched. A choice cannot beat the best yet if at some price even its
    Lagrangian value does not.
    """
    prices = _prices(found)
    homes = np.unique(ON_GPU[_mixtures(found)], axis=0)
    tables = Tables.at(chain.layers, prices)
    costs = tables.seconds + prices * tables.bytes
    least = np.stack([costs[:, ~ON_GPU].min(axis=1), costs[:, ON_GPU].min(axis=1)], axis=1)  # [layers, 2, K]
    every = np.arange(homes.shape[1])
    values = least[every, homes.astype(np.int64)].sum(axis=1) + chain.crossings_s(homes)[:, None]
    bounds = (values - prices * room).max(axis=1)
    best: Choice | None = None
    left = max(1, LOOKED // len(chain.layers))
    for number in np.argsort(bounds, kind="stable"):
        if best is not None and (left < 1 or bounds[number] >= best.seconds * (1 - ROUNDING)):
            break
        at_home = chain.at_home(homes[number])
        around = bracket(at_home, room, byte_s)
        if around is not None:
            best, looked = _best(at_home, room, around, best, left)
            left -= looked
    assert best is not None, "the fitting end of the bracket fits"
    return best


def _best(chain: Chain, room: int, found: Bracket, best: Choice | None, most: int) -> tuple[Choice, int]:
    """The best choice around a bracket, or the best so far; and how many were evaluated, no more than `most` with one."""
    looked, prices = 0, _prices(found)
    choices, seconds, count = _choices(chain, found, prices)
    bounds = (seconds + prices * (count - room)).max(axis=1)
    for number in np.argsort(bounds, kind="stable"):
        if best is not None and (looked >= most or bounds[number] >= best.seconds * (1 - ROUNDING)):
            break
        fits = np.flatnonzero(count[number] <= room)
        if not len(fits):
            continue
        low = max(fits[0] - 1, 0)
        counts, looked = filled(chain, choices[number], room, prices[low : fits[0] + 1]), looked + 1
        if counts is not None:
            other = _choice(chain, choices[number], counts)
            best = other if best is None or other.seconds < best.seconds else best
    assert best is not None, "the fitting end of the bracket fits"
    return best, looked


def _prices(found: Bracket) -> np.ndarray:
    """Prices around a bracket's, the denser the nearer, and two at which memory is free and forbidden."""
    if found.high == 0:
        return np.zeros(1)
    steps = np.linspace(-1, 1, PRICES)
    around = found.high * NEIGHBOURHOOD ** (np.sign(steps) * steps**2)
    return np.concatenate([[0.0], np.unique(np.append(around, [found.low, found.high])), [FORBIDDEN * found.high]])


def _choices(chain: Chain, found: Bracket, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ways int64 [choices, layers] around a bracket, their seconds and bytes float64 [choices, K] at K prices; none
    depends on the budget.

    Layers go over from one end of the bracket to the other, in either order; and from each of these mixtures one layer
    is placed otherwise, or two or three where there is room for them.
    """
    mixed = _mixtures(found)
    alone = (found.fitting == found.exceeding).all()  # the memory between goes to neurons, one by one
    layers, ways = _moves(chain, found, 1 if alone else max(1, CHOICES // len(mixed)))
    before = mixed[:, layers]  # [mixtures, moves, up to 3]
    after = np.where(ways < 0, before, ways)
    tables, every = Tables.at(chain.layers, prices), np.arange(mixed.shape[1])
    sums = []
    for table in (tables.seconds, tables.bytes):
        change = (table[layers, after] - table[layers, before]).sum(axis=2)
        sums.append((table[every, mixed].sum(axis=1)[:, None] + change).reshape(-1, len(prices)))
    choices = np.repeat(mixed[:, None], len(layers), axis=1)
    np.put_along_axis(choices, np.broadcast_to(layers, after.shape), after, axis=2)
    choices = choices.reshape(-1, mixed.shape[1])
    return choices, sums[0] + chain.crossings_s(ON_GPU[choices])[:, None], sums[1]


def _mixtures(found: Bracket) -> np.ndarray:
    """From the bracket's fitting end to the exceeding one, layer by layer, first to last and last to first."""
    differing = np.flatnonzero(found.fitting != found.exceeding)
    rows = [found.fitting, found.exceeding]
    for order in (differing, differing[::-1]):
        for count in range(1, len(order)):
            rows.append(found.fitting.copy())
            rows[-1][order[:count]] = found.exceeding[order[:count]]
    return np.array(rows)


def _moves(chain: Chain, found: Bracket, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `most` ways to place up to three layers otherwise: layers and ways int64 [moves, up to 3], a way of -1 being none.

    Taken of those that lose least at the bracket's price: half of them single layers, then pairs, then threes.
    """
    tables = Tables.at(chain.layers, np.array([found.high]))
    costs, every = (tables.seconds + found.high * tables.bytes)[:, :, 0], np.arange(len(chain.layers))
    loss = costs - np.minimum(costs[every, found.fitting], costs[every, found.exceeding])[:, None]
    order = np.argsort(loss, axis=None, kind="stable")[: np.isfinite(loss).sum()]
    ranked = [(int(one) // loss.shape[1], int(one) % loss.shape[1]) for one in order]
    width = min(MOST_MOVED, len(costs))
    chosen: list[tuple[tuple[int, int], ...]] = [(), *((one,) for one in ranked[: most // 2])]
    for size in range(2, width + 1):
        for group in itertools.combinations(ranked[: WIDEST[size]], size):
            if len(chosen) >= most:
                break
            if len(dict(group)) == size:
                chosen.append(group)
    layers, ways = np.zeros((len(chosen), width), dtype=np.int64), np.full((len(chosen), width), -1)
    for number, group in enumerate(chosen):
        unmoved = ((layer, -1) for layer in range(len(costs)) if layer not in dict(group))
        pairs = [*group, *unmoved][:width]  # no layer twice
        layers[number], ways[number] = zip(*pairs, strict=True)
    return layers, ways


def _choice(chain: Chain, ways: np.ndarray, counts: np.ndarray) -> Choice:
    seconds = sum(
        float(chain.curve(number, int(way)).time(count))
        for number, (way, count) in enumerate(zip(ways, counts, strict=True))
    )
    return Choice(ways, counts, seconds + float(chain.crossings_s(ON_GPU[ways])))


def _plan(problem: Problem, chain: Chain, best: Choice) -> Plan:
    layers = tuple(
        layer.plan(int(way), int(count)) for layer, way, count in zip(chain.layers, best.ways, best.counts, strict=True)
    )
    return Plan(layers[:-1], "gpu" if ON_GPU[best.ways[-1]] else "cpu", problem.context, problem.budget)


def check_pinned(problem: Problem) -> None:
    """ValueError, with what would fit, where the pinned layers do not: what `solve` refuses, without solving."""
    if problem.pinned and _pinned_bytes(problem) > problem.budget:
        raise ValueError(refusal(problem))


def refusal(problem: Problem) -> str:
    """Why the pinned layers do not fit, in numbers, and what would."""
    n_layers, names = len(problem.shape.layers), f"{problem.pinned} layers"
    if problem.pinned > n_layers:
        names = f"all {n_layers} layers and the head"
    needed = _pinned_bytes(problem)
    message = (
        f"{names} wholly on the GPU take {needed / 1e9:.3f} GB at a context of {problem.context}, "
        f"{(needed - problem.budget) / 1e9:.3f} GB more than the budget of {problem.budget / 1e9:.3f} GB"
    )
    context = _largest(problem.context, lambda one: dataclasses.replace(problem, context=one, filled=0))
    layers = _largest(problem.pinned, lambda one: dataclasses.replace(problem, gpu_layers=one))
    fits = [f"--ctx-size {context}"] if context else []
    fits.append(f"--gpu-layers {layers}")
    return f"{message}; what fits: {' or '.join(fits)}"


def _pinned_bytes(problem: Problem) -> int:
    """What the smallest placement takes with its pinned layers."""
    n_layers, pinned = len(problem.shape.layers), problem.pinned
    layers = tuple(
        LayerPlan("gpu" if here else "cpu", torch.full((layer.n_neurons,), here))
        for number, layer in enumerate(problem.shape.layers)
        for here in (number >= n_layers - pinned,)
    )
    return problem.memory(Plan(layers, "gpu" if pinned > n_layers else "cpu")).gpu_bytes


def _largest(most: int, problem_of: Callable[[int], Problem]) -> int:
    """The largest setting below `most` whose pinned layers fit; 0 where none does."""
    low, high = 0, most - 1
    while low < high:
        middle = (low + high + 1) // 2
        one = problem_of(middle)
        low, high = (middle, high) if _pinned_bytes(one) <= one.budget else (low, middle - 1)
    return low
