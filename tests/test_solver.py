"""The solver against trying everything, what must hold for any problem, and the closed forms of known examples."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import milp

from pinfer.placement import Hardware, Plan
from pinfer.placement.baselines import BASELINES, dense_layers, dense_problem
from pinfer.placement.dual import Tables
from pinfer.placement.exact import by_highs
from pinfer.placement.explain import explain, parts, rivals
from pinfer.placement.memory import Reserves, capacity
from pinfer.placement.options import ON_GPU
from pinfer.placement.plan import LayerPlan
from pinfer.placement.problem import Problem, evaluate, hot_prefix
from pinfer.placement.published import predictor_shape, published_shape
from pinfer.placement.shape import LayerShape, ModelShape
from pinfer.placement.skew import SKEWS, held_by, published_rates
from pinfer.placement.solver import ROUNDING, TOLERANCE, chain_of, solve
from tests.placement_problems import best_seconds, problems, random_plan

FEW = settings(max_examples=50, deadline=None)
NOTHING = Reserves(0, 0, 0.0, 1, 0)
RTX_4090 = Hardware("RTX 4090", 24 * 10**9, 1008e9, 80e9)


def room_of(problem: Problem) -> int:
    return max(0, capacity(problem.shape, problem.budget, problem.context, problem.reserves))


@FEW
@given(problems())
def test_small_instances_are_solved_exactly(problem: Problem) -> None:
    found = solve(problem)
    assert found.token_s == pytest.approx(best_seconds(problem, room_of(problem)), rel=1e-9)


@FEW
@given(problems())
def test_larger_ones_are_as_good_as_their_gap_says(problem: Problem) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pinfer.placement.solver.SMALL", 0)
        found = solve(problem)
    least = best_seconds(problem, room_of(problem))
    assert least * (1 - 1e-9) <= found.token_s <= least / (1 - found.gap) * (1 + 1e-9)


@FEW
@given(problems(3, 4), st.floats(0, 1e-3))
def test_at_a_price_for_memory_the_shortest_path_is_the_best_of_all(problem: Problem, price: float) -> None:
    chain = chain_of(problem)
    prices = np.array([price])
    tables = Tables.at(chain.layers, prices)
    costs = tables.seconds + prices * tables.bytes
    least, ways = chain.shortest(costs)
    path = chain.path(prices)
    assert least[0] == pytest.approx(path.seconds[0] + price * path.bytes[0], rel=1e-12)
    every = itertools.product(*(np.flatnonzero(np.isfinite(one[:, 0])) for one in costs))
    rows = np.array(list(every))
    sums = costs[np.arange(len(costs)), rows, 0].sum(axis=1) + chain.crossings_s(ON_GPU[rows])
    assert least[0] == pytest.approx(sums.min(), rel=1e-12)
    assert np.array_equal(ways, path.ways)


@FEW
@given(problems(2, 12))
def test_curves_fall_convexly_to_their_balance(problem: Problem) -> None:
    for layer in chain_of(problem).layers:
        for curve in filter(None, layer.curves):
            scale = 1e-9 * curve.seconds.max(initial=0.0)
            assert np.allclose(np.diff(curve.seconds), curve.slopes, rtol=1e-9, atol=scale)
            assert (np.diff(curve.slopes) >= -scale).all()
            assert (curve.seconds >= curve.floor_s - scale).all()


@FEW
@given(problems(3, 12))
def test_highs_is_exact_and_its_relaxation_a_bound(problem: Problem) -> None:
    chain, room = chain_of(problem), room_of(problem)
    least = best_seconds(problem, room)
    if least < 1e-6:
        return  # nothing to scale by
    ways, proven, counts = by_highs(chain, room, 1e-5, least, exact=True)
    assert proven == pytest.approx(least, rel=1e-6)
    assert ways is not None
    assert counts is not None
    curves = [chain.curve(number, int(way)) for number, way in enumerate(ways)]
    seconds = sum(float(curve.time(count)) for curve, count in zip(curves, counts, strict=True))
    assert seconds + float(chain.crossings_s(ON_GPU[ways])) == pytest.approx(least, rel=1e-6)
    _, bound, _ = by_highs(chain, room, 1e-5, least, exact=False)
    assert bound <= least * (1 + 1e-6)


def test_nothing_that_highs_prints_reaches_standard_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    c = ctypes.CDLL(None)

    def noisy(*arguments: Any, **named: Any) -> Any:
        c.puts(b"HighsMipSolverData")
        return milp(*arguments, **named)

    c.puts(b"before")
    monkeypatch.setattr("scipy.optimize.milp", noisy)
    by_highs(chain_of(hybrid_70b()), 10**10, 1e-12, 0.1, exact=False)
    c.puts(b"after")
    c.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


@FEW
@given(problems(2, 4))
def test_the_bound_is_below_every_choice_of_neurons(problem: Problem) -> None:
    found = solve(problem)
    least = best_seconds(problem, room_of(problem), subsets=True)
    assert found.bound_s <= least * (1 + 1e-9)
    assert least <= found.token_s * (1 + 1e-9)


@FEW
@given(problems(4, 40))
def test_the_budget_holds_to_the_byte_and_the_time_is_the_plans(problem: Problem) -> None:
    found = solve(problem)
    assert problem.memory(found.plan).gpu_bytes <= problem.budget
    assert found.memory.gpu_bytes == problem.memory(found.plan).gpu_bytes
    assert evaluate(problem, found.plan).total_s == found.token_s
    assert sum(parts(found.plan, found.time).values()) == pytest.approx(found.token_s, rel=1e-12)
    assert 0 <= found.gap <= 1


@FEW
@given(problems(4, 40), st.lists(st.integers(0, 20_000), min_size=2, max_size=6), st.sampled_from([0, 600]))
def test_more_memory_never_slows_a_token(problem: Problem, budgets: list[int], small: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pinfer.placement.solver.SMALL", small)
        seconds = [solve(dataclasses.replace(problem, budget_bytes=one)).token_s for one in sorted(budgets)]
    assert all(later <= earlier * (1 + 2 * ROUNDING) for earlier, later in itertools.pairwise(seconds))


@FEW
@given(problems(3, 8), st.integers(0, 2**31))
def test_no_plan_that_fits_beats_the_bound(problem: Problem, seed: int) -> None:
    plan = random_plan(problem, seed)
    if problem.memory(plan).gpu_bytes <= problem.budget:
        assert solve(problem).bound_s <= evaluate(problem, plan).total_s * (1 + 1e-9)


@FEW
@given(problems(4, 12))
def test_baselines_keep_the_budget_and_are_no_better(problem: Problem) -> None:
    found = solve(problem)
    for place in BASELINES.values():
        plan = place(problem)
        assert problem.memory(plan).gpu_bytes <= problem.budget
        assert found.bound_s <= evaluate(problem, plan).total_s * (1 + 1e-9)


@FEW
@given(problems(3, 5), st.integers(-1, 5))
def test_pinned_layers_are_whole_on_the_gpu_or_refused(problem: Problem, gpu_layers: int) -> None:
    problem = dataclasses.replace(problem, gpu_layers=gpu_layers)
    n_layers = len(problem.shape.layers)
    wanted = n_layers + 1 if gpu_layers == -1 else min(gpu_layers, n_layers + 1)
    try:
        plan = solve(problem).plan
    except ValueError as refused:
        assert f"budget of {problem.budget / 1e9:.3f} GB" in str(refused)
        assert "--gpu-layers" in str(refused)
        return
    for one in plan.layers[max(0, n_layers - wanted) :]:
        assert (one.attention, one.n_hot) == ("gpu", one.hot.numel())
    assert plan.head == "gpu" or wanted <= n_layers


def test_a_refusal_names_settings_that_fit() -> None:
    layer = LayerShape(1000, 10, None, 4, 100, 0, 100)
    problem = Problem(
        ModelShape("small", (layer,) * 4, 500, 0, 1, 1),
        [np.full(4, 0.5)] * 4, RTX_4090, 100, 8000 + 1000, reserves=NOTHING, gpu_layers=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"--ctx-size (\d+) or --gpu-layers 3$") as refused:
        solve(problem)
    context = int(str(refused.value).split("--ctx-size ")[1].split()[0])
    assert solve(dataclasses.replace(problem, context=context)).memory.gpu_bytes <= problem.budget
    with pytest.raises(ValueError, match="4 layers wholly on the GPU"):
        solve(dataclasses.replace(problem, context=context + 1))


def hybrid_70b(context: int = 1) -> Problem:
    """performance.md's example: 22 GB of weights on a 4090, a predictor of 1 GB, no caches, nothing reserved."""
    shape = published_shape(
        "llama-2-70b",
        "q4_k_m",
        predictor_shape("bytes", "llama-2-70b", total_bytes=10**9),
        down="file",
        rearranged=False,
    )
    rates = published_rates("relu-llama-70b", 0.1, 80, 28672)
    return Problem(shape, rates, RTX_4090, context, 22 * 10**9, filled=0, reserves=NOTHING)


def test_the_closed_form_of_hot_and_cold_neurons() -> None:
    found = solve(hybrid_70b())
    assert found.tokens_per_s == pytest.approx(61, rel=0.01)
    assert found.gap < TOLERANCE
    derated = dataclasses.replace(
        hybrid_70b(),
        rates=[np.minimum(1, 1.3 * one) for one in hybrid_70b().rates],
        hardware=dataclasses.replace(RTX_4090, gpu_efficiency=0.85, cpu_efficiency=0.75, sync_s=60e-6),
    )
    assert solve(derated).tokens_per_s == pytest.approx(40.7, rel=0.01)


def test_the_closed_form_of_dense_layers() -> None:
    dense = published_shape("llama-2-70b", "q4_k_m", down="file", rearranged=False)
    problem = dense_problem(hybrid_70b(), dense)
    plan = dense_layers(problem)
    on_gpu = problem.memory(plan).gpu_bytes
    everything = sum(one.attention_bytes + one.neuron_bytes * one.n_neurons for one in dense.layers) + dense.head_bytes

    def closed_form(count: float) -> float:
        return 1 / (count / 1008e9 + (everything - count) / 80e9)

    assert closed_form(22e9) == pytest.approx(3.81, rel=0.005)
    assert 22e9 - on_gpu < dense.layers[0].attention_bytes + dense.layers[0].neuron_bytes * 28672  # no layer more
    assert 1 / evaluate(problem, plan).total_s == pytest.approx(closed_form(on_gpu), rel=0.005)


@pytest.mark.parametrize("skew", ["relu-llama-70b", "swiglu-70b"])
@pytest.mark.parametrize("budget_gb", [8, 24, 48])
def test_a_70b_model_is_placed_with_a_certified_gap(skew: str, budget_gb: int) -> None:
    shape = published_shape("llama-2-70b", "q4_k_m", predictor_shape("low_rank", "llama-2-70b"))
    rates = published_rates(skew, 0.1, 80, 28672, spread=0.5)
    problem = Problem(shape, rates, RTX_4090, 4096, budget_gb * 10**9)
    found = solve(problem)
    assert found.gap <= TOLERANCE
    assert found.memory.gpu_bytes <= problem.budget
    assert all(evaluate(problem, place(problem)).total_s >= found.bound_s for place in BASELINES.values())


def test_alike_layers_are_split_alike_but_for_a_neuron() -> None:
    """With nothing fixed to pay, the best of alike layers is one share for all."""
    plan = solve(hybrid_70b()).plan
    counts = [one.n_hot for one in plan.layers]
    sizes = {layer.neuron_bytes for layer in hybrid_70b().shape.layers}
    assert len(sizes) == 2  # Q4_K and Q6_K downs: the smaller neurons are the better ones to have
    assert len(set(counts)) <= 4
    assert all(torch_equal_prefix(one, rates) for one, rates in zip(plan.layers, hybrid_70b().rates, strict=True))


def torch_equal_prefix(plan: LayerPlan, rates: np.ndarray) -> bool:
    return bool((plan.hot == hot_prefix(rates, plan.n_hot)).all())


def test_the_hottest_neurons_are_taken_the_lower_number_first_among_equals() -> None:
    rates = np.array([0.1, 0.5, 0.5, 0.9, 0.5])
    hot = [hot_prefix(rates, count).nonzero().flatten().tolist() for count in range(6)]
    assert hot == [[], [3], [1, 3], [1, 2, 3], [1, 2, 3, 4], [0, 1, 2, 3, 4]]


def test_a_solved_plan_comes_back_from_json() -> None:
    problem = dataclasses.replace(hybrid_70b(), shape=dataclasses.replace(hybrid_70b().shape))
    found = solve(problem)
    back = Plan.from_plain(json.loads(json.dumps(found.plan.to_plain())))
    assert evaluate(problem, back).total_s == found.token_s
    assert back.figures["tokens_per_s"] == found.tokens_per_s
    assert sum(back.figures["gpu_bytes"].values()) == found.memory.gpu_bytes


def test_rivals_say_where_the_baselines_are_as_good_and_an_explanation_what_limits() -> None:
    problem = hybrid_70b()
    found = solve(problem)
    dense = published_shape("llama-2-70b", "q4_k_m", down="file", rearranged=False)
    told, others = explain(problem, found), {one.name: one for one in rivals(problem, found, dense)}
    assert others["powerinfer"].as_good  # alike layers leave a solver nothing to find
    assert others["dense_layers"].slower == pytest.approx(61 / 3.81 - 1, rel=0.03)
    assert not others["sparse_layers"].as_good
    assert told.another_gb > found.tokens_per_s > (told.one_less_gb or 0)
    assert told.price == pytest.approx(1 - found.tokens_per_s / told.another_gb, rel=0.2)
    assert told.limit == max(told.savings, key=told.savings.__getitem__)
    text = "\n".join(told.lines(found))
    assert f"now {found.tokens_per_s:.2f}" in text
    json.dumps(told.to_plain())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rates": []}, "rates of 0 layers"),
        ({"rates": [np.full(4, 1.5)]}, "not in"),
        ({"rates": [np.full(4, np.nan)]}, "not in"),
        ({"rates": [np.full(3, 0.5)]}, "float64 "),
        ({"context": 0}, "context 0"),
        ({"filled": 101}, "filled 101"),
        ({"budget_bytes": -1}, "budget_bytes"),
        ({"gpu_layers": -2}, "gpu_layers"),
    ],
)
def test_a_problem_out_of_range_is_refused(change: dict[str, object], complaint: str) -> None:
    shape = ModelShape("small", (LayerShape(10, 1, None, 4, 10, 0, 10),), 5, 0, 1, 1)
    problem = Problem(shape, [np.full(4, 0.5)], RTX_4090, 100)
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(problem, **change)


@pytest.mark.parametrize("skew", SKEWS)
def test_published_skews_hold_what_they_say(skew: str) -> None:
    rates = published_rates(skew, 0.02, 2, 10_000)[0]
    assert rates.mean() == pytest.approx(0.02, rel=1e-9)
    hottest = round(SKEWS[skew] * 10_000)
    assert rates[:hottest].sum() / rates.sum() == pytest.approx(0.8, abs=1e-3)
    assert rates.max() <= 1
    assert float(held_by(np.array([0.001]), SKEWS[skew], 0.1)[0]) <= 0.01 + 1e-12


def test_layers_that_differ_keep_the_models_density() -> None:
    rates = published_rates("opt-30b", 0.1, 40, 1000, spread=0.5, seed=3)
    means = [float(one.mean()) for one in rates]
    assert np.mean(means) == pytest.approx(0.1, rel=1e-6)
    assert np.std(np.log(means)) == pytest.approx(0.5, rel=0.3)
    assert all(
        np.array_equal(one, other)
        for one, other in zip(rates, published_rates("opt-30b", 0.1, 40, 1000, spread=0.5, seed=3), strict=True)
    )
