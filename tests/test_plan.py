"""Plans split a layer's neurons without losing or doubling any, and come back from JSON as they went."""

import json
from typing import Any

import pytest
import torch

from pinfer.placement import LayerPlan, Plan


@pytest.mark.parametrize(("cold_fraction", "n_hot"), [(0, 10), (0.25, 8), (0.5, 5), (1, 0)])
def test_uniform_split_is_a_partition(cold_fraction: float, n_hot: int) -> None:
    hot, cold = Plan.uniform(3, 10, cold_fraction).split(2)
    assert len(hot) == n_hot
    assert sorted(hot.tolist() + cold.tolist()) == list(range(10))


@pytest.mark.parametrize("cold_fraction", [-0.1, 1.1, float("nan")])
def test_uniform_split_refuses_what_is_no_share(cold_fraction: float) -> None:
    with pytest.raises(ValueError, match="cold_fraction"):
        Plan.uniform(3, 10, cold_fraction)


@pytest.mark.parametrize(
    ("gpu_layers", "on_gpu", "head"), [(0, 0, "cpu"), (2, 2, "cpu"), (3, 3, "cpu"), (4, 3, "gpu"), (-1, 3, "gpu")]
)
def test_whole_layers_are_counted_from_the_end(gpu_layers: int, on_gpu: int, head: str) -> None:
    plan = Plan.whole_layers(3, 10, gpu_layers)
    places = [layer.attention for layer in plan.layers]
    assert places == ["cpu"] * (3 - on_gpu) + ["gpu"] * on_gpu
    assert [layer.n_hot for layer in plan.layers] == [0] * (3 - on_gpu) + [10] * on_gpu
    assert not any(layer.is_split for layer in plan.layers)
    assert plan.head == head


def _plan() -> Plan:
    generator = torch.Generator().manual_seed(1)
    layers = tuple(
        LayerPlan(attention, torch.rand(n, generator=generator) < 0.4, predictor)  # type: ignore[arg-type]
        for attention, n, predictor in (("gpu", 17, "gpu"), ("cpu", 8, "cpu"), ("gpu", 1, "split"))
    )
    return Plan(layers, "cpu", 4096, 10**9, {"tokens_per_s": 3.5})


def test_a_plan_comes_back_from_json_as_it_went() -> None:
    plan = _plan()
    back = Plan.from_plain(json.loads(json.dumps(plan.to_plain())))
    assert (back.head, back.context, back.budget_bytes, back.figures) == ("cpu", 4096, 10**9, {"tokens_per_s": 3.5})
    assert [(one.attention, one.predictor) for one in back.layers] == [("gpu", "gpu"), ("cpu", "cpu"), ("gpu", "split")]
    for one, other in zip(plan.layers, back.layers, strict=True):
        assert torch.equal(one.hot, other.hot)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "format 2"),
        ({"head": None}, "head is of type NoneType, not str"),
        ({"layers": 3}, "layers is of type int, not list"),
        ({"layers": [1]}, "layer 0: no plan: n_neurons is missing"),
        ({"context": "x"}, "context is of type str, not int or NoneType"),
        ({"figures": [1]}, "figures is of type list, not Mapping"),
        ({"layers": [{}]}, "n_neurons"),
        ({"layers": [{**_plan().to_plain()["layers"][0], "n_hot": 99}]}, "99 are announced"),
        ({"layers": [{**_plan().to_plain()["layers"][0], "n_neurons": 99}]}, "99 neurons"),
        ({"layers": [{**_plan().to_plain()["layers"][0], "n_neurons": -1, "hot": ""}]}, "for -1 neurons"),
        ({"layers": [{**_plan().to_plain()["layers"][0], "hot": "?"}]}, "layer 0: "),
        ({"layers": [{**_plan().to_plain()["layers"][0], "attention": "tpu"}]}, "tpu"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Plan.from_plain(_plan().to_plain() | change)
