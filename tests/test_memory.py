"""Bytes of published shapes against known figures and the gguf package, and the memory account to the byte."""

from __future__ import annotations

import dataclasses
import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.engine.load import SHIPPED_MODEL
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.formats.type_mix import MIXES, TYPES
from pinfer.models.layers import KVCache
from pinfer.placement import Hardware, LayerPlan, LayerShape, ModelShape, Plan
from pinfer.placement.memory import Reserves, capacity, check_plan, fixed_items, memory
from pinfer.placement.problem import Problem, layer_time
from pinfer.placement.published import PUBLISHED, predictor_shape, published_shape
from pinfer.placement.shape import PredictorShape
from pinfer.placement.skew import measured_rates
from pinfer.placement.statistics import QUANTILES, LayerStatistics
from tests.placement_problems import NONE, problems, random_plan


def sizes(shape: ModelShape, place: str = "cpu") -> tuple[int, int, int]:
    """FFN, attention and head."""
    layers = [layer.on(place) for layer in shape.layers]  # type: ignore[arg-type]
    ffn = sum(layer.neuron_bytes * layer.n_neurons for layer in layers)
    return ffn, sum(layer.attention_bytes for layer in layers), shape.head(place)  # type: ignore[arg-type]


def test_llama_2_70b_in_q4_k_m_has_its_known_bytes() -> None:
    ffn, attention, head = sizes(published_shape("llama-2-70b", "q4_k_m", down="file"))
    assert (round(ffn / 1e9, 2), round(attention / 1e9, 1), round(head / 1e9, 2)) == (34.13, 6.9, 0.22)
    norms = 80 * 2 * 8192 * 4
    assert round((attention - norms) / 1e9, 2) == 6.92


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "mistral-7b"])
def test_parameters_are_those_of_the_models(name: str) -> None:
    """In F16 two bytes a weight; norms are F32."""
    known = {
        "llama-2-7b": 6.738,
        "llama-2-13b": 13.016,
        "llama-2-70b": 68.977,
        "llama-3-8b": 8.030,
        "mistral-7b": 7.242,
    }
    shape = published_shape(name, "f16", down="file")
    dims = PUBLISHED[name]
    norms = (2 * dims.n_layers + 1) * dims.d_model
    weights = (sum(sizes(shape)) + shape.embedding_bytes - 4 * norms) / 2 + norms
    assert weights / 1e9 == pytest.approx(known[name], abs=0.001)


@pytest.mark.parametrize("type_name", [name for name in TYPES if name not in MIXES])
def test_rows_are_as_long_as_ggufs(type_name: str) -> None:
    block, count = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name.upper()]]
    shape = published_shape("llama-2-7b", type_name, down="file")
    assert shape.layers[0].neuron_bytes == 3 * 4096 // block * count
    assert shape.embedding_bytes == 32000 * 4096 // block * count


def test_down_lies_as_rows_of_q8_0_where_it_runs_sparsely() -> None:
    of_file = published_shape("llama-2-70b", "q4_k_m", PredictorShape.of_gate(), down="file").layers[40]
    as_run = published_shape("llama-2-70b", "q4_k_m", PredictorShape.of_gate()).layers[40]
    assert as_run.neuron_bytes == 2 * 8192 // 256 * 144 + 8192 // 32 * 34 + 4
    assert as_run.neuron_bytes > of_file.neuron_bytes
    assert as_run.always_bytes == of_file.always_bytes == 8192 // 256 * 144 + 4


def test_a_fixed_predictor_is_spread_without_losing_a_byte() -> None:
    layers = published_shape("llama-2-70b", "q4_k_m", predictor_shape("bytes", "llama-2-70b", total_bytes=10**9)).layers
    assert sum(layer.shared_bytes + layer.always_bytes * layer.n_neurons for layer in layers) == 10**9


def test_dense_neurons_are_always_read_whole() -> None:
    layer = published_shape("opt-30b", "q8_0").layers[0]
    assert (layer.always_bytes, layer.active_bytes) == (layer.neuron_bytes, 0)
    assert layer.neuron_bytes == 2 * 7168 // 32 * 34  # no gate


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: published_shape("llama-9", "q4_k_m"), "llama-9"),
        (lambda: published_shape("llama-2-7b", "q9"), "q9"),
        (lambda: predictor_shape("oracle", "llama-2-7b"), "oracle"),
        (lambda: Reserves(margin=1.0), "margin"),
        (lambda: Reserves(context_bytes=-1), "context_bytes"),
        (lambda: LayerShape(-1, 0, None, 1, 1, 0, 1), "attention_bytes"),
        (lambda: LayerShape(1, 0, None, 1, 1, 1, 1), "more than"),
    ],
)
def test_what_is_not_known_or_out_of_range_is_refused(call: object, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        call()  # type: ignore[operator]


def test_keys_and_values_are_what_a_cache_allocates() -> None:
    config = model_config(GGUFFile.open(SHIPPED_MODEL))
    cache = KVCache(config, 100)
    layer = LayerShape(0, 2 * config.n_kv_heads * config.head_dim * 4, None, 1, 1, 0, 1)
    assert layer.kv_bytes(100) == cache.layers[0].numel() * cache.layers[0].element_size()


def test_a_window_is_read_but_the_context_is_kept() -> None:
    layer = LayerShape(0, 10, None, 1, 1, 0, 1, kv_window=7)
    assert (layer.kv_bytes(100), layer.kv_read_bytes(100), layer.kv_read_bytes(3)) == (1000, 70, 30)
    kept = dataclasses.replace(layer, kv_positions=5)
    assert (kept.kv_bytes(100), kept.kv_read_bytes(100)) == (50, 50)


def _plan(attention: str, hot: list[bool], predictor: str, head: str = "cpu") -> Plan:
    return Plan((LayerPlan(attention, torch.tensor(hot), predictor),), head)  # type: ignore[arg-type]


OWN = LayerShape(
    100, 2, None, 4, 30, 5, 20, shared_bytes=7, compensation_bytes=11, own_predictor=True,
    on_gpu=LayerShape(110, 2, None, 4, 40, 8, 30, shared_bytes=9, compensation_bytes=13, own_predictor=True),
)  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "on_gpu", "on_cpu"),
    [
        (_plan("cpu", [False] * 4, "cpu"), {}, {"attention": 100, "kv": 20, "predictor": 27, "neurons": 100, "compensation": 11, "head": 50}),
        (_plan("gpu", [True] * 4, "split", "gpu"), {"attention": 110, "kv": 20, "predictor": 41, "neurons": 128, "compensation": 13, "head": 60}, {}),
        (_plan("gpu", [True, False, False, True], "split"), {"attention": 110, "kv": 20, "predictor": 25, "neurons": 64, "compensation": 13}, {"predictor": 17, "neurons": 50, "head": 50}),
        (_plan("cpu", [True, False, False, False], "gpu"), {"predictor": 41, "neurons": 32, "compensation": 13}, {"attention": 100, "kv": 20, "neurons": 75, "head": 50}),
    ],
)  # fmt: skip
def test_every_item_lies_where_the_plan_has_it(plan: Plan, on_gpu: dict[str, int], on_cpu: dict[str, int]) -> None:
    shape = ModelShape("small", (OWN,), 50, 33, 2, 3, gpu_head_bytes=60)
    found = memory(shape, plan, 10, NONE)
    fixed = {"logits", "activations", "streamed", "context", "graph", "margin"}
    assert {name: count for name, count in found.gpu.items() if count and name not in fixed} == on_gpu
    rest = {"embedding", "activations", "pinned"}
    assert {name: count for name, count in found.cpu.items() if count and name not in rest} == on_cpu
    assert found.cpu["embedding"] == 33
    assert found.gpu_bytes == sum(found.gpu.values())
    assert not on_gpu or found.gpu["logits"] == 12


@settings(max_examples=100, deadline=None)
@given(problems(2, 4), st.integers(0, 2**31))
def test_capacity_is_what_the_budget_leaves_to_the_byte(problem: Problem, seed: int) -> None:
    """A plan fits the budget exactly when its weights and caches fit the capacity."""
    plan = random_plan(problem, seed)
    found = problem.memory(plan)
    if found.gpu:
        fixed = {*fixed_items(problem.shape, problem.context, problem.reserves), "margin"}
        weights = sum(count for name, count in found.gpu.items() if name not in fixed)
        room = capacity(problem.shape, problem.budget, problem.context, problem.reserves)
        assert (weights <= room) == (found.gpu_bytes <= problem.budget)
        assert capacity(problem.shape, found.gpu_bytes, problem.context, problem.reserves) >= weights
        assert capacity(problem.shape, found.gpu_bytes - 1, problem.context, problem.reserves) < weights
        rest = found.gpu_bytes - found.gpu["margin"]
        assert found.gpu["margin"] == math.ceil(problem.reserves.margin * rest)


@settings(max_examples=50, deadline=None)
@given(problems(2, 4), st.integers(0, 2**31))
def test_both_devices_hold_the_model_once(problem: Problem, seed: int) -> None:
    """With the same layout on both, every neuron and every attention lies somewhere, and nowhere twice."""
    layers = tuple(dataclasses.replace(layer, on_gpu=None) for layer in problem.shape.layers)
    shape = dataclasses.replace(problem.shape, layers=layers)
    plan = random_plan(problem, seed)
    found = memory(shape, plan, problem.context, problem.reserves)

    def of(item: str) -> int:
        return found.gpu.get(item, 0) + found.cpu.get(item, 0)

    owned = sum(layer.always_bytes * layer.n_neurons for layer in layers if layer.own_predictor)
    shared = of("predictor") - owned
    assert of("neurons") == sum(layer.neuron_bytes * layer.n_neurons for layer in layers) - owned
    assert of("attention") == sum(layer.attention_bytes for layer in layers)
    assert of("kv") == sum(layer.kv_bytes(problem.context) for layer in layers)
    assert of("head") == shape.head_bytes
    split = sum(
        layer.shared_bytes for layer, one in zip(layers, plan.layers, strict=True) if 0 < one.n_hot < layer.n_neurons
    )
    assert shared == sum(layer.shared_bytes for layer in layers) + split  # both devices read it where both predict


def test_plans_of_another_shape_are_refused() -> None:
    shape = ModelShape("small", (LayerShape(1, 0, None, 4, 10, 3, 7),), 1, 1, 1, 1)
    for plan, complaint in (
        (Plan(()), "0 layers"),
        (_plan("gpu", [True] * 3, "split"), "3 neurons"),
        (_plan("gpu", [True, False, True, True], "gpu"), "1 neurons are predicted on the GPU"),
        (_plan("gpu", [True, False, True, True], "cpu"), "3 neurons are predicted on the CPU"),
    ):
        with pytest.raises(ValueError, match=complaint):
            check_plan(shape, plan)


def test_times_of_a_split_layer_are_bytes_over_bandwidth() -> None:
    shape = ModelShape("small", (OWN,), 50, 33, 2, 3)
    hardware = Hardware("h", 0, 1000.0, 100.0, 0.5, 0.5, sync_s=3.0, kernel_s=0.0)
    rates = np.array([0.5, 0.25, 0.0, 1.0])
    problem = Problem(shape, [rates], hardware, 10, filled=4)
    time = layer_time(problem, OWN, _plan("gpu", [True, False, False, True], "split").layers[0], rates)
    assert time.attention_s == pytest.approx((110 + 8) / 500)
    assert time.gpu_s == pytest.approx((9 + 2 * 8 + 1.5 * 30 + 13) / 500)
    assert time.cpu_s == pytest.approx((7 + 2 * 5 + 0.25 * 20) / 50)
    assert (time.predictor_s, time.sync_s) == (0.0, 3.0)
    time = layer_time(problem, OWN, _plan("cpu", [True, False, False, True], "gpu").layers[0], rates)
    assert time.attention_s == pytest.approx((100 + 8) / 50)
    assert time.predictor_s == pytest.approx((9 + 4 * 8) / 500)
    assert (time.gpu_s, time.cpu_s) == (pytest.approx((1.5 * 30 + 13) / 500), pytest.approx(0.25 * 20 / 50))


def _statistics(fired: list[int], tokens: int) -> LayerStatistics:
    n = len(fired)
    mass = torch.zeros(n, dtype=torch.float64)
    curve = torch.zeros(QUANTILES)
    counts = torch.tensor(fired)
    return LayerStatistics(torch.tensor([tokens]), counts, mass, mass, torch.zeros(2, n), torch.zeros(n), curve, curve)


def test_rates_are_counts_scaled_to_a_density_and_never_above_one() -> None:
    layers = [_statistics([10, 5, 0, 1], 10), _statistics([0, 2, 2, 4], 10)]
    plain = measured_rates(layers)
    assert np.allclose(plain[0], [1, 0.5, 0, 0.1])
    assert np.mean(plain) == pytest.approx(0.3)
    scaled = measured_rates(layers, density=0.4, over_prediction=1.25)
    assert np.mean(scaled) == pytest.approx(0.5)
    assert np.max(scaled) <= 1
    assert scaled[0][2] == 0
    with pytest.raises(ValueError, match="nothing to place by"):
        measured_rates([_statistics([0, 0], 3)])
    with pytest.raises(ValueError, match="over_prediction"):
        measured_rates(layers, over_prediction=0.9)
