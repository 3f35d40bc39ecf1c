"""input_threshold (TEAL) against its formula in float64, and through loading, decoding, eval and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experiments.thresholds import bytes_share
from pinfer import sparsify as S
from pinfer.cli.main import BAD_INPUT, OK
from pinfer.cli.main import run as cli
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.engine.fitting import sequences_to_fit_on
from pinfer.engine.text import Text
from pinfer.ffn import DenseFFN
from pinfer.input_sparse_ffn import InputMajorWeights, InputSparseFFN
from pinfer.kernels.activation import hidden_of
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.planes import repack
from pinfer.kernels.registry import use_backend
from pinfer.models import replace_weights
from pinfer.predictors import InputThreshold, fit_input_threshold
from pinfer.quality import NeuronObserver
from pinfer.quant import Q4_0, Q8_0, QuantTensor, QuantType
from pinfer.quantize import quantize
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

WIDTH, NEURONS = 64, 160
ACTIVATIONS = ["silu", "gelu_tanh", "relu", "relu2", "drelu"]


class Layer:
    """A random FFN, of a type of weights, and inputs of which few are large."""

    def __init__(self, activation: str = "gelu_tanh", *, gated: bool = True, kind: QuantType | None = None) -> None:
        self.generator = torch.Generator().manual_seed(3)
        gate, up, down = (self.normal(*shape) / 8 for shape in ((NEURONS, WIDTH), (NEURONS, WIDTH), (WIDTH, NEURONS)))
        stored = [QuantTensor.from_dense(one) if kind is None else quantize(one, kind) for one in (gate, up, down)]
        self.dense = DenseFFN(stored[0], stored[1] if gated else None, stored[2], activation)
        self.gate, self.up, self.down = (dequantize(one).double() for one in stored)
        self.calibration = self.inputs(500)

    def inputs(self, tokens: int) -> torch.Tensor:
        return self.normal(tokens, WIDTH) * self.normal(tokens, WIDTH).abs()

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        up = None if self.dense.up is None else x.double() @ self.up.T
        return hidden_of(self.dense.activation, x.double() @ self.gate.T, up)

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x) @ self.down.T

    def fit(self, sparsity: float) -> InputThreshold:
        return fit_input_threshold(self.calibration, self.dense.gate, self.dense.up, self.dense.activation, sparsity)

    def sparse(self, sparsity: float) -> InputSparseFFN:
        return InputSparseFFN(S.input_major(0, self.dense), self.fit(sparsity), self.dense.activation)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


def largest_skipped(sizes: torch.Tensor, share: float) -> float:
    """What a share of the sizes does not exceed, by sorting."""
    return float(sizes.flatten().sort().values[round(share * sizes.numel()) - 1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_at_sparsity_zero_it_is_the_dense_ffn(activation: str, gated: bool) -> None:
    layer = Layer(activation, gated=gated)
    x, ffn = layer.inputs(9), layer.sparse(0)
    x[2, 5] = 0  # kept as well
    assert error(ffn(x, x), layer.whole(x)) < 1e-5
    assert ffn.activity.density == 1
    assert (ffn.weights.input_error, ffn.weights.down_error) == (0, 0)


@pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=str)
def test_quantised_weights_lose_what_their_transposes_lose(kind: QuantType) -> None:
    layer = Layer(kind=kind)
    x, ffn = layer.inputs(9), layer.sparse(0)
    assert 0.001 < ffn.weights.input_error < 0.01
    assert 0 < error(ffn(x, x), layer.whole(x)) < 2 * (ffn.weights.input_error + ffn.weights.down_error)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_it_adds_up_what_its_formula_says(tokens: int, gated: bool) -> None:
    layer = Layer(gated=gated)
    small = largest_skipped(layer.calibration.abs(), 0.5)
    seen = layer.hidden(torch.where(layer.calibration.abs() <= small, 0, layer.calibration))
    small_hidden = largest_skipped(seen.abs(), 0.5)
    x, ffn = layer.inputs(tokens), layer.sparse(0.5)
    kept = torch.where(x.abs() <= small, 0, x)
    hidden = layer.hidden(kept)
    kept_hidden = torch.where(hidden.abs() <= small_hidden, 0, hidden)
    assert error(ffn(x, x), kept_hidden @ layer.down.T) < 1e-5
    assert error(ffn(x, x), layer.whole(x)) > 0.05
    matrices = 2 if gated else 1  # that inputs meet
    done = matrices * NEURONS * int((kept != 0).sum()) + WIDTH * int((kept_hidden != 0).sum())
    assert ffn.activity.density == pytest.approx(done / (tokens * (matrices + 1) * NEURONS * WIDTH))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_the_asked_share_of_the_calibration_inputs_is_skipped(sparsity: float, activation: str) -> None:
    layer = Layer(activation)
    ffn = layer.sparse(sparsity)
    ffn(layer.calibration, layer.calibration)
    for (kept, tokens), width in ((ffn.activity.inputs, WIDTH), (ffn.activity.hidden, NEURONS)):
        assert tokens == 500
        assert 1 - int(kept) / (500 * width) == pytest.approx(sparsity, abs=1e-4)
    assert ffn.activity.density == pytest.approx(1 - sparsity, abs=1e-4)


def test_hidden_values_are_sampled_where_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    monkeypatch.setattr("pinfer.predictors.input_threshold.KEPT_VALUES", 100 * NEURONS)
    found, x = layer.fit(0.5), layer.calibration
    assert found.inputs == largest_skipped(x.abs(), 0.5)
    fifths = layer.hidden(torch.where(x.abs() <= found.inputs, 0, x)[::5])
    assert found.hidden == pytest.approx(largest_skipped(fifths.abs(), 0.5), rel=1e-5)


def test_where_most_hidden_values_are_zero_no_others_are_skipped() -> None:
    layer = Layer("relu")
    assert layer.fit(0.3).hidden == 0
    assert layer.fit(0.9).hidden > 0


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_sequences_first_token_is_computed_whole(tokens: int) -> None:
    layer = Layer()
    x, ffn = layer.inputs(tokens), layer.sparse(0.8)
    opened = ffn(x, x, opens=True)
    counted = ffn.activity.totals.tolist()
    other = ffn(x, x)
    assert error(opened[:1], layer.whole(x[:1])) < 1e-5
    assert error(other[:1], layer.whole(x[:1])) > 0.05
    assert torch.allclose(opened[1:], other[1:], atol=1e-6)
    assert [row[1] for row in counted] == [tokens, tokens]
    if tokens == 1:
        assert [row[0] for row in counted] == [WIDTH, NEURONS]


def test_calibration_is_layer_by_layer_and_leaves_first_tokens_out(tmp_path: Path) -> None:
    model = load_engine(RunConfig(model=str(write_tiny_gemma3(tmp_path / "m.gguf")), method="dense")).model
    sequences = [torch.arange(5, 40), torch.arange(3, 20), torch.arange(2)]
    with torch.inference_mode():
        found = S.fit_input_thresholds(model, sequences, 0.4)
        layers = list(S.ffn_inputs(model, sequences))
    assert all(isinstance(ffn, DenseFFN) for ffn in model.ffns()), "calibration must not change the model"
    for (_, inputs), threshold in zip(layers, found, strict=True):
        assert threshold.inputs == largest_skipped(torch.cat([x[1:] for x in inputs]).abs(), 0.4)
        assert threshold.inputs != largest_skipped(torch.cat(inputs).abs(), 0.4)
    assert len({threshold.inputs for threshold in found}) == len(layers)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_backends_agree(backend: str, tokens: int) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed on this platform")
    layer = Layer(kind=Q4_0)
    x, ffn = layer.inputs(tokens), layer.sparse(0.5)
    weights = ffn.weights
    hidden = hidden_of(
        *("gelu_tanh", *(kept_product(x, matrix, ffn.thresholds[0]) for matrix in (weights.gate, weights.up)))
    )
    expected = kept_product(hidden, weights.down, ffn.thresholds[1])
    if backend == "triton":
        replace_weights(ffn, repack)
        assert ffn.weights.gate.layout == "planes"
    with use_backend(backend):
        assert error(ffn(x, x), expected) < 1e-5
    assert ffn.activity.hidden.tolist() == [int((hidden.abs() > ffn.thresholds[1]).sum()), tokens]


def kept_product(x: torch.Tensor, weight: QuantTensor, threshold: torch.Tensor) -> torch.Tensor:
    return torch.where(x.abs() > threshold, x, 0).double() @ dequantize(weight).double()


@pytest.mark.parametrize("activation", ["relu", "silu", "drelu"])
@pytest.mark.parametrize("last", [1, 20, 33])
def test_what_eval_counts_is_what_is_kept(tmp_path: Path, activation: str, last: int) -> None:
    """Computed: hidden values kept; truly active: by the whole input; density: multiply-adds, as counted on the device."""
    path = str(write_tiny_llama(tmp_path / "m.gguf"))
    run = RunConfig(model=path, method="input_threshold", sparsity=0.6, activation=activation, precision="float32")  # type: ignore[arg-type]
    engine = load_engine(run)
    inputs: list[torch.Tensor] = []
    hooks = [ffn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for ffn in engine.model.ffns()]
    observer = NeuronObserver(engine.model)
    tokens = torch.arange(33) % 20
    with engine.computing(), observer.watch(last) as counts:
        engine.model(tokens, engine.model.new_cache())
    for hook in hooks:
        hook.remove()
    for ffn, x, found, layer in zip(engine.model.ffns(), inputs, counts, S.layer_densities(engine.model), strict=True):
        gate, up, down = (dequantize(one).double() for one in (ffn.weights.gate, ffn.weights.up, ffn.weights.down))
        small, small_hidden = (float(one) for one in ffn.thresholds)
        large = x.abs() > small
        large[0] = True  # the opening token
        kept = torch.where(large, x, 0).double()
        computed = hidden_of(activation, kept @ gate, kept @ up).abs() > small_hidden
        computed[0] = True
        pre = x.double() @ gate
        weight = hidden_of(activation, pre, x.double() @ up).abs() * down.norm(dim=1)
        active = pre > 0
        if activation == "silu":
            active = torch.zeros_like(computed)
            for row, (sizes, n) in enumerate(zip(weight, computed.sum(1), strict=True)):
                active[row, sizes.topk(int(n)).indices] = True
        large, computed, active, weight = large[-last:], computed[-last:], active[-last:], weight[-last:]
        assert (found.tokens, found.computed, found.active) == (last, int(computed.sum()), int(active.sum()))
        assert found.caught == int((computed & active).sum())
        held = torch.where(computed, weight, 0).sum(1) / weight.sum(1)
        assert found.weighted_recall == pytest.approx(float(held.mean()), rel=1e-4)
        done = (2 * large.double().mean() + computed.double().mean()) / 3
        assert found.density == pytest.approx(float(done))
        assert found.recall < 1 or activation == "drelu" or last == 1
        if last == 33:
            assert found.density == pytest.approx(layer.density)
            assert layer.tokens == 33


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_model_runs_by_it(tmp_path: Path, family: str) -> None:
    write = write_tiny_llama if family == "llama" else write_tiny_gemma3
    path = str(write(tmp_path / "m.gguf", weight_type="Q8_0"))
    dense = load_engine(RunConfig(model=path, method="dense", precision="float32", activation="silu"))
    whole, half, other = (
        load_engine(RunConfig(model=path, method="input_threshold", sparsity=sparsity, precision="float32", activation="silu", backend=backend))  # type: ignore[arg-type]
        for sparsity, backend in ((0.0, "auto"), (0.5, "auto"), (0.5, "reference"))
    )  # fmt: skip
    tokens, logits = torch.arange(5, 25), {}
    for name, engine in (("dense", dense), ("whole", whole), ("half", half), ("other", other)):
        S.reset_activity(engine.model)
        with engine.computing():
            logits[name] = engine.model(tokens, engine.model.new_cache())
    assert error(logits["whole"], logits["dense"]) < 0.02  # the transposes' rounding
    assert S.density(whole.model) == 1
    assert error(logits["half"][:1], logits["dense"][:1]) < 0.02  # the opening token is dense
    assert error(logits["half"][1:], logits["dense"][1:]) > 0.05
    assert 0.4 < S.density(half.model) < 0.65
    assert error(logits["other"], logits["half"]) < 1e-4
    assert S.predictor_bytes(half.model) == 0
    assert any("gate and up are requantised" in note for note in half.notes)
    sequences = sequences_to_fit_on("input_threshold", dense.tokenizer, Text.read(None), dense.config.context_length)
    with dense.computing():
        thresholds = S.fit_input_thresholds(dense.model, sequences, 0.5)
    assert [tuple(float(one) for one in ffn.thresholds) for ffn in half.model.ffns()] == [
        pytest.approx(tuple(one)) for one in thresholds
    ]


def test_bytes_read_are_those_of_the_rows_that_are_kept(tmp_path: Path) -> None:
    path = str(write_tiny_llama(tmp_path / "m.gguf", weight_type="Q4_0"))
    engine = load_engine(RunConfig(model=path, method="input_threshold", sparsity=0.5))
    with engine.computing():
        engine.model(torch.arange(5, 25), engine.model.new_cache())
    read = dense = 0.0
    for ffn in engine.model.ffns():
        inputs, hidden = (int(one[0]) / 20 for one in (ffn.activity.inputs, ffn.activity.hidden))
        read += 2 * inputs * Q8_0.row_bytes(96) + hidden * Q8_0.row_bytes(64)
        dense += 2 * 96 * Q4_0.row_bytes(64) + 96 * Q8_0.row_bytes(64)
    assert bytes_share(engine) == pytest.approx(read / dense)
    assert 0.5 < bytes_share(engine) < 1


def test_the_shipped_model_through_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--method", "input_threshold", "--sparsity", "0.5", "-t", "1", "--json"]
    assert cli(["generate", "-p", "And the LORD said", "-n", "12", "--temp", "0", "--ignore-eos", *flags]) == OK
    written = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert written["method"] == "input_threshold"
    assert len(written["ids"]) >= 12
    assert 0.3 < written["density"] < 0.5  # most hidden values of a ReLU model are zero
    assert cli(["eval", "--window", "128", "--windows", "4", *flags]) == OK
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["method"], found["truly_active"]) == ("input_threshold", "nonzero")
    assert 0.02 < found["added_nats"] < 2
    assert found["kl_nats"] > 0.02
    assert 0.3 < found["density"] < 0.5
    assert 0.5 < found["recall"] < found["weighted_recall"] < 1
    assert found["over_prediction"] > 1
    assert len(found["layers"]) == 6


@pytest.mark.parametrize("command", ["generate", "eval"])
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "method input_threshold needs a sparsity"),
        (["--sparsity", "0.5", "--cold-fraction", "0.5"], "cold_fraction 0.5 has no meaning for the input_threshold"),
        (["--sparsity", "1"], "sparsity must lie in [0, 0.99]"),
    ],
)
def test_bad_settings_are_one_line(
    command: str, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = ["-p", "a"] if command == "generate" else ["--window", "64"]
    assert cli([command, *prompt, "--method", "input_threshold", *flags]) == BAD_INPUT
    message = capsys.readouterr().err
    assert says in message
    assert message.count("\n") == 1


def test_what_cannot_be_calibrated_or_replaced_says_so(tmp_path: Path) -> None:
    layer = Layer()
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            layer.fit(sparsity)
    layer.calibration[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        layer.fit(0.5)
    good = S.input_major(0, layer.dense)
    with pytest.raises(ValueError, match=r"up is \(160, 64\), expected"):
        InputMajorWeights(good.gate, good.down, good.down)
    with pytest.raises(ValueError, match=r"down is \(64, 160\), expected"):
        InputMajorWeights(good.gate, good.up, good.gate)
    model = load_engine(RunConfig(model=str(write_tiny_llama(tmp_path / "m.gguf")), method="dense")).model
    with pytest.raises(ValueError, match="at least 2 tokens"):
        S.fit_input_thresholds(model, [torch.arange(9), torch.arange(1)], 0.5)
    S.sparsify_inputs(model, [InputThreshold(0.1, 0.1)] * 2)
    with pytest.raises(ValueError, match="sparse already"):
        S.fit_input_thresholds(model, [torch.arange(9)], 0.5)
    with pytest.raises(ValueError, match="layer 0 is not dense: it has a InputSparseFFN"):
        S.sparsify_inputs(model, [InputThreshold(0.1, 0.1)] * 2)
