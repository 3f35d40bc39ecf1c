"""Biases of an FFN (OPT) and a cutoff of its ReLU (ProSparse): every path agrees with the FFN in float64."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pinfer import sparsify as S
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.measure import MeasuredFFN
from pinfer.engine.step import DecodeStep
from pinfer.ffn import DenseFFN, FFNWeights, HybridFFN, SparseFFN
from pinfer.input_sparse_ffn import InputSparseFFN
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.registry import use_backend
from pinfer.models.weights import move
from pinfer.overlap import Lane, PrefillCosts, emulated
from pinfer.placement.accumulate import Accumulator
from pinfer.predictors import (
    CalibrationInputs,
    ExactPredictor,
    FFNMatrices,
    GateOf,
    LowRankSettings,
    Packed,
    Prediction,
    Predictor,
    fit_gate_threshold,
    fit_input_threshold,
    fit_low_rank,
    fit_sign_bits,
    fit_weighted_threshold,
    pack,
    unpack,
)
from pinfer.quality.neurons import NeuronObserver, computed_neurons
from pinfer.quant import QuantTensor
from tests.gguf_files import write_tiny_llama
from tests.second_device import CPU, ELSEWHERE, second_device

WIDTH, NEURONS, TOKENS = 64, 150, 400
CUTOFF = 0.4
KINDS = ("exact", "gate_threshold", "weighted_threshold", "shift_threshold", "low_rank", "sign_bits")


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, HELD_OUT = normal(TOKENS, WIDTH, seed=9), normal(TOKENS, WIDTH, seed=10)


class Example:
    """An FFN, ungated with biases as OPT's or gated with a cutoff as ProSparse's, and the same in float64."""

    def __init__(
        self, activation: str = "relu", *, biased: bool = True, gated: bool = False, cutoff: float = 0.0
    ) -> None:
        self.matrices = [normal(NEURONS, WIDTH, seed=seed) / 8 for seed in range(3)]  # gate, up, down by neuron
        gate, up, down = (QuantTensor.from_dense(one) for one in self.matrices)
        up_or_none = up if gated else None
        self.gate_bias = normal(NEURONS, seed=3) if biased else None
        self.down_bias = normal(WIDTH, seed=4) if biased else None
        biases = (self.gate_bias, self.down_bias)
        by_column = QuantTensor.from_dense(self.matrices[2].T)
        self.dense = DenseFFN(gate, up_or_none, by_column, activation, *biases, cutoff)
        self.weights = FFNWeights(gate, up_or_none, down, 0.0, *biases)
        self.activation, self.cutoff = activation, cutoff
        self.of_gate = {"gate_bias": self.gate_bias, "cutoff": cutoff}

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        gates = x.double() @ self.matrices[0].double().T
        return gates if self.gate_bias is None else gates + self.gate_bias

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        gates = self.gates(x)
        acted = {
            "relu": lambda g: torch.where(g > self.cutoff, g, 0.0),
            "silu": lambda g: g * g.sigmoid(),
            "gelu": lambda g: g / 2 * (1 + torch.erf(g / 2**0.5)),
        }[self.activation](gates)
        return acted if self.dense.up is None else acted * (x.double() @ self.matrices[1].double().T)

    def y(self, x: torch.Tensor) -> torch.Tensor:
        y = self.hidden(x) @ self.matrices[2].double()
        return y if self.down_bias is None else y + self.down_bias

    def predictor(self, kind: str) -> Predictor:
        gate, activation, how = self.weights.gate, self.activation, self.of_gate
        if kind == "exact":
            return ExactPredictor(gate, activation, **how)
        if kind == "gate_threshold":
            return fit_gate_threshold(gate, activation, X, **how)
        if kind == "sign_bits":
            return fit_sign_bits(gate, activation, X, HELD_OUT, 0.9, **how)
        if kind == "low_rank":
            sparsity = None if activation == "relu" else 0.5
            parts = CalibrationInputs(X, HELD_OUT, X)
            return fit_low_rank(gate, activation, parts, LowRankSettings(32, 0.9, sparsity), **how)
        assert self.weights.up is not None
        matrices = FFNMatrices(gate, self.weights.up, self.dense.down, activation, **how)
        return fit_weighted_threshold(matrices, X, shifted=kind == "shift_threshold")

    def sparse(self, predictor: Predictor) -> SparseFFN:
        return SparseFFN(self.weights, predictor, self.activation, self.cutoff)


EXAMPLES: dict[str, Callable[[], Example]] = {
    "opt": Example,
    "falcon with biases": lambda: Example("gelu"),
    "prosparse": lambda: Example(biased=False, gated=True, cutoff=CUTOFF),
    "all of it": lambda: Example(gated=True, cutoff=CUTOFF),
    "silu": lambda: Example("silu", gated=True),
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=2e-5)


@pytest.fixture(params=EXAMPLES)
def example(request: pytest.FixtureRequest) -> Example:
    return EXAMPLES[request.param]()


def kinds_for(example: Example) -> list[str]:
    relu, gated = example.activation == "relu", example.weights.up is not None
    return [
        kind
        for kind in KINDS
        if (relu or kind not in ("exact", "sign_bits")) and (gated or "threshold" not in kind or kind == KINDS[1])
    ]


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_every_method_with_every_neuron_named_is_the_ffn_itself(example: Example, tokens: int) -> None:
    x = X[:tokens]
    close(example.dense(x, x), example.y(x))
    for kind in kinds_for(example):
        predictor = example.predictor(kind)
        if kind != "exact":
            predictor = predictor.at_density(1.0)
        y = example.sparse(predictor)(x, x)
        if kind == "shift_threshold":  # but for the rounding of its compensation
            assert float((y - example.y(x)).norm() / example.y(x).norm()) < 0.04, kind
        else:
            close(y, example.y(x))
    how = (example.weights.gate, example.weights.up, example.activation)
    fitted = fit_input_threshold(X, *how, 0.0, **example.of_gate)
    close(
        InputSparseFFN(S.input_major(0, example.dense), fitted, example.activation, example.cutoff)(x, x), example.y(x)
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["opt", "prosparse", "all of it"])
def test_exact_names_the_neurons_above_the_cutoff(name: str, backend: str) -> None:
    example = EXAMPLES[name]()
    with use_backend(backend):
        predictor = example.predictor("exact")
        sparse = example.sparse(predictor)
        for tokens in (1, 5, 30):
            named = computed_neurons(predictor(X[:tokens], X[:tokens]), tokens)
            assert torch.equal(named, example.gates(X[:tokens]) > example.cutoff)
            close(sparse(X[:tokens], X[:tokens]), example.y(X[:tokens]))
    assert 0.1 < sparse.activity.density < 0.7


class Told(Predictor):
    """Hands over what another predictor names, without its gate values."""

    def __init__(self, other: Predictor) -> None:
        super().__init__()
        self.other = other

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        return self.other(x, residual)._replace(gate_values=None)

    def shard(self, neurons: torch.Tensor) -> Predictor:
        return Told(self.other.shard(neurons))


@pytest.mark.parametrize("tokens", [1, 3, 20])
def test_a_bias_is_added_once_whoever_computes_the_gate(example: Example, tokens: int) -> None:
    predictor = example.predictor("gate_threshold").at_density(0.6)
    x = X[:tokens]
    assert predictor(x, x).gate_values is not None
    close(example.sparse(predictor)(x, x), example.sparse(Told(predictor))(x, x))


@pytest.mark.parametrize("one_predictor", [False, True])
@pytest.mark.parametrize("with_lane", [False, True])
@pytest.mark.parametrize("tokens", [1, 3])
def test_biases_count_once_over_hot_and_cold(
    example: Example, tokens: int, with_lane: bool, one_predictor: bool
) -> None:
    if with_lane and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(1))
    lane: Lane | None = emulated(1, timeout_s=30.0) if with_lane else None
    try:
        for kind in [kind for kind in kinds_for(example) if kind not in ("exact", "shift_threshold")]:
            whole = example.sparse(example.predictor(kind).at_density(1.0))
            hybrid = HybridFFN.of(whole, order[:60], [order[60:]], lane, one_predictor=one_predictor)
            for opens in (False, True):
                close(hybrid(X[:tokens], X[:tokens], opens), example.y(X[:tokens]))
    finally:
        if lane is not None:
            lane.close()


def test_shards_name_what_the_whole_names(example: Example) -> None:
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(2))[:70]
    for kind in kinds_for(example):
        whole = example.predictor(kind)
        named = [computed_neurons(one(X, X), TOKENS) for one in (whole, whole.shard(order))]
        assert torch.equal(named[0][:, order], named[1]), kind
        assert bool(named[1].any()), kind


def test_a_sequences_first_token_has_its_bias() -> None:
    example = Example("silu", gated=True)
    sparse = example.sparse(example.predictor("weighted_threshold").at_density(0.3))
    y = sparse(X[:4], X[:4], opens=True)
    close(y[0], example.y(X[:1])[0])
    close(y[1:], sparse(X[1:4], X[1:4]))


def test_streamed_neurons_have_their_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    monkeypatch.setattr("pinfer.ffn.STREAMED_NEURONS", 32)
    example = Example()
    order = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(3))
    lane = emulated(1, timeout_s=30.0)
    try:
        hybrid = HybridFFN.of(example.sparse(example.predictor("exact")), order[:40], [order[40:]], lane)
        monkeypatch.setattr(PrefillCosts, "streams", lambda *_: True)
        lane.prefill = lane.prefill or object.__new__(PrefillCosts)
        close(hybrid(X[:20], X[:20]), example.y(X[:20]))
    finally:
        lane.close()


@pytest.mark.parametrize("kind", ["gate_threshold", "weighted_threshold", "shift_threshold", "low_rank", "sign_bits"])
def test_predictors_of_biased_ffns_go_into_a_file_and_come_back(kind: str) -> None:
    example = Example("relu", gated=True, cutoff=CUTOFF)
    predictor = example.predictor(kind).at_density(0.3)
    packed = pack([predictor])
    layers = json.loads(json.dumps(packed.layers))
    of = GateOf(example.weights.gate, "relu", example.gate_bias, CUTOFF)
    (back,) = unpack(Packed(packed.tensors, layers), [of])
    for x in (X[:1], X[:50]):
        assert torch.equal(*(computed_neurons(one(x, x), len(x)) for one in (predictor, back)))


def test_sign_bits_knows_of_a_bias() -> None:
    """The recall asked for is reached, with fewer neurons than one threshold for all rows would name."""
    example = Example()
    predictor = example.predictor("sign_bits")
    assert predictor.quality is not None
    assert predictor.quality.recall == pytest.approx(0.9, abs=0.02)
    assert predictor.quality.active == pytest.approx(float((example.gates(HELD_OUT) > 0).float().mean()), abs=1e-6)
    assert predictor.threshold.shape == (NEURONS,)
    blind = fit_sign_bits(example.weights.gate, "relu", X, HELD_OUT, 0.9)
    active, density = example.gates(HELD_OUT) > 0, predictor.quality.density
    named = blind.at_density(density)
    caught = computed_neurons(named(HELD_OUT, HELD_OUT), TOKENS) & active
    assert named.threshold.shape == (1,)
    assert float(caught.sum() / active.sum()) < predictor.quality.recall - 0.05


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_gates_are_ranked_with_their_bias(activation: str, shifted: bool) -> None:
    """The density asked for is reached on the very inputs: thresholds of gates without the bias would miss it."""
    gate, up, down = (QuantTensor.from_dense(normal(*shape, seed=seed) / 8) for seed, shape in
                      enumerate([(NEURONS, WIDTH), (NEURONS, WIDTH), (WIDTH, NEURONS)]))  # fmt: skip
    bias = 2 * normal(NEURONS, seed=7)
    matrices = FFNMatrices(gate, up, down, activation, bias)
    predictor = fit_weighted_threshold(matrices, X, shifted=shifted).at_density(0.3)
    named = computed_neurons(predictor(X, X), TOKENS)
    assert float(named.float().mean()) == pytest.approx(0.3, abs=0.01)


def test_low_rank_catches_what_a_bias_brings() -> None:
    example = Example()
    predictor = example.predictor("low_rank")
    assert predictor.quality is not None
    assert predictor.quality.active == pytest.approx(float((example.gates(X) > 0).float().mean()), abs=1e-6)
    named = computed_neurons(predictor(HELD_OUT, HELD_OUT), TOKENS)
    active = example.gates(HELD_OUT) > 0
    assert float((named & active).sum() / active.sum()) == pytest.approx(0.9, abs=0.02)


def test_low_rank_puts_its_bar_at_a_cutoff_above_one() -> None:
    example = Example(biased=False, gated=True, cutoff=1.5)
    predictor = example.predictor("low_rank")
    assert predictor.cuts is not None
    assert float(predictor.cuts.base.mean()) == 1.5


def test_what_is_observed_has_biases_and_cutoff() -> None:
    example = Example(gated=True, cutoff=CUTOFF)
    gate, up = example.dense.products(X)
    hidden = example.dense.hidden(gate, up)
    close(hidden, example.hidden(X))

    class Seen:
        def add(self, *given: torch.Tensor) -> None:
            self.given = given

    seen = Seen()
    close(MeasuredFFN(example.dense, seen)(X, X), example.y(X))
    close(seen.given[3], example.hidden(X)[1:])
    accumulator = Accumulator(example.matrices[2].norm(dim=1), "relu", TOKENS, CUTOFF)
    accumulator.add(X, gate, up, hidden)
    fired = (example.gates(X) > CUTOFF).sum(0)
    assert torch.equal(accumulator.finish().fired, fired)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gate_bias": torch.zeros(3)}, "gate_bias"),
        ({"down_bias": torch.zeros(3)}, "down_bias"),
        ({"down_bias": torch.zeros(WIDTH, dtype=torch.float16)}, "float16"),
        ({"cutoff": 0.1, "activation": "silu"}, "cutoff 0.1 has no meaning for activation silu"),
        ({"cutoff": -0.1}, "at least 0"),
        ({"cutoff": float("nan")}, "at least 0"),
    ],
)
def test_what_does_not_belong_to_an_ffn_is_refused(wrong: dict[str, object], message: str) -> None:
    ffn = Example().dense
    with pytest.raises(ValueError, match=message):
        DenseFFN(**{"gate": ffn.gate, "up": None, "down": ffn.down, "activation": "relu", **wrong})  # type: ignore[arg-type]


def biased_engine(path: Path) -> Engine:
    """A tiny model whose FFNs are given biases and a cutoff."""
    engine = load_engine(RunConfig(model=str(path), method="dense", activation="relu", precision="int8"))
    for layer, block in enumerate(engine.model.blocks):
        ffn = block.ffn
        assert isinstance(ffn, DenseFFN)
        biases = (0.3 * normal(ffn.gate.rows, seed=layer), 0.3 * normal(ffn.gate.columns, seed=50 + layer))
        block.ffn = DenseFFN(ffn.gate, ffn.up, ffn.down, "relu", *biases, 0.05)
    return engine


@pytest.mark.skipif(core_problem() is not None, reason=f"no CPU core: {core_problem()}")
@pytest.mark.parametrize("how", ["dense", "exact", "inputs"])
def test_recorded_steps_repeat_biases(tmp_path: Path, how: str) -> None:
    engine = biased_engine(write_tiny_llama(tmp_path / "m.gguf"))
    model, tokens = engine.model, torch.tensor([3, 9, 4, 11, 7, 2])
    with engine.computing():
        expected = model(tokens, model.new_cache())
        if how == "exact":
            S.sparsify(model, S.exact_predictors)
        if how == "inputs":
            S.sparsify_inputs(model, S.fit_input_thresholds(model, [tokens, tokens], 0.3))
        plain_cache, cache = model.new_cache(), model.new_cache()
        step = DecodeStep(model, cache)
        logits = []
        for token in tokens.tolist():
            assert torch.equal(step(token), model(torch.tensor([token]), plain_cache))
            logits.append(step._logits.clone())
    assert step.recorded
    if how == "exact":
        close_to = torch.cosine_similarity(torch.cat(logits[1:]), expected[1:]).min()
        assert float(close_to) > 0.999


def test_neurons_counted_by_quality_have_biases_and_cutoff(tmp_path: Path) -> None:
    engine = biased_engine(write_tiny_llama(tmp_path / "m.gguf"))
    S.sparsify(engine.model, S.exact_predictors)
    with engine.computing(), NeuronObserver(engine.model).watch(5) as counts:
        engine.model(torch.tensor([3, 9, 4, 11, 7]), engine.model.new_cache())
    for one in counts:
        assert one.computed == one.active == one.caught > 0
        assert one.weight_share == pytest.approx(5)


def test_biases_move_with_their_ffn() -> None:
    example = Example(gated=True, cutoff=CUTOFF)
    sparse = example.sparse(example.predictor("gate_threshold").at_density(1.0))
    with second_device() as ran:
        move(
            sparse,
            lambda one: one.to(ELSEWHERE),
            lambda one: dataclasses.replace(one, blocks=one.blocks.to(ELSEWHERE)),
        )
        x = X[:2].to(ELSEWHERE)
        y = sparse(x, x).to(CPU)
    assert {"threshold_matmul", "sparse_ffn", "add"} <= set(ran)
    close(y, example.y(X[:2]))
