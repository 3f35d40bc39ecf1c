"""From a dense model to a sparse one: replaced modules, calibrated thresholds, counted densities."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pinfer import sparsify as S
from pinfer.ffn import DenseFFN, HybridFFN, SparseFFN
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.models import Transformer, build_model
from pinfer.placement import Plan
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

TOKENS = torch.arange(5, 60)


@pytest.fixture
def relu_path(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "relu.gguf")


@pytest.fixture
def gelu_path(tmp_path: Path) -> Path:
    return write_tiny_gemma3(tmp_path / "gelu.gguf", d_ffn=256)


def load(path: Path) -> Transformer:
    gguf = GGUFFile.open(path)
    return build_model(gguf, model_config(gguf), 64)


@torch.inference_mode()
def logits(model: Transformer) -> torch.Tensor:
    return model(TOKENS, model.new_cache())


def test_exact_gives_the_dense_logits(relu_path: Path) -> None:
    sparse = S.sparsify(load(relu_path), S.exact_predictors)
    torch.testing.assert_close(logits(sparse), logits(load(relu_path)), rtol=1e-4, atol=1e-4)
    assert all(isinstance(ffn, SparseFFN) for ffn in sparse.ffns())
    assert 0.3 < S.density(sparse) < 0.7


@pytest.mark.parametrize("cold_fraction", [0.0, 0.3, 1.0])
def test_hybrid_gives_the_dense_logits(relu_path: Path, cold_fraction: float) -> None:
    hybrid = S.sparsify(load(relu_path), S.exact_predictors, Plan.uniform(2, 96, cold_fraction))
    torch.testing.assert_close(logits(hybrid), logits(load(relu_path)), rtol=1e-4, atol=1e-4)
    split = 0 < cold_fraction < 1
    assert all(isinstance(ffn, HybridFFN if split else SparseFFN) for ffn in hybrid.ffns())
    if not split:
        assert hybrid.ffns()[0].weights.gate.blocks.data_ptr() == hybrid.ffns()[0].predictor.gate.blocks.data_ptr()
    sparse = S.sparsify(load(relu_path), S.exact_predictors)
    logits(sparse)
    assert S.density(hybrid) == pytest.approx(S.density(sparse))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_calibrated_threshold_reaches_its_sparsity_on_its_own_text(gelu_path: Path, sparsity: float) -> None:
    model = load(gelu_path)
    with torch.inference_mode():
        fitted = S.fit_gate_threshold_predictors(model, [TOKENS])
    assert len(fitted) == model.config.n_layers
    assert all(isinstance(ffn, DenseFFN) for ffn in model.ffns()), "calibration must not change the model"
    S.sparsify(model, S.fitted_predictors([one.at_density(1 - sparsity) for one in fitted]))
    with torch.inference_mode():
        model(TOKENS, model.new_cache())
    # The first layer sees the inputs it was calibrated on, all but the first token.
    assert S.layer_densities(model)[0].density == pytest.approx(1 - sparsity, abs=0.01)


def test_sparsity_zero_keeps_every_neuron(gelu_path: Path) -> None:
    model = load(gelu_path)
    with torch.inference_mode():
        fitted = S.fit_gate_threshold_predictors(model, [TOKENS])
    S.sparsify(model, S.fitted_predictors([one.at_density(1.0) for one in fitted]))
    torch.testing.assert_close(logits(model), logits(load(gelu_path)), rtol=1e-4, atol=1e-4)
    assert S.density(model) == 1.0


def test_density_is_counted_alike_in_prefill_and_decode(relu_path: Path) -> None:
    model = S.sparsify(load(relu_path), S.exact_predictors)
    logits(model)
    whole = S.density(model)
    S.reset_activity(model)
    assert S.density(model) == 1.0
    cache = model.new_cache()
    with torch.inference_mode():
        for token in TOKENS:
            model(token[None], cache)
    assert S.density(model) == pytest.approx(whole, rel=1e-3)
    assert all(layer.tokens == len(TOKENS) for layer in S.layer_densities(model))


def test_what_cannot_be_sparsified_says_so(relu_path: Path, gelu_path: Path) -> None:
    with pytest.raises(ValueError, match="gelu_tanh"):
        S.sparsify(load(gelu_path), S.exact_predictors)
    sparse = S.sparsify(load(relu_path), S.exact_predictors)
    with pytest.raises(ValueError, match="layer 0 is not dense"):
        S.sparsify(sparse, S.exact_predictors)
    with pytest.raises(ValueError, match="sparse already"):
        S.fit_gate_threshold_predictors(sparse, [TOKENS])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        S.fit_gate_threshold_predictors(load(relu_path), [TOKENS[:1]])


@pytest.mark.parametrize(
    ("method", "activation", "sparsity", "expected"),
    [
        ("auto", "relu", None, "exact"),
        ("auto", "drelu", None, "exact"),
        ("auto", "silu", None, "dense"),
        ("auto", "silu", 0.5, "shift_threshold"),
        ("auto", "relu", 0.5, "weighted_threshold"),
        ("dense", "relu", None, "dense"),
        ("gate_threshold", "gelu_tanh", 0.0, "gate_threshold"),
        ("low_rank", "relu", None, "low_rank"),
        ("low_rank", "relu", 0.9, "low_rank"),
        ("low_rank", "silu", 0.5, "low_rank"),
        ("input_threshold", "gelu_tanh", 0.5, "input_threshold"),
        ("input_threshold", "drelu", 0.5, "input_threshold"),
    ],
)
def test_auto_method(relu_path: Path, method, activation: str, sparsity: float | None, expected: str) -> None:
    config = dataclasses.replace(load(relu_path).config, activation=activation)
    assert S.resolve_method(method, config, sparsity) == expected
    if expected in ("shift_threshold", "weighted_threshold"):  # which rank by up products
        assert S.resolve_method(method, dataclasses.replace(config, gated=False), sparsity) == "gate_threshold"


@pytest.mark.parametrize(
    ("method", "sparsity"), [("gate_threshold", None), ("input_threshold", None), ("exact", 0.5), ("dense", 0.5)]
)
def test_contradictory_settings_are_refused(relu_path: Path, method, sparsity: float | None) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        S.resolve_method(method, load(relu_path).config, sparsity)


def test_low_rank_without_relu_needs_a_sparsity(relu_path: Path) -> None:
    config = dataclasses.replace(load(relu_path).config, activation="silu")
    with pytest.raises(ValueError, match="method low_rank needs a sparsity for a model whose activation is silu"):
        S.resolve_method("low_rank", config, None)


@pytest.mark.parametrize("family", ["relu", "gelu"])
def test_ffn_inputs_are_those_of_each_sequence_alone(family: str, relu_path: Path, gelu_path: Path) -> None:
    model = load(relu_path if family == "relu" else gelu_path)
    sequences = [TOKENS[:20], TOKENS[10:13], TOKENS]
    with torch.inference_mode():
        layers = list(S.ffn_inputs(model, sequences))
        assert [ffn for ffn, _ in layers] == model.ffns()
        for number, tokens in enumerate(sequences):
            alone: list[torch.Tensor] = []
            hooks = [
                ffn.register_forward_pre_hook(lambda _, inputs, alone=alone: alone.append(inputs[0]))
                for ffn in model.ffns()
            ]
            model(tokens, model.new_cache())
            for hook in hooks:
                hook.remove()
            for (_, together), expected in zip(layers, alone, strict=True):
                torch.testing.assert_close(together[number], expected)
    assert not any(ffn._forward_pre_hooks for ffn in model.ffns())


def test_down_comes_from_where_it_is_said_to(relu_path: Path) -> None:
    asked: list[int] = []

    def downs(layer: int, ffn: DenseFFN):
        asked.append(layer)
        return S.transposed_down(layer, ffn)[0], 0.25

    sparse = S.sparsify(load(relu_path), S.exact_predictors, downs=downs)
    assert asked == [0, 1]
    assert S.down_error(sparse) == 0.25
    torch.testing.assert_close(logits(sparse), logits(load(relu_path)), rtol=1e-4, atol=1e-4)
