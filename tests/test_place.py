"""A model placed by a plan computes the same wherever its parts lie, and no tensor is forgotten on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pinfer.config import Method, ModelConfig
from pinfer.engine.fitting import FitSettings, fit_predictors
from pinfer.engine.place import Elsewhere, place_model, runnable
from pinfer.engine.plans import PLACED
from pinfer.engine.prepared import Prepared
from pinfer.engine.shape import model_shape
from pinfer.engine.step import DecodeStep
from pinfer.ffn import HybridFFN, SparseFFN
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.kernels.registry import use_backend
from pinfer.models import Transformer, build_model
from pinfer.models.weights import held_bytes
from pinfer.placement import LayerPlan, Plan
from pinfer.placement.memory import Reserves, memory
from pinfer.quant import QuantTensor
from pinfer.sparsify import exact_predictors, fit_input_thresholds, fitted_predictors, sparsify, sparsify_inputs
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama
from tests.second_device import ELSEWHERE, SecondDevice, WrongDevice, second_device

CONTEXT, TOKENS = 40, torch.arange(5, 25)
SEQUENCES = [torch.arange(start, start + 12) for start in (3, 40, 77, 110)]
METHODS: dict[str, FitSettings | None] = {
    "exact": None,
    "gate_threshold": FitSettings("gate_threshold"),
    "weighted_threshold": FitSettings("weighted_threshold"),
    "shift_threshold": FitSettings("shift_threshold"),
    "low_rank": FitSettings("low_rank", rank=32),
    "sign_bits": FitSettings("sign_bits"),
}
CASES = [
    *(("llama", name) for name in ("exact", "weighted_threshold", "low_rank", "sign_bits")),
    *(("gemma3", name) for name in ("gate_threshold", "shift_threshold")),
]

OF_ITS_OWN = [("llama", "low_rank"), ("llama", "sign_bits")]  # predictors that one device can ask for both


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "llama": write_tiny_llama(folder / "llama.gguf", n_layers=4, weight_type="Q8_0"),
        "gemma3": write_tiny_gemma3(folder / "gemma3.gguf", weight_type="Q8_0"),
    }


def built(path: Path) -> Transformer:
    gguf = GGUFFile.open(path)
    return build_model(gguf, model_config(gguf), CONTEXT)


def mixed(config: ModelConfig, predictor: str = "split") -> Plan:
    """Every kind of layer beside every other: attention here or there, no, some and all neurons hot."""
    n, kinds = config.d_ffn, [("cpu", 0), ("gpu", 1), ("gpu", 2), ("cpu", 1), ("gpu", 0), ("cpu", 2), ("gpu", 2)]
    hot = (torch.zeros(n, dtype=torch.bool), torch.arange(n) % 3 == 1, torch.ones(n, dtype=torch.bool))
    layers = [LayerPlan(place, hot[part], predictor) for place, part in kinds[: config.n_layers]]  # type: ignore[arg-type]
    return Plan(tuple(layers), "gpu" if config.n_layers % 2 else "cpu")


def run(model: Transformer) -> torch.Tensor:
    """Logits of a prompt and of three tokens after it, on the CPU."""
    cache = model.new_cache()
    found = [model(TOKENS, cache)]
    found += [model(torch.tensor([token]), cache) for token in (9, 80, 33)]
    return torch.cat([one.to("cpu") for one in found])


def made(path: Path, method: str, plan: Plan | None, device: SecondDevice | None = None) -> Transformer:
    """The sparse model; its predictors are fitted on the CPU, as they always are."""
    model = built(path)
    how = METHODS[method]
    fitted = None if how is None else fit_predictors(model, how, SEQUENCES)
    if fitted is not None and how is not None and how.method.endswith("threshold"):
        fitted = [one.at_density(0.6) for one in fitted]
    maker = exact_predictors if fitted is None else fitted_predictors(fitted)
    return sparsify(model, maker, plan, lane=None if device is None else device.lane(1))


def to_be_placed(path: Path, method: str, plan: Plan, model: Transformer) -> int:
    """What the memory account says, with the tables of the rotary embedding and the counts, which it leaves to reserves."""
    gguf = GGUFFile.open(path)
    fitted = [ffn.predictor for ffn in made(path, method, None).ffns() if isinstance(ffn, SparseFFN)]
    shape = model_shape(gguf, model.config, cast(Method, method), fitted, rearranged=False)
    said = memory(shape, plan, CONTEXT, Reserves(0, 0, 0.0, 1, 0))
    there = [one for ffn in model.ffns() for one in ffn.modules() if isinstance(one, SparseFFN)]
    counts = sum(one.activity.totals.nbytes for one in there if one.activity.totals.device == ELSEWHERE)
    homes = [layer.attention for layer in plan.layers]
    ropes = {b.attention.rope for b, home in zip(model.layers, homes, strict=True) if home == "gpu"}
    return sum(said.gpu[name] for name in PLACED) + counts + sum(rope.nbytes for rope in ropes)


@pytest.mark.parametrize(
    ("family", "method", "predictor"), [*((*case, "split") for case in CASES), *((*case, "gpu") for case in OF_ITS_OWN)]
)
def test_every_method_computes_the_same_on_two_devices(
    paths: dict[str, Path], family: str, method: str, predictor: str
) -> None:
    with torch.inference_mode():
        expected = run(made(paths[family], method, None))
        device = SecondDevice()
        plan = runnable(mixed(built(paths[family]).config, predictor))
        model = made(paths[family], method, plan, device)
        with second_device() as ran:
            place_model(model, plan, device)
            found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert device.account.used == to_be_placed(paths[family], method, plan, model)
    assert {"rms_norm", "attention", "rope", "sparse_ffn", "quant_matmul", "tally"} <= set(ran)
    assert any(isinstance(ffn, HybridFFN) for ffn in model.ffns())


@pytest.mark.parametrize("gpu_layers", [0, 1, 3, -1])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("method", ["dense", "input_threshold"])
def test_whole_layers_compute_the_same(paths: dict[str, Path], family: str, method: str, gpu_layers: int) -> None:
    def of_method() -> Transformer:
        model = built(paths[family])
        if method == "input_threshold":
            sparsify_inputs(model, fit_input_thresholds(model, SEQUENCES, 0.4))
        return model

    with torch.inference_mode():
        expected = run(of_method())
        model, device = of_method(), SecondDevice()
        plan = Plan.whole_layers(model.config.n_layers, model.config.d_ffn, gpu_layers)
        with second_device() as ran:
            place_model(model, plan, device)
            found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    count = model.config.n_layers if gpu_layers == -1 else gpu_layers
    assert ran.count("attention") == 4 * count  # a prompt and three steps
    assert (model.head.device == ELSEWHERE) == (gpu_layers == -1)
    assert model.embedding.device.type == "cpu"


def kinds_of(model: Transformer) -> Sequence[tuple[str, Callable[[Any], bool]]]:
    """Every kind of tensor that a placed model has, by its shape."""
    d, n = model.config.d_model, model.config.d_ffn
    hot = int((torch.arange(n) % 3 == 1).sum())
    return [
        ("norm", lambda one: isinstance(one, torch.Tensor) and one.shape == (d,)),
        ("threshold", lambda one: isinstance(one, torch.Tensor) and one.shape in ((hot,), (n,))),
        ("count", lambda one: isinstance(one, torch.Tensor) and one.dtype == torch.int64),
        ("neuron rows", lambda one: isinstance(one, QuantTensor) and one.shape in ((hot, d), (n, d))),
        ("attention", lambda one: isinstance(one, QuantTensor) and one.rows == d and one.columns == d),
    ]


@pytest.mark.parametrize("kind", range(5))
def test_a_forgotten_tensor_is_noticed(paths: dict[str, Path], kind: int) -> None:
    with torch.inference_mode():
        plain = built(paths["llama"])
        plan = mixed(plain.config)
        _, forgotten = kinds_of(plain)[kind]
        device = SecondDevice(forgets=forgotten)
        model = made(paths["llama"], "weighted_threshold", plan, device)
        with second_device(), pytest.raises(WrongDevice):
            place_model(model, plan, device)
            run(model)


def test_what_is_placed_is_counted_once(paths: dict[str, Path]) -> None:
    """Weights as they are, keys and values of a sequence, and a table of the rotary embedding."""
    with torch.inference_mode():
        plan, device = Plan.whole_layers(4, 96, -1), SecondDevice()
        model = made(paths["llama"], "exact", plan, device)
        config = model.config
        whole = GGUFFile.open(paths["llama"])
        norms = 4 * config.d_model * (2 * config.n_layers + 1)
        weights = sum(one.nbytes for name, one in whole.tensors.items() if len(one.shape) == 2 and "embd" not in name)
        kv = 4 * 2 * config.n_kv_heads * config.head_dim * CONTEXT * config.n_layers
        counts_and_thresholds = config.n_layers * (16 + 4)
        with second_device():
            place_model(model, plan, device)
        table = model.ropes[0].nbytes
        assert device.account.used == norms + weights + kv + counts_and_thresholds + table


def test_a_full_device_raises_before_it_is_passed(paths: dict[str, Path]) -> None:
    with torch.inference_mode():
        plan, device = Plan.whole_layers(4, 96, -1), SecondDevice(limit=200_000)
        model = made(paths["llama"], "exact", plan, device)
        with second_device(), pytest.raises(torch.OutOfMemoryError, match="200000"):
            place_model(model, plan, device)
        assert 100_000 < device.account.peak <= 200_000


def test_a_plan_runs_as_its_layers_allow() -> None:
    some, none, every = torch.arange(6) < 2, torch.zeros(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool)
    plan = runnable(Plan(tuple(LayerPlan("gpu", hot, "cpu") for hot in (some, none, every))))
    assert [layer.predictor for layer in plan.layers] == ["split", "cpu", "gpu"]
    kept = runnable(dataclasses.replace(plan, layers=(LayerPlan("cpu", some, "gpu"),)))
    assert kept.layers[0].predictor == "gpu"


def test_a_step_with_an_ffn_elsewhere_is_not_repeated(paths: dict[str, Path]) -> None:
    with torch.inference_mode():
        model = made(paths["llama"], "exact", None)
        model.blocks[0].ffn = Elsewhere(model.ffns()[0], torch.device("cpu"))
        step = DecodeStep(model, model.new_cache())
        expected = run(made(paths["llama"], "exact", None))[:1]
        torch.testing.assert_close(step(int(TOKENS[0])), expected, rtol=1e-4, atol=1e-4)
    assert step.reason == "an FFN computes on another device than its layer's attention"


@pytest.mark.parametrize("cold_fraction", [0.0, 0.5, 1.0])
def test_only_split_layers_copy_rows_and_let_go_of_what_they_copied(
    paths: dict[str, Path], cold_fraction: float
) -> None:
    released: list[int] = []
    with torch.inference_mode():
        model = built(paths["llama"])
        config, gates = model.config, [ffn.gate.blocks.data_ptr() for ffn in model.ffns()]
        plan = Plan.uniform(config.n_layers, config.d_ffn, cold_fraction)
        sparsify(model, exact_predictors, plan, release=lambda weight: released.append(weight.blocks.data_ptr()))
        rows = sum(held_bytes(ffn) for ffn in model.ffns())
        whole = sum(held_bytes(ffn) for ffn in made(paths["llama"], "exact", None).ffns())
    if cold_fraction in (0.0, 1.0):
        assert not released
        assert [ffn.weights.gate.blocks.data_ptr() for ffn in model.ffns()] == gates
        assert rows == whole
    else:
        assert len(released) == 3 * config.n_layers
        assert set(gates) <= set(released)
        assert rows == whole + 4 * config.n_layers  # a second threshold


def test_only_mapped_weights_are_let_go_of(paths: dict[str, Path]) -> None:
    gguf = GGUFFile.open(paths["llama"])
    prepared = Prepared(gguf, model_config(gguf))
    mapped, own = gguf.tensor("token_embd.weight"), QuantTensor.from_dense(torch.randn(3000, 64))
    before = [weight.blocks.clone() for weight in (mapped, own)]
    for weight in (mapped, own):
        prepared.release(weight)
    assert all(torch.equal(weight.blocks, kept) for weight, kept in zip((mapped, own), before, strict=True))


def test_placing_nothing_leaves_the_model_as_it_was(paths: dict[str, Path]) -> None:
    with torch.inference_mode(), use_backend("auto"):
        model, device = made(paths["llama"], "exact", None), SecondDevice()
        before = [id(ffn) for ffn in model.ffns()]
        place_model(model, Plan.whole_layers(4, 96, 0), device)
        assert [id(ffn) for ffn in model.ffns()] == before
        assert device.account.used == 0
