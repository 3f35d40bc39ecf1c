"""Small placement problems for property tests, and their best placements by trying all."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from pinfer.placement import Hardware, LayerPlan, LayerShape, ModelShape, Plan
from pinfer.placement.memory import Reserves, placed_items
from pinfer.placement.problem import Problem, crossing_s, head_s, hot_prefix, layer_time, logits_s

RATES = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0, 1))


@st.composite
def layer_shapes(draw: Any, most_neurons: int) -> LayerShape:
    n, own = draw(st.integers(1, most_neurons)), draw(st.booleans())
    always, active = draw(st.integers(0, 30)), draw(st.integers(0, 60))
    common = {
        "kv_position_bytes": draw(st.integers(0, 3)),
        "kv_positions": draw(st.none() | st.integers(1, 20)),
        "n_neurons": n,
        "own_predictor": own,
        "kv_window": draw(st.none() | st.integers(1, 10)),
    }

    def lying(pad: int) -> dict[str, Any]:
        return common | {
            "attention_bytes": attention + pad,
            "neuron_bytes": always + active + spare + 2 * pad,
            "always_bytes": always + (pad if always else 0),
            "active_bytes": active + pad,
            "shared_bytes": shared + pad,
            "compensation_bytes": compensation,
        }

    attention, spare = draw(st.integers(0, 200)), draw(st.integers(0, 5))
    shared, compensation = draw(st.integers(0, 20)), draw(st.sampled_from([0, 0, 15]))
    pad = draw(st.sampled_from([0, 0, 1, 4]))
    return LayerShape(**lying(0), on_gpu=LayerShape(**lying(pad)) if pad else None)


@st.composite
def problems(draw: Any, most_layers: int = 3, most_neurons: int = 5, *, fixed: bool = True) -> Problem:
    layers = tuple(draw(st.lists(layer_shapes(most_neurons), min_size=1, max_size=most_layers)))
    if draw(st.booleans()):
        layers = (layers[0],) * len(layers)  # alike: every choice is as good as its mirror images
    shape = ModelShape("small", layers, draw(st.integers(0, 100)), 7, draw(st.integers(1, 8)), draw(st.integers(1, 50)))
    hardware = Hardware(
        "small", 0, draw(st.floats(1e3, 1e6)), draw(st.floats(1e3, 1e5)),
        to_gpu_bandwidth=1e5, to_cpu_bandwidth=2e5, sync_s=draw(st.sampled_from([0.0, 1e-4, 3e-3, 0.1])),
        kernel_s=draw(st.sampled_from([0.0, 1e-4])),
    )  # fmt: skip
    rates = [np.array(draw(st.lists(RATES, min_size=one.n_neurons, max_size=one.n_neurons))) for one in layers]
    reserves = Reserves(draw(st.integers(0, 50)), 3, draw(st.sampled_from([0.0, 0.02, 0.3])), 1) if fixed else NONE
    most = sum(one.attention_bytes + one.neuron_bytes * one.n_neurons + one.kv_bytes(20) for one in layers)
    return Problem(shape, rates, hardware, 20, draw(st.integers(0, 2 * most + 1000)), reserves=reserves)


NONE = Reserves(0, 0, 0.0, 1, 0)


def layer_plans(layer: LayerShape, rates: np.ndarray, *, subsets: bool) -> Iterator[LayerPlan]:
    """Every placement of a layer; hot neurons are the hottest of each number, or with `subsets` any."""
    n = layer.n_neurons
    every = (torch.tensor(one) for one in itertools.product([False, True], repeat=n))
    hots = every if subsets else (hot_prefix(rates, count) for count in range(n + 1))
    for hot, home in itertools.product(list(hots), ("gpu", "cpu")):
        count = int(hot.sum())
        yield LayerPlan(home, hot, "split")  # type: ignore[arg-type]
        if count == 0:
            yield LayerPlan(home, hot, "cpu")  # type: ignore[arg-type]
        if layer.own_predictor and count:
            yield LayerPlan(home, hot, "gpu")  # type: ignore[arg-type]


def best_seconds(problem: Problem, room: int, *, subsets: bool = False) -> float:
    """The least time of all placements whose weights and caches take no more than `room` bytes of the GPU."""
    best = {("cpu", 0): 0.0}  # seconds by where the residual is and the bytes so far
    for layer, rates in zip(problem.shape.layers, problem.rates, strict=True):
        following: dict[tuple[str, int], float] = {}
        for one in layer_plans(layer, rates, subsets=subsets):
            seconds = layer_time(problem, layer, one, rates).total_s
            items = placed_items(layer, one.attention, one.predictor, one.n_hot, "gpu", problem.context)
            for (home, count), before in best.items():
                key = (one.attention, count + sum(items.values()))
                moved = crossing_s(problem, one.attention) if home != one.attention else 0.0
                following[key] = min(following.get(key, np.inf), before + moved + seconds)
        best = {key: seconds for key, seconds in following.items() if key[1] <= room}
    ends = []
    for (home, count), seconds in best.items():
        ends.append(seconds + head_s(problem, "cpu") + (crossing_s(problem, "cpu") if home == "gpu" else 0.0))
        if count + problem.shape.head("gpu") <= room:
            moved = crossing_s(problem, "gpu") if home == "cpu" else 0.0
            ends.append(seconds + moved + head_s(problem, "gpu") + logits_s(problem))
    return min(ends)


def random_plan(problem: Problem, seed: int) -> Plan:
    random = np.random.default_rng(seed)
    layers = []
    for layer in problem.shape.layers:
        hot = torch.from_numpy(random.random(layer.n_neurons) < 0.5)
        layers.append(LayerPlan(random.choice(["gpu", "cpu"]), hot))
    return Plan(tuple(layers), random.choice(["gpu", "cpu"]))
