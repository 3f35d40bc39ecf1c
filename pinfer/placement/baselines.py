"""The placements to beat, each under the same memory account and the same objective.

- powerinfer: its released solver. Memory goes to attention, predictors, head and KV first, and what is left to the
  neurons of the whole model by activation count. That solver is a knapsack of equal sizes, which one sort solves; it
  knows no time. (It takes neurons in groups of 256; here they go one by one, which can only be better.)
- uniform: the same share of hot neurons in each layer, its hottest.
- sparse_layers: whole layers from the last, with the predictor.
- dense_layers: llama.cpp's -ngl, whole layers whose every neuron is read at every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pinfer.placement.memory import capacity, placed_items
from pinfer.placement.plan import LayerPlan, Place, Plan, PredictorPlace
from pinfer.placement.problem import Problem, hot_prefix
from pinfer.placement.shape import ModelShape


def powerinfer(problem: Problem) -> Plan:
    """One sort of all neurons by how often they are named."""
    every = np.sort(np.concatenate(problem.rates))[::-1]

    def hot(count: int) -> list[np.ndarray]:
        if count == 0:
            return [np.zeros(len(rates), dtype=bool) for rates in problem.rates]
        chosen = [rates > every[count - 1] for rates in problem.rates]
        left = count - sum(int(one.sum()) for one in chosen)
        for one, rates in zip(chosen, problem.rates, strict=True):
            ties = np.flatnonzero(rates == every[count - 1])[:left]
            one[ties] = True
            left -= len(ties)
        return chosen

    return _neurons(problem, hot, len(every))


def uniform(problem: Problem) -> Plan:
    """One share for all layers."""
    most = max(len(rates) for rates in problem.rates)

    def hot(count: int) -> list[np.ndarray]:
        return [hot_prefix(rates, count * len(rates) // most).numpy() for rates in problem.rates]

    return _neurons(problem, hot, most)


def sparse_layers(problem: Problem) -> Plan:
    """The most whole layers that fit, and the head where all do."""
    n_layers = len(problem.shape.layers)
    for wanted in reversed(range(n_layers + 2)):
        plan = _whole(problem, wanted)
        if problem.memory(plan).gpu_bytes <= problem.budget:
            return plan
    raise AssertionError("no layer on the GPU takes no memory there")


def dense_layers(problem: Problem) -> Plan:
    """The same of a problem with a dense shape (see `dense_problem`)."""
    return sparse_layers(problem)


def dense_problem(problem: Problem, dense: ModelShape) -> Problem:
    """The same machine, context and budget with a shape that reads every neuron; its rates do not count."""
    return dataclasses.replace(problem, shape=dense, gpu_layers=0)


BASELINES: dict[str, Callable[[Problem], Plan]] = {
    "powerinfer": powerinfer,
    "uniform": uniform,
    "sparse_layers": sparse_layers,
}


def _whole(problem: Problem, wanted: int) -> Plan:
    n_layers = len(problem.shape.layers)
    layers = []
    for number, layer in enumerate(problem.shape.layers):
        here = number >= n_layers - wanted
        layers.append(LayerPlan("gpu" if here else "cpu", torch.full((layer.n_neurons,), here)))
    return Plan(tuple(layers), "gpu" if wanted > n_layers else "cpu", problem.context, problem.budget)


def _neurons(problem: Problem, hot: Callable[[int], Sequence[np.ndarray]], most: int) -> Plan:
    """What is not FFN first, from the last layer; if all of that fits, as many neurons as `hot` can give."""
    room = capacity(problem.shape, problem.budget, problem.context, problem.reserves)
    none = [0] * len(problem.rates)
    for wanted in reversed(range(len(none) + 2)):
        if _bytes(problem, wanted, none) <= room or wanted == 0:
            break
    low, high = 0, most if wanted > len(none) else 0
    while low < high:
        middle = (low + high + 1) // 2
        counts = [int(one.sum()) for one in hot(middle)]
        low, high = (middle, high) if _bytes(problem, wanted, counts) <= room else (low, middle - 1)
    layers = []
    for number, one in enumerate(hot(low)):
        home, predictor = _home(problem, number, wanted)
        layers.append(LayerPlan(home, torch.from_numpy(one), predictor))
    return Plan(tuple(layers), "gpu" if wanted > len(none) else "cpu", problem.context, problem.budget)


def _home(problem: Problem, number: int, wanted: int) -> tuple[Place, PredictorPlace]:
    """Attention and predictor of a layer where the last `wanted` layers have theirs on the GPU."""
    if number < len(problem.shape.layers) - wanted:
        return "cpu", "split"
    return "gpu", "gpu" if problem.shape.layers[number].own_predictor else "split"


def _bytes(problem: Problem, wanted: int, counts: Sequence[int]) -> int:
    """What the GPU holds of weights and caches."""
    total = problem.shape.head("gpu") if wanted > len(counts) else 0
    for number, (layer, count) in enumerate(zip(problem.shape.layers, counts, strict=True)):
        home, predictor = _home(problem, number, wanted)
        total += sum(placed_items(layer, home, predictor, count, "gpu", problem.context).values())
    return total
