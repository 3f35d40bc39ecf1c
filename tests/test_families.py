"""Every family against transformers on the same random weights: logits, sparse FFNs, recorded steps, memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from pinfer.benchmark.weight_bytes import StepBytes
from pinfer.config import ExpertsConfig, Method, ModelConfig, RunConfig
from pinfer.engine import load_engine
from pinfer.engine.place import place_model, runnable
from pinfer.engine.plans import PLACED
from pinfer.engine.shape import model_shape
from pinfer.engine.step import DecodeStep
from pinfer.ffn import DenseFFN, SparseFFN
from pinfer.formats import ModelFile, open_model
from pinfer.formats.model_config import READERS, check_tensors, model_config
from pinfer.formats.standard import write_standard
from pinfer.kernels.activation import ZERO_BELOW_ZERO
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.models import FAMILIES as BLOCKS
from pinfer.models import Experts, LayerWalk, Transformer, build_model
from pinfer.models.weights import held_bytes
from pinfer.overlap import Lane
from pinfer.placement import Plan
from pinfer.placement.memory import Reserves, memory
from pinfer.predictors import Prediction
from pinfer.quality import NeuronObserver
from pinfer.quant import F32
from pinfer.quantize import quantize
from pinfer.sparsify import (
    LEAST_EXPERT_TOKENS,
    density,
    exact_predictors,
    ffn_inputs,
    fit_gate_threshold_predictors,
    fitted_predictors,
    layer_densities,
    reset_activity,
    resolve_method,
    sparsify,
)
from tests.hf_models import FAMILIES, load_reference, make_folder, reference_logits
from tests.second_device import ELSEWHERE, SecondDevice, second_device
from tests.test_place import mixed

LENGTH = 70  # beyond every window (8 and 40), and every context before scaling (32 and 64)
SHORT = 24  # within the contexts before scaling
DENSITY = 0.4
WITH_EXPERTS = ("mixtral", "qwen3-moe")
FIRES = ("relu-llama", "prosparse", "bamboo", "turbosparse", "opt")


@cache
def folder_of(name: str, seed: int = 0) -> Path:
    return make_folder(name, Path(mkdtemp(prefix="family-")) / name, seed=seed)


@cache
def file_of(name: str, seed: int = 0) -> ModelFile:
    file = open_model(folder_of(name, seed))
    check_tensors(file, model_config(file))
    return file


def built(name: str, seed: int = 0, context: int | None = None) -> Transformer:
    file = file_of(name, seed)
    config = model_config(file)
    return build_model(file, config, context or config.context_length)


def tokens_for(config: ModelConfig, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


@cache
def expected_of(name: str, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    model = load_reference(name, folder_of(name, seed))
    return reference_logits(model, tokens_for(model_config(file_of(name, seed)), length, seed))


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    """The issue's measure, and a far tighter one: float32 rounding in logits of a few units."""
    assert expected.std() > 0.5, "a flat output would agree with anything"
    assert float(cosine_similarity(found.double(), expected.double(), dim=-1).min()) >= 0.9999
    assert float((found - expected).abs().max()) < tolerance * float(expected.abs().max())


def test_every_reader_has_a_block() -> None:
    assert set(READERS) == set(BLOCKS)
    tried = {model_config(file_of(name)).architecture for name in FAMILIES}
    assert tried == set(BLOCKS), "every architecture is compared with transformers here"


@torch.inference_mode()
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", FAMILIES)
def test_prefill_equals_transformers(name: str, seed: int) -> None:
    model = built(name, seed)
    assert_close(model(tokens_for(model.config, seed=seed), model.new_cache()), expected_of(name, LENGTH, seed))


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_short_context_equals_transformers(name: str) -> None:
    """Where it matters: Phi-3's short factors."""
    model = built(name, context=SHORT)
    assert_close(model(tokens_for(model.config, SHORT), model.new_cache()), expected_of(name, SHORT))


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_pieces_and_decode_equal_transformers(name: str) -> None:
    model = built(name)
    cache = model.new_cache()
    pieces = tokens_for(model.config).split([33, 17, *[1] * (LENGTH - 50)])
    found = torch.cat([model(piece, cache) for piece in pieces])
    assert cache.length == LENGTH
    assert_close(found, expected_of(name))


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_walk_by_layers_equals_transformers(name: str) -> None:
    model = built(name)
    walk = LayerWalk(model, [tokens_for(model.config), tokens_for(model.config, SHORT)])
    walk.advance()
    assert_close(model.logits(walk.rest(0)), expected_of(name))


def sparse(name: str, at: float | None, plan: Plan | None = None, lane: Lane | None = None) -> Transformer:
    """Thresholds at that density; None names by the activation's zeros."""
    model = built(name)
    if at is None:
        return sparsify(model, exact_predictors)
    sequences = [tokens_for(model.config, 40, seed) for seed in range(4)]
    fitted = fit_gate_threshold_predictors(model, sequences)
    return sparsify(model, fitted_predictors([one.at_density(at) for one in fitted]), plan, lane=lane)


@torch.inference_mode()
@pytest.mark.parametrize("name", FIRES)
def test_exact_equals_dense(name: str) -> None:
    model = sparse(name, None)
    assert model.config.activation in ZERO_BELOW_ZERO
    assert_close(model(tokens_for(model.config), model.new_cache()), expected_of(name))
    counted = [ffn.activity.density for ffn in model.ffns() if isinstance(ffn, SparseFFN)]
    assert all(0.05 < one < 0.95 for one in counted)


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_threshold_at_density_one_equals_dense(name: str) -> None:
    model = sparse(name, 1.0)
    assert_close(model(tokens_for(model.config), model.new_cache()), expected_of(name))


def hidden_of(dense: DenseFFN, x: torch.Tensor) -> torch.Tensor:
    """A dense FFN's hidden values, float64 [T, N], in torch alone."""
    gate = x.double() @ dequantize(dense.gate).double().T
    if dense.gate_bias is not None:
        gate = gate + dense.gate_bias.double()
    up = None if dense.up is None else x.double() @ dequantize(dense.up).double().T
    if dense.activation == "drelu":
        assert up is not None
        return gate.relu() * up.relu()
    functions = {
        "relu": lambda g: torch.where(g > dense.cutoff, g, 0.0),
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh"),
    }
    hidden = functions[dense.activation](gate)
    return hidden if up is None else hidden * up


def mask_of(prediction: Prediction, tokens: int) -> torch.Tensor:
    """bool [T, N]: the neurons that a prediction names."""
    active = prediction.active
    named = torch.zeros(active.indices.numel(), dtype=torch.bool)
    named[active.indices[: int(active.count)].long()] = True
    return named.expand(tokens, -1) if prediction.mask is None else named & prediction.mask


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sparse_ffn_is_the_dense_one_without_the_unnamed_neurons(name: str) -> None:
    dense = built(name)
    model = sparse(name, DENSITY)
    compared, kept = 0, []
    for ffn, whole in zip(model.ffns(), dense.ffns(), strict=True):
        assert isinstance(ffn, SparseFFN) and isinstance(whole, DenseFFN)
        masks: list[torch.Tensor] = []
        ffn.observe = lambda x, prediction, masks=masks: masks.append(mask_of(prediction, len(x)))
        calls: list[tuple[torch.Tensor, torch.Tensor]] = []
        ffn.register_forward_hook(lambda _, inputs, y, calls=calls: calls.append((inputs[0], y)))
        model(tokens_for(model.config), model.new_cache())
        if not calls:  # an expert that no token is sent to
            continue
        (x, y), mask = calls[0], torch.cat(masks)
        expected = (hidden_of(whole, x) * mask) @ dequantize(whole.down).double().T
        if whole.down_bias is not None:
            expected = expected + whole.down_bias.double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
        kept.append((float(mask[1:].sum()), mask[1:].numel()))
        compared += 1
    assert compared >= model.config.n_layers
    share = sum(active for active, _ in kept) / sum(total for _, total in kept)
    assert abs(share - DENSITY) < 0.1, "a real density, near the one asked for"


@torch.inference_mode()
@pytest.mark.skipif(core_problem() is not None, reason=f"no CPU core: {core_problem()}")
@pytest.mark.parametrize("at", [None, DENSITY])
@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_steps_equal_plain_ones(name: str, at: float | None) -> None:
    """`at` None runs the dense model."""
    model = built(name) if at is None else sparse(name, at)
    plain_cache, cache = model.new_cache(), model.new_cache()
    tokens = tokens_for(model.config, 12)
    model(tokens[:5], plain_cache)
    model(tokens[:5], cache)
    step = DecodeStep(model, cache)
    for token in tokens[5:].tolist():
        assert torch.equal(step(token), model(torch.tensor([token]), plain_cache))
    assert step.recorded == (name not in WITH_EXPERTS)
    assert ("by values" in str(step.reason)) == (name in WITH_EXPERTS)


DENSE_FAMILIES = [name for name in FAMILIES if name not in WITH_EXPERTS]


@pytest.mark.parametrize("method", ["dense", "gate_threshold"])
@pytest.mark.parametrize("name", DENSE_FAMILIES)
def test_memory_is_known_to_the_byte(name: str, method: str) -> None:
    model = built(name) if method == "dense" else sparse(name, DENSITY)
    shape = model_shape(file_of(name), model.config, method)  # type: ignore[arg-type]
    for layer, block in zip(shape.layers, model.layers, strict=True):
        ffn = layer.neuron_bytes * layer.n_neurons + layer.shared_bytes + layer.compensation_bytes
        assert layer.attention_bytes + ffn == held_bytes(block)
    around = held_bytes(model) - sum(held_bytes(block) for block in model.layers)
    assert shape.head_bytes + shape.embedding_bytes == around


def run(model: Transformer) -> torch.Tensor:
    """Logits of a prompt and of three tokens after it, on the CPU."""
    cache = model.new_cache()
    tokens = tokens_for(model.config, 12)
    parts = [model(tokens[:9], cache), *(model(one[None], cache) for one in tokens[9:])]
    return torch.cat([one.to("cpu") for one in parts])


def placed_bytes(name: str, model: Transformer, plan: Plan, method: Method) -> int:
    """What the memory account says of a plan, with the tables of the rotary embedding and the counts."""
    shape = model_shape(file_of(name), model.config, method, rearranged=False)
    said = memory(shape, plan, model.context, Reserves(0, 0, 0.0, 1, 0))
    shards = [one for ffn in model.ffns() for one in ffn.modules() if isinstance(one, SparseFFN)]
    counts = sum(one.activity.totals.nbytes for one in shards if one.activity.totals.device == ELSEWHERE)
    return sum(said.gpu[part] for part in PLACED) + counts + sum(rope.nbytes for rope in model.ropes)


def test_a_step_reads_the_experts_it_uses_and_one_position() -> None:
    file = file_of("mixtral")
    config = model_config(file)
    step, matrix = StepBytes.of(file), config.n_layers * config.d_ffn * config.d_model * 4
    assert (step.gate, step.rest) == (2 * matrix, 4 * matrix)  # two of four experts
    stacked = sum(info.nbytes for info in file.tensors.values() if len(info.shape) == 3)
    matrices = sum(info.nbytes for info in file.tensors.values() if len(info.shape) == 2)
    assert stacked == 12 * matrix and step.other == matrices - file.info("token_embd.weight").nbytes
    opt = file_of("opt")
    whole = sum(info.nbytes for info in opt.tensors.values() if len(info.shape) == 2)
    assert StepBytes.of(opt).dense == whole - opt.info("position_embd.weight").nbytes


@pytest.mark.parametrize("method", ["dense", "gate_threshold", "mixed"])
@pytest.mark.parametrize("name", ["qwen2", "gemma2", "falcon-7b", "falcon-40b", "opt", "phi4-mini", "prosparse"])
def test_another_device_computes_the_same(name: str, method: str) -> None:
    """Whole layers there, or every kind of layer beside every other (`mixed`)."""
    config = model_config(file_of(name))
    plan = Plan.whole_layers(config.n_layers, config.d_ffn, -1)
    device = SecondDevice()
    with torch.inference_mode():
        if method == "mixed":
            plan = runnable(mixed(config))
            expected, model = run(sparse(name, DENSITY)), sparse(name, DENSITY, plan, device.lane(1))
        else:
            expected, model = (built(name) if method == "dense" else sparse(name, DENSITY) for _ in range(2))
            expected = run(expected)
        with second_device():
            place_model(model, plan, device)
            found = run(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert device.account.used == placed_bytes(name, model, plan, "dense" if method == "dense" else "gate_threshold")


def test_a_vector_that_is_ignored_would_show() -> None:
    """No bias and no norm of these families is read for nothing."""
    for name in ("qwen2", "opt", "falcon-40b", "gemma2"):
        file = file_of(name)
        config = model_config(file)
        tokens = tokens_for(config, 6)
        vectors = [one for one in file.tensors if one.startswith("blk.1.") and len(file.info(one).shape) == 1]
        with torch.inference_mode():
            plain = (model := build_model(file, config, 16))(tokens, model.new_cache())
            for vector in vectors:
                if vector == "blk.1.attn_k.bias" and config.rope is None:
                    continue  # adds the same to a query's every score
                other = (model := build_model(Changed(file, vector), config, 16))(tokens, model.new_cache())
                assert float((other - plain).abs().max()) > 1e-3, vector


class Changed:
    """A model file with one vector other than it is."""

    def __init__(self, file: ModelFile, name: str) -> None:
        self._file, self._name = file, name
        self.has, self.tensor = file.has, file.tensor

    def vector(self, name: str) -> torch.Tensor:
        found = self._file.vector(name)
        return found + 0.5 * torch.randn_like(found) if name == self._name else found


# Experts


@pytest.fixture(params=WITH_EXPERTS)
def moe(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


@torch.inference_mode()
@pytest.mark.parametrize("normalised", [False, True])
def test_what_experts_weigh_is_what_transformers_says(tmp_path: Path, normalised: bool) -> None:
    """Qwen 3's router by both values of `norm_topk_prob`, from the folder and from the GGUF made of it."""
    folder = make_folder("qwen3-moe", tmp_path / "hf")
    settings = json.loads((folder / "config.json").read_text()) | {"norm_topk_prob": normalised}
    (folder / "config.json").write_text(json.dumps(settings))
    file = open_model(folder)
    write_standard(file, path := tmp_path / "m.gguf", None, dequantize)
    tokens = tokens_for(model_config(file), SHORT)
    expected = reference_logits(load_reference("qwen3-moe", folder), tokens)
    for source in (file, open_model(path)):
        config = model_config(source)
        assert config.experts is not None and config.experts.normalised == normalised
        model = build_model(source, config, SHORT)
        assert_close(model(tokens, model.new_cache()), expected)


def test_the_scale_of_experts_multiplies_what_they_weigh() -> None:
    router = quantize(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), F32)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    plain, scaled = (Experts(router, [], ExpertsConfig(4, 2, scale=scale)) for scale in (1.0, 2.5))
    assert torch.equal(scaled.routed(x)[0], 2.5 * plain.routed(x)[0])


@torch.inference_mode()
def test_densities_of_experts_count_the_tokens_sent_to_each(moe: str) -> None:
    model = sparse(moe, DENSITY)
    experts = model.config.experts
    assert experts is not None
    reset_activity(model)
    model(tokens_for(model.config), model.new_cache())
    layers = layer_densities(model)
    assert len(layers) == model.config.n_layers
    for layer in layers:
        assert layer.tokens == LENGTH * experts.used
        assert layer.n_neurons == model.config.d_ffn
        assert 0.2 < layer.density < 0.6


@torch.inference_mode()
def test_an_expert_without_tokens_is_fitted_on_all_of_its_layers(moe: str) -> None:
    model = built(moe)
    experts = model.config.experts
    assert experts is not None
    few = [tokens_for(model.config, 3)]
    many = [tokens_for(model.config, 100), tokens_for(model.config, 90, 1)]
    assert all(len(inputs[0]) == 3 for _, inputs in ffn_inputs(model, few))  # fewer than are wanted: all of them
    sent = [sum(len(one) - 1 for one in inputs) for _, inputs in ffn_inputs(model, many)]
    assert len(sent) == model.config.n_layers * experts.count
    assert all(one >= LEAST_EXPERT_TOKENS for one in sent)
    assert any(one < 188 for one in sent)


@torch.inference_mode()
def test_what_experts_name_is_held_against_their_own_inputs(moe: str) -> None:
    """The last tokens alone, each once for every expert that it was sent to."""
    model, last = sparse(moe, DENSITY), 30
    experts = model.config.experts
    assert experts is not None
    observer = NeuronObserver(model)
    with observer.watch(LENGTH) as whole:
        model(tokens_for(model.config), model.new_cache())
    with observer.watch(last) as found:
        model(tokens_for(model.config), model.new_cache())
    for of_all, layer in zip(whole, found, strict=True):
        assert layer.tokens == last * experts.used
        assert layer.neurons == layer.tokens * model.config.d_ffn
        assert 0.2 < layer.computed / layer.neurons < 0.6
        assert layer.caught < layer.computed < of_all.computed
    whole_counts = [int(ffn.activity.totals[0]) for ffn in model.ffns() if isinstance(ffn, SparseFFN)]
    assert sum(one.computed for one in whole) == sum(whole_counts) // 2, "as the counts say, of two runs"


def test_what_cannot_work_with_experts_says_what_can(moe: str) -> None:
    config = model_config(file_of(moe))
    assert resolve_method("auto", config, None) == "dense"
    assert resolve_method("auto", config, 0.5) == "gate_threshold"
    assert resolve_method("auto", dataclasses.replace(config, activation="relu"), None) == "exact"
    for method in ("weighted_threshold", "shift_threshold", "low_rank", "sign_bits", "input_threshold"):
        with pytest.raises(ValueError, match=f"method {method} does not support a mixture of experts yet .*exact"):
            resolve_method(method, config, 0.5)
    with pytest.raises(ValueError, match="a plan does not support a mixture of experts"):
        model_shape(file_of(moe), config, "dense")
    for settings in ({"cold_fraction": 0.5}, {"device": "emulated"}, {"gpu_layers": 2}):
        with pytest.raises(ValueError, match=r"does not support a mixture of experts yet"):
            load_engine(RunConfig(model=str(folder_of(moe)), method="gate_threshold", sparsity=0.5, **settings))


def test_an_engine_runs_experts_sparsely(moe: str) -> None:
    engine = load_engine(RunConfig(model=str(folder_of(moe)), sparsity=0.5, precision="float32"))
    assert engine.method == "gate_threshold"
    with engine.computing():
        engine.model(tokens_for(engine.config), engine.model.new_cache())
    assert 0.3 < density(engine.model) < 0.7
