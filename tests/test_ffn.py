"""FFN blocks: any split of the neurons adds up, and skipping inactive ones changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.ffn import DenseFFN, FFNWeights, HybridFFN, SparseFFN
from pinfer.kernels.activation import ZERO_BELOW_ZERO, activate
from pinfer.kernels.ops import select_active
from pinfer.kernels.registry import Op, observe_ops, use_backend
from pinfer.predictors import ExactPredictor, GateThreshold, Prediction, Predictor
from pinfer.quant import QuantTensor

WIDTH, NEURONS = 48, 75


def random_ffn(activation: str, seed: int = 0, gated: bool = True) -> tuple[DenseFFN, FFNWeights]:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(NEURONS, WIDTH, generator=generator) / 7 for _ in range(3))
    gate_q, up_q = QuantTensor.from_dense(gate), QuantTensor.from_dense(up) if gated else None
    dense = DenseFFN(gate_q, up_q, QuantTensor.from_dense(down.T), activation)
    return dense, FFNWeights(gate_q, up_q, QuantTensor.from_dense(down))


class Everything(Predictor):
    """Names every neuron, for every token, and knows no gate values."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        return Prediction(select_active(torch.ones(x.shape[0], NEURONS), torch.zeros(1)), None, None)

    def shard(self, neurons: torch.Tensor) -> Predictor:
        raise NotImplementedError


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ZERO_BELOW_ZERO)
def test_exact_equals_dense_and_skips(activation: str, gated: bool, tokens: int) -> None:
    dense, weights = random_ffn(activation, gated=gated)
    sparse = SparseFFN(weights, ExactPredictor(weights.gate, activation), activation)
    x = torch.randn(tokens, WIDTH)
    close(sparse(x, x), dense(x, x))
    fired = (x @ weights.gate.blocks.view(torch.float32).T > 0).float().mean()
    assert sparse.activity.density == pytest.approx(float(fired), abs=1e-6)
    assert 0.2 < sparse.activity.density < 0.8


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("predicted", ["gate", "list"])
def test_drelu_clamps_gate_and_up(predicted: str, tokens: int) -> None:
    """Whether the predictor hands over its gate values or a list alone: the sum over both signs, by hand."""
    dense, weights = random_ffn("drelu")
    x = torch.randn(tokens, WIDTH)
    gate, up, down = (w.blocks.view(torch.float32).double() for w in (weights.gate, weights.up, weights.down))
    expected = (((x.double() @ gate.T).clamp(min=0)) * (x.double() @ up.T).clamp(min=0)) @ down
    predictor = ExactPredictor(weights.gate, "drelu") if predicted == "gate" else Everything()
    for ffn in (dense, SparseFFN(weights, predictor, "drelu")):
        close(ffn(x, x).double(), expected)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_threshold_equals_masked_dense(activation: str, tokens: int) -> None:
    _, weights = random_ffn(activation)
    sparse = SparseFFN(weights, GateThreshold(weights.gate, activation, torch.tensor([0.12])), activation)
    x = torch.randn(tokens, WIDTH)
    gate, up, down = (w.blocks.view(torch.float32) for w in (weights.gate, weights.up, weights.down))
    hidden = activate(activation, x @ gate.T)
    hidden = torch.where(hidden.abs() > 0.12, hidden, 0.0)
    close(sparse(x, x), (hidden * (x @ up.T)) @ down)
    assert sparse.activity.density == pytest.approx(float((hidden != 0).float().mean()), abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(hot=st.sets(st.integers(0, NEURONS - 1)), tokens=st.sampled_from([1, 2, 13]), seed=st.integers(0, 10))
def test_any_hot_cold_split_adds_up(hot: set[int], tokens: int, seed: int) -> None:
    dense, weights = random_ffn("relu", seed)
    whole = SparseFFN(weights, ExactPredictor(weights.gate, "relu"), "relu")
    parts = [torch.tensor(sorted(part), dtype=torch.int64) for part in (hot, set(range(NEURONS)) - hot)]
    hybrid = HybridFFN(*(whole.shard(part) for part in parts))
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    close(hybrid(x, x), dense(x, x))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_gate_is_computed_compared_and_listed_in_one_op(backend: str) -> None:
    """What is fused on a GPU, and counted once where the core runs it as three steps."""
    _, weights = random_ffn("relu")
    seen: list[str] = []

    @contextmanager
    def observer(op: Op) -> Iterator[None]:
        seen.append(op.name)
        yield

    x = torch.randn(1, WIDTH)
    with use_backend(backend), observe_ops(observer):
        for predictor in (
            ExactPredictor(weights.gate, "relu"),
            GateThreshold(weights.gate, "relu", torch.tensor([0.1])),
        ):
            predictor(x, x)
    assert seen == ["threshold_matmul", "threshold_matmul"]


def test_nothing_active_gives_zeros() -> None:
    _, weights = random_ffn("silu")
    sparse = SparseFFN(weights, GateThreshold(weights.gate, "silu", torch.tensor([1e9])), "silu")
    for tokens in (1, 4, 20):
        x = torch.randn(tokens, WIDTH)
        assert torch.equal(sparse(x, x), torch.zeros(tokens, WIDTH))
    assert sparse.activity.density == 0


def test_a_predictor_may_read_the_residual() -> None:
    """PowerInfer's predictor sees the un-normed input; both arguments must arrive as they are."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(Everything):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
            seen.append((x, residual))
            return super().forward(x, residual)

    dense, weights = random_ffn("silu")
    x, residual = torch.randn(2, WIDTH), torch.randn(2, WIDTH)
    close(SparseFFN(weights, Spy(), "silu")(x, residual), dense(x, residual))
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[0][1], residual)


def test_exact_refuses_other_activations() -> None:
    _, weights = random_ffn("silu")
    with pytest.raises(ValueError, match="silu"):
        ExactPredictor(weights.gate, "silu")


def test_weights_of_different_sizes_are_refused() -> None:
    _, weights = random_ffn("relu")
    with pytest.raises(ValueError, match="down"):
        FFNWeights(weights.gate, weights.up, weights.down[:10])
