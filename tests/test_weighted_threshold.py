"""weighted_threshold and shift_threshold against what they are made of, in float64, and against CATS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pinfer import sparsify as S
from pinfer.cli.main import BAD_INPUT
from pinfer.cli.main import run as cli
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.error_feedback import error_feedback
from pinfer.ffn import FFNWeights, HybridFFN, SparseFFN
from pinfer.kernels.activation import activate
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.models import KVCache
from pinfer.predictors import FFNMatrices, Predictor, WeightedThreshold, fit_gate_threshold, fit_weighted_threshold
from pinfer.predictors.weighted_threshold import compensation_of
from pinfer.quant import F16, Q5_0, QuantTensor
from tests.gguf_files import write_tiny_gemma3

WIDTH, NEURONS = 64, 160


class Layer:
    """A random SiLU FFN, most gates in the dip below zero, up products of sizes that differ by neuron; inputs for it."""

    def __init__(self, seed: int = 0, activation: str = "silu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        size = 0.1 + 2 * torch.rand(NEURONS, 1, generator=self.generator)
        self.gate, self.up = self.normal(NEURONS, WIDTH) / 8, size * self.normal(NEURONS, WIDTH) / 8
        self.gate[:, -1] = -1.5  # its inputs end in 1
        self.down = self.normal(WIDTH, NEURONS) / 12
        matrices = (QuantTensor.from_dense(one) for one in (self.gate, self.up, self.down))
        self.ffn = FFNMatrices(*matrices, activation)
        self.calibration = self.inputs(600)

    def inputs(self, tokens: int) -> torch.Tensor:
        return torch.cat([self.normal(tokens, WIDTH - 1), torch.ones(tokens, 1)], dim=1)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        pre, up = x.double() @ self.gate.double().T, x.double() @ self.up.double().T
        return (activate(self.ffn.activation, pre) * up) @ self.down.double().T

    def sparse(self, predictor: Predictor) -> SparseFFN:
        down = QuantTensor.from_dense(self.down.T.contiguous())
        return SparseFFN(FFNWeights(self.ffn.gate, self.ffn.up, down), predictor, self.ffn.activation)

    def fit(self, sparsity: float, *, shifted: bool = True) -> WeightedThreshold:
        return fit_weighted_threshold(self.ffn, self.calibration, shifted=shifted).at_density(1 - sparsity)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("shifted", [False, True])
def test_it_adds_up_what_its_formula_says(tokens: int, shifted: bool) -> None:
    layer = Layer()
    predictor, x = layer.fit(0.6, shifted=shifted), layer.inputs(tokens)
    pre, up = x.double() @ layer.gate.double().T, x.double() @ layer.up.double().T
    values = activate("silu", pre) - (predictor.shift.double() if shifted else 0)
    kept = torch.where(values.abs() > predictor.threshold, values, 0)
    expected = (kept * up) @ layer.down.double().T
    if shifted:
        expected += x.double() @ dequantize(predictor.compensation).double().T
    assert 0.2 < float((kept != 0).double().mean()) < 0.6
    assert error(layer.sparse(predictor)(x, x), expected) < 1e-5


def test_the_compensation_is_the_sum_of_constant_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, center = Layer(), torch.linspace(-0.3, 0.1, NEURONS)
    x = layer.calibration
    expected = layer.down @ (center[:, None] * layer.up)
    whole = dequantize(compensation_of(layer.ffn, center, x))
    assert error(x @ whole.T, x.double() @ expected.double().T) < 0.05  # its rounding to five bits
    assert torch.equal(whole, dequantize(error_feedback(expected, x.T @ x / len(x), Q5_0)))
    monkeypatch.setattr("pinfer.predictors.weighted_threshold.CHUNK_BYTES", 4 * 7 * NEURONS)
    pieced = dequantize(compensation_of(layer.ffn, center, x))
    assert error(x @ pieced.T, x.double() @ whole.double().T) < 0.02


def test_a_width_of_no_whole_blocks_has_its_compensation_in_f16() -> None:
    layer, center, width = Layer(), torch.linspace(-0.3, 0.1, NEURONS), WIDTH - 2
    gate, up = (QuantTensor.from_dense(one[:, :width]) for one in (layer.gate, layer.up))
    ffn = FFNMatrices(gate, up, QuantTensor.from_dense(layer.down[:width]), "silu")
    matrix = compensation_of(ffn, center, layer.calibration[:, :width])
    assert matrix.type is F16
    expected = layer.down[:width] @ (center[:, None] * layer.up[:, :width])
    assert error(dequantize(matrix), expected.double()) < 1e-3


@pytest.mark.parametrize("shifted", [False, True])
def test_neurons_are_ranked_by_what_they_add(shifted: bool) -> None:
    """By |act(g · x) - c| · E|u · x| · ‖d‖ in float64, which down's columns of very different norms decide."""
    layer = Layer()
    layer.down *= torch.logspace(-1.5, 1.5, NEURONS)[torch.randperm(NEURONS, generator=layer.generator)]
    layer.ffn = layer.ffn._replace(down=QuantTensor.from_dense(layer.down))
    x = layer.calibration.double()
    values = activate("silu", x @ layer.gate.double().T)
    if shifted:
        values = values - values.median(dim=0).values
    sizes = values.abs() * (x @ layer.up.double().T).abs().mean(dim=0) * layer.down.double().norm(dim=0)
    expected = sizes > sizes.flatten().kthvalue(round(0.6 * sizes.numel())).values
    kept = layer.fit(0.6, shifted=shifted)(layer.calibration, layer.calibration).mask
    assert float((kept == expected).double().mean()) > 0.999


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_the_asked_share_is_skipped(sparsity: float, shifted: bool) -> None:
    layer = Layer()
    predictor = layer.fit(sparsity, shifted=shifted)
    ffn = layer.sparse(predictor)
    ffn(layer.calibration, layer.calibration)
    assert abs(1 - ffn.activity.density - sparsity) < 0.002
    assert predictor.expected_density == pytest.approx(1 - sparsity)


def test_with_every_neuron_kept_it_is_the_dense_ffn() -> None:
    layer = Layer()
    x, predictor = layer.inputs(9), layer.fit(0)
    plain, shifted = layer.sparse(layer.fit(0, shifted=False)), layer.sparse(predictor)
    exact = layer.down.double() @ (predictor.shift[:, None] * layer.up).double()
    rounding = x.double() @ (dequantize(predictor.compensation).double() - exact).T
    assert error(plain(x, x), layer.dense(x)) < 1e-5
    assert error(shifted(x, x), layer.dense(x) + rounding) < 1e-5
    assert float(rounding.norm() / layer.dense(x).norm()) < 0.06  # of uncorrelated inputs, the worst there are
    assert plain.activity.density == shifted.activity.density == 1


def test_weights_help_and_the_shift_helps_more() -> None:
    layer = Layer()
    x, sparsity = layer.inputs(200), 0.6
    cats = fit_gate_threshold(layer.ffn.gate, "silu", layer.calibration).at_density(1 - sparsity)
    errors = [
        error(layer.sparse(one)(x, x), layer.dense(x))
        for one in (cats, layer.fit(sparsity, shifted=False), layer.fit(sparsity))
    ]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.7 * errors[1]


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_sequences_first_token_is_computed_whole(tokens: int) -> None:
    layer = Layer()
    x, ffn = layer.inputs(tokens), layer.sparse(layer.fit(0.8))
    opened, other = ffn(x, x, opens=True), ffn(x, x)
    assert error(opened[:1], layer.dense(x[:1])) < 1e-5
    assert error(other[:1], layer.dense(x[:1])) > 0.05
    assert torch.allclose(opened[1:], other[1:], atol=1e-6)


def test_shards_are_compensated_once() -> None:
    layer = Layer()
    x, ffn = layer.inputs(6), layer.sparse(layer.fit(0.6))
    order = torch.randperm(NEURONS, generator=layer.generator)
    hybrid = HybridFFN(ffn.shard(order[:50]), ffn.shard(order[50:], compensated=False))
    assert error(hybrid(x, x), ffn(x, x).double()) < 1e-5
    assert error(hybrid(x, x, opens=True), ffn(x, x, opens=True).double()) < 1e-5


@pytest.mark.parametrize("method", ["weighted_threshold", "shift_threshold"])
@pytest.mark.parametrize("cold_fraction", [0.0, 0.4])
def test_a_model_runs_by_it(tmp_path: Path, method: str, cold_fraction: float) -> None:
    path = write_tiny_gemma3(tmp_path / "gemma3.gguf")
    run = RunConfig(
        model=str(path),
        method=method,
        sparsity=0.5,
        cold_fraction=cold_fraction,
        precision="float32",  # type: ignore[arg-type]
    )
    engine, dense = load_engine(run), load_engine(RunConfig(model=str(path), method="dense", precision="float32"))
    tokens = torch.arange(5, 25)
    with engine.computing():
        logits = engine.model(tokens, KVCache(engine.config, 32))
        expected = dense.model(tokens, KVCache(engine.config, 32))
    assert torch.allclose(logits[:1], expected[:1], atol=1e-4)  # the opening token is dense
    assert not torch.allclose(logits[1:], expected[1:], atol=1e-4)
    assert 0.3 < S.density(engine.model) < 0.75
    config = engine.config
    matrix = Q5_0.row_bytes(config.d_model) * config.d_model if config.d_model % 32 == 0 else 2 * config.d_model**2
    assert S.predictor_bytes(engine.model) == (config.n_layers * matrix if method == "shift_threshold" else 0)


def test_bad_settings_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = Layer()
    for sparsity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="does not lie in"):
            layer.fit(sparsity)
    layer.calibration[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        layer.fit(0.5)
    with pytest.raises(ValueError, match="clamps"):
        Layer(activation="drelu").fit(0.5)
    path = write_tiny_gemma3(tmp_path / "gemma3.gguf")
    assert cli(["generate", "-m", str(path), "-p", "a", "--method", "shift_threshold"]) == BAD_INPUT
    assert "needs a sparsity" in capsys.readouterr().err
