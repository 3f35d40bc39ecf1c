"""sign_bits: what it lets pass, what it reaches on a planted gate, and the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pinfer import sparsify as S
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.kernels.sign_select.reference import sign_scores
from pinfer.models import KVCache
from pinfer.predictors import SignBits, fit_sign_bits
from pinfer.quality.neurons import computed_neurons
from pinfer.quant import QuantTensor
from tests.gguf_files import write_tiny_llama

WIDTH, NEURONS = 96, 300


def planted(generator: torch.Generator) -> tuple[QuantTensor, torch.Tensor]:
    """A gate and inputs whose products are far from zero, so that their signs can be guessed."""
    themes = torch.randn(6, WIDTH, generator=generator)
    gate = themes[torch.arange(NEURONS) % 6] + 0.5 * torch.randn(NEURONS, WIDTH, generator=generator)
    x = themes[torch.randint(6, (500,), generator=generator)] + torch.randn(500, WIDTH, generator=generator)
    gate[:, -1], x[:, -1] = -20.0, 1.0
    return QuantTensor.from_dense(gate), x


def test_the_asked_share_of_active_neurons_passes(generator: torch.Generator) -> None:
    gate, x = planted(generator)
    predictor = fit_sign_bits(gate, "relu", x, x, recall=0.97)
    named = computed_neurons(predictor(x, x), len(x))
    active = x @ gate.blocks.view(torch.float32).T > 0
    recall = float((named & active).sum() / active.sum())
    assert recall >= 0.97
    higher = sign_scores(x, predictor.signs) > int(predictor.threshold) + 2  # scores go in steps of 2
    assert float((higher & active).sum() / active.sum()) < 0.97  # it lets no more pass than that takes
    assert predictor.quality is not None
    assert predictor.quality.recall == pytest.approx(recall)
    assert predictor.quality.density == pytest.approx(float(named.float().mean()))
    assert predictor.quality.active == pytest.approx(float(active.float().mean()), abs=1e-4)
    assert predictor.quality.density < 0.8
    assert predictor.own_bytes == NEURONS * WIDTH // 8


def test_nothing_active_names_nothing() -> None:
    gate = QuantTensor.from_dense(-torch.ones(5, 64))
    predictor = fit_sign_bits(gate, "relu", torch.ones(3, 64), torch.ones(3, 64), recall=0.99)
    assert int(predictor(torch.ones(1, 64), torch.ones(1, 64)).active.count) == 0


def test_a_shard_numbers_its_neurons_anew(generator: torch.Generator) -> None:
    gate, x = planted(generator)
    predictor = fit_sign_bits(gate, "relu", x, x, recall=0.9)
    order = torch.randperm(NEURONS, generator=generator)[:70]
    whole, part = computed_neurons(predictor(x, x), len(x)), computed_neurons(predictor.shard(order)(x, x), len(x))
    assert torch.equal(part, whole[:, order])


@pytest.mark.parametrize("cold_fraction", [0.0, 0.5])
def test_a_model_runs_by_it(tmp_path: Path, cold_fraction: float) -> None:
    path = write_tiny_llama(tmp_path / "llama.gguf")
    settings = {"model": str(path), "activation": "relu", "precision": "float32"}
    run = RunConfig(**settings, method="sign_bits", recall=1.0, cold_fraction=cold_fraction)  # type: ignore[arg-type]
    engine = load_engine(run)
    dense = load_engine(RunConfig(**settings, method="dense"))  # type: ignore[arg-type]
    assert any("sign_bits catches" in note for note in engine.notes)
    tokens = torch.arange(5, 25)
    with engine.computing():
        logits = engine.model(tokens, KVCache(engine.config, 32))
        expected = dense.model(tokens, KVCache(engine.config, 32))
    assert S.density(engine.model) < 1
    assert float((logits - expected).norm() / expected.norm()) < 0.2
    assert all(isinstance(m, SignBits) for m in engine.model.modules() if hasattr(m, "signs"))


def test_other_activations_and_a_sparsity_are_refused(tmp_path: Path) -> None:
    path = str(write_tiny_llama(tmp_path / "llama.gguf"))
    with pytest.raises(ValueError, match="sign_bits needs a ReLU model"):
        load_engine(RunConfig(model=path, method="sign_bits", activation="silu"))
    with pytest.raises(ValueError, match="no meaning for method sign_bits"):
        load_engine(RunConfig(model=path, method="sign_bits", activation="relu", sparsity=0.5))
