"""low_rank: what a planted gate lets it reach, what a random one does not, and that it says which is which."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer import sparsify as S
from pinfer.cli.main import BAD_INPUT
from pinfer.cli.main import run as cli
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.kernels.activation import ZERO_BELOW_ZERO, activate
from pinfer.kernels.registry import use_backend
from pinfer.kernels.select_active import passes
from pinfer.predictors import CalibrationInputs, LowRank, LowRankSettings, fit_low_rank, low_rank
from pinfer.quant import F16, Q4_0, Q8_0, QuantTensor
from pinfer.quantize import quantize
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

WIDTH, NEURONS, TRUE_RANK = 96, 416, 12


class Planted:
    """A gate of a given rank under a bias that leaves few gates positive, and inputs with a constant last entry."""

    def __init__(self, rank: int = TRUE_RANK, bias: float = -1.5, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        low = self.normal(NEURONS, rank) @ self.normal(rank, WIDTH - 1) / (rank * WIDTH) ** 0.5
        scale = 0.2 + 3 * torch.rand(NEURONS, 1, generator=self.generator)  # some neurons speak louder
        self.dense = scale * torch.cat([low, torch.full((NEURONS, 1), bias)], dim=1)
        self.gate = QuantTensor.from_dense(self.dense)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def inputs(self, tokens: int) -> torch.Tensor:
        return torch.cat([self.normal(tokens, WIDTH - 1), torch.ones(tokens, 1)], dim=1)

    def fit(self, activation: str = "relu", **settings: Any) -> LowRank:
        self.fitted_on = self.inputs(400)
        parts = CalibrationInputs(self.fitted_on, self.inputs(200), self.inputs(200))
        return fit_low_rank(self.gate, activation, parts, LowRankSettings(**{"rank": 32, "recall": 0.99, **settings}))

    def measured(self, predictor: LowRank, activation: str = "relu", bar: float = 0.0) -> tuple[float, float, float]:
        """Recall, density and true density on fresh tokens."""
        x = self.inputs(500)
        named = passes(predictor.scores(x), predictor.threshold)
        active = activate(activation, x @ self.dense.T).abs() > bar
        return tuple(
            float(v) for v in ((named & active).sum() / active.sum(), named.float().mean(), active.float().mean())
        )  # type: ignore[return-value]


@pytest.mark.parametrize("activation", ZERO_BELOW_ZERO)
def test_a_planted_gate_is_found(activation: str) -> None:
    planted = Planted()
    predictor = planted.fit(activation)
    recall, density, active = planted.measured(predictor, activation)
    assert 0.03 < active < 0.2
    assert recall >= 0.985
    assert density < 1.1 * active
    assert predictor.first.type is predictor.second.type is Q8_0
    assert (predictor.first.shape, predictor.second.shape) == ((32, WIDTH), (NEURONS, 32))
    quality = predictor.quality
    assert quality.recall == pytest.approx(recall, abs=0.01)
    assert quality.density == pytest.approx(density, rel=0.1)
    assert quality.over_prediction == pytest.approx(quality.density / quality.active)


@pytest.mark.parametrize(
    ("activation", "sparsity", "by_magnitude"), [("silu", 0.6, True), ("silu", 0.98, False), ("gelu_tanh", 0.98, False), ("relu", 0.97, False)]
)  # fmt: skip
def test_other_activations_go_by_the_sparsity_asked_for(activation: str, sparsity: float, by_magnitude: bool) -> None:
    planted = Planted()
    predictor = planted.fit(activation, sparsity=sparsity)
    assert predictor.by_magnitude is by_magnitude
    sizes = activate(activation, planted.fitted_on @ planted.dense.T).abs()
    bar = float(sizes.quantile(sparsity))
    recall, density, active = planted.measured(predictor, activation, bar)
    assert active == pytest.approx(1 - sparsity, abs=0.02)
    assert recall > 0.97
    assert density < 1.2 * active


def test_sparsity_zero_names_everything() -> None:
    planted = Planted()
    assert planted.measured(planted.fit("silu", sparsity=0.0), "silu")[1] == 1.0


def test_more_recall_names_more_neurons() -> None:
    """On a gate that no 32 directions hold, so that recall costs something."""
    planted = Planted(rank=WIDTH - 1)
    reached = [planted.measured(planted.fit(recall=recall)) for recall in (0.5, 0.8, 0.95, 0.99, 1.0)]
    recalls, densities = [r for r, _, _ in reached], [d for _, d, _ in reached]
    assert recalls == sorted(recalls)
    assert densities == sorted(densities)
    for recall, asked in zip(recalls, (0.5, 0.8, 0.95, 0.99, 1.0), strict=True):
        assert recall == pytest.approx(asked, abs=0.02)


def test_a_random_gate_is_not_called_predictable() -> None:
    planted = Planted(rank=WIDTH - 1)
    predictor = planted.fit(recall=0.95)
    recall, density, _ = planted.measured(predictor)
    assert predictor.quality.recall == pytest.approx(recall, abs=0.02)
    assert predictor.quality.density == pytest.approx(density, rel=0.1)
    assert predictor.quality.over_prediction > 2
    assert Planted().fit(recall=0.95).quality.over_prediction < 1.1


def test_the_report_is_of_tokens_that_neither_fit_nor_threshold_saw() -> None:
    """Fitted on a few directions alone, it must not report what it reaches on those."""
    planted = Planted(rank=WIDTH - 1)
    few = planted.inputs(40)
    parts = CalibrationInputs(few, few, planted.inputs(300))
    quality = fit_low_rank(planted.gate, "relu", parts, LowRankSettings(64, 0.99)).quality
    assert quality.recall < 0.95


def test_a_shard_predicts_what_the_whole_does() -> None:
    planted = Planted()
    for activation, sparsity in (("relu", None), ("silu", 0.6)):
        whole = planted.fit(activation, sparsity=sparsity)
        neurons = torch.randperm(NEURONS, generator=planted.generator)[:100]
        part = whole.shard(neurons)
        x = planted.inputs(5)
        torch.testing.assert_close(part(x, x).mask, whole(x, x).mask[:, neurons])
        assert part.quality == whole.quality


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_one_token_is_listed_as_in_a_batch(backend: str) -> None:
    planted = Planted()
    predictor = planted.fit()
    x = planted.inputs(6)
    batch = predictor(x, x)
    assert batch.gate_values is None
    with use_backend(backend):
        for token in range(6):
            active = predictor(x[token : token + 1], x).active
            listed = active.indices[: int(active.count)].tolist()
            assert abs(len(listed) - int(batch.mask[token].sum())) <= 1  # a score may lie on its threshold


def test_the_same_inputs_give_the_same_predictor() -> None:
    one, two = (Planted().fit() for _ in range(2))
    assert torch.equal(one.second.blocks, two.second.blocks)
    assert torch.equal(one.threshold, two.threshold)


def test_chunks_of_the_gate_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Planted().fit()
    monkeypatch.setattr(low_rank, "CHUNK_BYTES", 4 * WIDTH * 33)
    planted = Planted()
    chunked = planted.fit()
    x = planted.inputs(50)
    torch.testing.assert_close(chunked.scores(x), whole.scores(x), rtol=1e-2, atol=0.05)


def test_quantised_gates_and_odd_widths() -> None:
    planted = Planted()
    planted.gate = quantize(planted.dense, Q4_0)
    assert planted.fit().quality.recall > 0.95
    odd = QuantTensor.from_dense(planted.dense[:, 1:].contiguous())
    parts = CalibrationInputs(*(planted.inputs(100)[:, 1:] for _ in range(3)))
    predictor = fit_low_rank(odd, "relu", parts, LowRankSettings(32, 0.9))
    assert predictor.first.type is F16
    assert predictor.quality.recall > 0.8


def test_full_rank_is_the_gate_itself() -> None:
    planted = Planted(rank=WIDTH - 1)
    recall, density, active = planted.measured(planted.fit(rank=WIDTH))
    assert recall > 0.985
    assert density < 1.15 * active


def test_nothing_active_and_everything_equal() -> None:
    planted = Planted(bias=-100.0)
    predictor = planted.fit()
    assert (predictor.quality.recall, predictor.quality.active) == (1.0, 0.0)
    planted.dense = torch.zeros_like(planted.dense)
    planted.gate = QuantTensor.from_dense(planted.dense)
    assert bool(planted.fit().scores(planted.inputs(3)).isfinite().all())


def test_what_cannot_be_fitted_says_so() -> None:
    planted = Planted()
    for rank in (0, 33, 128):
        with pytest.raises(ValueError, match=f"at most {WIDTH}.*not {rank}"):
            planted.fit(rank=rank)
    with pytest.raises(ValueError, match=r"sparsity.*silu"):
        planted.fit("silu")
    planted.gate = QuantTensor.from_dense(torch.full((NEURONS, WIDTH), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        planted.fit()
    first, second = quantize(torch.ones(32, 64), Q8_0), quantize(torch.ones(50, 64), Q8_0)
    with pytest.raises(ValueError, match=r"expected \[R, D\]"):
        LowRank(first, second, torch.zeros(1), "relu", by_magnitude=False)


@pytest.mark.parametrize(("key", "value"), [("predictor_rank", 0), ("predictor_rank", 48), ("predictor_rank", 64.0), ("recall", 0), ("recall", 1.1)])  # fmt: skip
def test_settings_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        RunConfig.from_mapping({key: value})


# Whole models.


def test_a_models_predictors_are_fitted_on_its_own_inputs(tmp_path: Path) -> None:
    engine = load_engine(RunConfig(model=str(write_tiny_llama(tmp_path / "m.gguf")), method="dense"))
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(0, 260, (n,), generator=generator) for n in (40, 30, 50, 35, 60)]
    with engine.computing():
        told: list[str] = []
        fitted = S.fit_low_rank_predictors(engine.model, sequences, LowRankSettings(64, 0.99), told.append)
        assert told == ["fitting predictors, layer 1 of 2", "fitting predictors, layer 2 of 2"]
        S.sparsify(engine.model, S.fitted_predictors(fitted))
        assert S.predictor_qualities(engine.model) == [one.quality for one in fitted]
        for one in fitted:  # 64 directions are all there are
            assert one.quality.recall > 0.95
            assert one.quality.over_prediction < 1.2
        with pytest.raises(ValueError, match="sparse already"):
            S.fit_low_rank_predictors(engine.model, sequences, LowRankSettings(64, 0.99))


def test_too_little_to_fit_on_says_so(tmp_path: Path) -> None:
    model = load_engine(RunConfig(model=str(write_tiny_llama(tmp_path / "m.gguf")), method="dense")).model
    for sequences, least in (
        ([torch.arange(5)] * 3, "4 sequences"),
        ([torch.arange(5)] * 3 + [torch.arange(1)], "2 tokens"),
    ):
        with pytest.raises(ValueError, match=f"at least {least}"):
            S.fit_low_rank_predictors(model, sequences, LowRankSettings(64, 0.99))


def test_engines_run_low_rank_whole_and_hybrid(tmp_path: Path, quick_fits: None) -> None:
    path = str(write_tiny_llama(tmp_path / "m.gguf"))
    run = RunConfig(model=path, method="low_rank", predictor_rank=64, recall=1.0, precision="float32")
    engine, dense = load_engine(run), load_engine(RunConfig(model=path, method="dense", precision="float32"))
    assert any("low_rank catches" in note for note in engine.notes)
    tokens = torch.randint(0, 260, (40,), generator=torch.Generator().manual_seed(3))
    outputs = []
    for one in (dense, engine, load_engine(dataclasses.replace(run, cold_fraction=0.4))):
        with one.computing():
            outputs.append(one.model(tokens, one.model.new_cache()))
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-4, atol=1e-4)
    assert float((outputs[1] - outputs[0]).norm() / outputs[0].norm()) < 0.05
    assert S.density(engine.model) < 0.9


@pytest.mark.parametrize("cold_fraction", [0.99, 1.0])
def test_a_shard_may_be_all_or_next_to_nothing(tmp_path: Path, cold_fraction: float, quick_fits: None) -> None:
    run = RunConfig(model=str(write_tiny_llama(tmp_path / "m.gguf")), method="low_rank", predictor_rank=32)
    outputs = []
    for one in (load_engine(run), load_engine(dataclasses.replace(run, cold_fraction=cold_fraction))):
        with one.computing():
            outputs.append(one.model(torch.arange(5, 30), one.model.new_cache()))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--predictor-rank 48", "multiple of 32, not 48"),
        ("--predictor-rank 128", "at most 64"),
        ("--recall 1.5", "recall must lie in (0, 1]"),
        ("--predictor-rank 32 --activation silu", "low_rank needs a sparsity"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path: Path, flags: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_tiny_llama(tmp_path / "m.gguf"))
    assert cli(["generate", "-m", model, "-p", "hi", "--method", "low_rank", *flags.split()]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_models_without_relu_need_a_sparsity(tmp_path: Path, quick_fits: None) -> None:
    path = str(write_tiny_gemma3(tmp_path / "g.gguf", d_ffn=256))
    with pytest.raises(ValueError, match="low_rank needs a sparsity for a model whose activation is gelu_tanh"):
        load_engine(RunConfig(model=path, method="low_rank"))
    with pytest.raises(ValueError, match=r"at most 64.*not 128"):
        load_engine(RunConfig(model=path, method="low_rank", sparsity=0.5))
    engine = load_engine(RunConfig(model=path, method="low_rank", sparsity=0.5, predictor_rank=32, recall=0.6))
    with engine.computing():
        engine.model(torch.arange(5, 60), engine.model.new_cache())
    assert 0.2 < S.density(engine.model) < 0.95


def test_the_shipped_model_keeps_its_loss(shipped_model: Path) -> None:
    engine = load_engine(RunConfig(model=str(shipped_model), method="low_rank"))
    qualities = S.predictor_qualities(engine.model)
    assert len(qualities) == 6
    for quality in qualities:
        assert quality.recall > 0.975
        assert quality.over_prediction < 6
        assert quality.density < 0.3
