"""The simulator against closed forms written here from bytes alone, sampled tokens, and its own timeline."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pinfer.placement import Hardware, LayerPlan, LayerShape, ModelShape, Plan
from pinfer.placement.named import DERATED, IDEAL, Reach, find_card, named_hardware
from pinfer.placement.problem import Problem
from pinfer.placement.published import predictor_shape, published_shape
from pinfer.placement.simulate import Simulation, simulate
from pinfer.placement.skew import published_rates

GB = 1e9
# Llama-2-70B in Q4_K_M: FFN, attention and head, and a predictor of 1 GB.
FFN, ATTENTION, HEAD, PREDICTOR = 34.13 * GB, 6.92 * GB, 0.22 * GB, 1.0 * GB
LAYERS, NEURONS = 80, 28672
GPU_WEIGHTS, RAM = 22 * GB, 80 * GB
GPU_BANDWIDTH, H80, DENSITY = 1008 * GB, 0.26, 0.1


def held_share(weights: float) -> tuple[float, float]:
    """The share of neurons that fits into so many bytes, and of activations that they hold."""
    share = (weights - ATTENTION - HEAD - PREDICTOR) / FFN
    return share, share ** (math.log(0.8) / math.log(H80))


def closed_form(reach: Reach) -> float:
    """Tokens/s of a hot/cold split: everything dense and the predictor on the GPU, then the slower of both parts."""
    gpu, cpu = reach.gpu_efficiency * GPU_BANDWIDTH, reach.cpu_efficiency * RAM
    _, held = held_share(GPU_WEIGHTS)
    named = DENSITY * reach.over_prediction * FFN
    parts = max(named * held / gpu, named * (1 - held) / cpu)
    return 1 / ((ATTENTION + HEAD + PREDICTOR) / gpu + parts + LAYERS * reach.sync_s)


def hardware(reach: Reach) -> Hardware:
    return named_hardware(find_card("rtx4090"), RAM, reach)


def simulated(reach: Reach) -> Simulation:
    predictor = predictor_shape("bytes", "llama-2-70b", total_bytes=int(PREDICTOR))
    shape = published_shape("llama-2-70b", "q4_k_m", predictor, down="file", rearranged=False)
    rates = published_rates("relu-llama-70b", DENSITY * reach.over_prediction, LAYERS, NEURONS)
    hot = torch.arange(NEURONS) < round(held_share(GPU_WEIGHTS)[0] * NEURONS)
    plan = Plan((LayerPlan("gpu", hot, "gpu"),) * LAYERS)
    return simulate(Problem(shape, rates, hardware(reach), 4096, filled=0), plan)


@pytest.mark.parametrize(("reach", "tokens_per_s"), [(IDEAL, 61.0), (DERATED, 40.7)])
def test_a_split_of_the_70b_model(reach: Reach, tokens_per_s: float) -> None:
    assert closed_form(reach) == pytest.approx(tokens_per_s, rel=0.01)
    assert simulated(reach).tokens_per_s == pytest.approx(tokens_per_s, rel=0.05)


def dense_problem(type_name: str) -> Problem:
    shape = published_shape("llama-2-70b", type_name, down="file", rearranged=False)
    return Problem(shape, [np.ones(NEURONS)] * LAYERS, hardware(IDEAL), 4096, filled=0)


def test_the_dense_layer_split_of_the_70b_model() -> None:
    weights = ATTENTION + HEAD + FFN
    closed = 1 / (GPU_WEIGHTS / GPU_BANDWIDTH + (weights - GPU_WEIGHTS) / RAM)
    assert closed == pytest.approx(3.81, rel=0.01)
    whole = Plan.whole_layers(LAYERS, NEURONS, round(LAYERS * GPU_WEIGHTS / weights))
    assert simulate(dense_problem("q4_k_m"), whole).tokens_per_s == pytest.approx(closed, rel=0.05)


def test_a_dense_model_in_vram_runs_at_its_bandwidth() -> None:
    problem = dense_problem("q2_k")
    layers = problem.shape.layers
    weights = problem.shape.head_bytes + sum(one.attention_bytes + NEURONS * one.neuron_bytes for one in layers)
    found = simulate(problem, Plan.whole_layers(LAYERS, NEURONS, -1))
    assert found.tokens_per_s == pytest.approx(GPU_BANDWIDTH / weights, rel=0.05)
    # The floor of a 70B model of 2.4 bits a weight that fits the card, by the same rule.
    assert found.tokens_per_s * weights / (weights * 2.4 / 2.625) == pytest.approx(49, rel=0.05)


@dataclass(frozen=True)
class Small:
    """Two layers of 400 neurons on round numbers: 1 byte/ns on the GPU, a tenth of it on the CPU."""

    hot: int = 300
    rate: float = 0.25
    sync_s: float = 1e-6

    @property
    def problem(self) -> Problem:
        layer = LayerShape(1000, 8, None, 400, 110, 10, 100, own_predictor=True)
        shape = ModelShape("small", (layer, layer), 500, 0, 16, 100)
        machine = Hardware("round", 10**9, 1e9, 1e8, to_gpu_bandwidth=1e12, to_cpu_bandwidth=1e12, sync_s=self.sync_s)
        return Problem(shape, [np.full(400, self.rate)] * 2, machine, 64, filled=10)

    @property
    def plan(self) -> Plan:
        hot = torch.arange(400) < self.hot
        return Plan((LayerPlan("gpu", hot, "gpu"), LayerPlan("cpu", hot, "split")))


def test_the_timeline_of_a_token() -> None:
    small = Small()
    found = simulate(small.problem, small.plan)
    first = [(span.lane, span.part) for span in found.spans if span.layer == 0]
    second = [(span.lane, span.part) for span in found.spans if span.layer == 1]
    assert first == [("gpu", "attention"), ("gpu", "predictor"), ("gpu", "hot"), ("cpu", "cold"), ("link", "hand-over")]
    assert second == [("cpu", "attention"), ("gpu", "hot"), ("cpu", "cold"), ("link", "hand-over")]
    assert max(span.end_s for span in found.spans) == pytest.approx(found.token_s, rel=1e-12)
    hot, cold = (span for span in found.spans if span.layer == 0 and span.part in ("hot", "cold"))
    assert hot.start_s == cold.start_s
    assert hot.end_s - hot.start_s == pytest.approx(300 * 0.25 * 100 / 1e9)
    assert cold.end_s - cold.start_s == pytest.approx(100 * 0.25 * 100 / 1e8)


def test_no_lane_does_two_things_at_once() -> None:
    found = simulate(Small().problem, Small().plan)
    for lane in ("gpu", "cpu", "link"):
        spans = [span for span in found.spans if span.lane == lane]
        assert all(one.end_s <= after.start_s + 1e-15 for one, after in zip(spans, spans[1:], strict=False))
        assert 0 < found.busy(lane) < 1


def test_a_model_without_layers_or_bytes_takes_no_time() -> None:
    nothing = ModelShape("nothing", (), 0, 0, 0, 0)
    machine = Hardware("any", 0, 1e9, 1e9, sync_s=0)
    found = simulate(Problem(nothing, [], machine, 1, filled=0), Plan((), "cpu"))
    assert (found.tokens_per_s, found.busy("gpu"), found.spans) == (math.inf, 0.0, ())


@pytest.mark.parametrize("hot", [200, 331, 390])
def test_the_spread_of_counts_is_that_of_sampled_tokens(hot: int) -> None:
    """331 hot neurons take about as long on the GPU as the other 69 on the CPU."""
    small = Small(hot=hot)
    problem = dataclasses.replace(small.problem, rates=[np.linspace(0.4, 0.1, 400)] * 2)
    plan = Plan((LayerPlan("gpu", torch.arange(400) < hot, "gpu"),) * 2)
    found = simulate(problem, plan)
    named = np.random.default_rng(0).random((20000, 400)) < problem.rates[0]
    gpu, cpu = named[:, :hot].sum(axis=1) * 100 / 1e9, named[:, hot:].sum(axis=1) * 100 / 1e8
    time = found.time.layers[0]
    sampled = 2 * (np.maximum(gpu, cpu).mean() - max(time.gpu_s, time.cpu_s))
    assert found.spread_s == pytest.approx(sampled, rel=0.05, abs=1e-3 * found.token_s)
    assert (found.spread_s > 0.05 * time.gpu_s) == (hot == 331)


def test_no_spread_where_every_neuron_is_named() -> None:
    small = Small(hot=364, rate=1.0)
    assert simulate(small.problem, small.plan).spread_s == 0.0
