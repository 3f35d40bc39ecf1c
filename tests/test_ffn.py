"""FFN blocks: any split of the neurons adds up, and skipping inactive ones changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.ffn import DenseFFN, FFNWeights, HybridFFN, SparseFFN
from pinfer.kernels.activation import activate
from pinfer.predictors import ExactPredictor, GateThreshold, Prediction, Predictor
from pinfer.predictors.base import predict_above
from pinfer.quant import QuantTensor

WIDTH, NEURONS = 48, 75


def random_ffn(activation: str, seed: int = 0, gated: bool = True) -> tuple[DenseFFN, FFNWeights]:
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (torch.randn(NEURONS, WIDTH, generator=generator) / 7 for _ in range(3))
    gate_q, up_q = QuantTensor.from_dense(gate), QuantTensor.from_dense(up) if gated else None
    dense = DenseFFN(gate_q, up_q, QuantTensor.from_dense(down.T), activation)
    return dense, FFNWeights(gate_q, up_q, QuantTensor.from_dense(down))


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_exact_equals_dense_and_skips(activation: str, gated: bool, tokens: int) -> None:
    dense, weights = random_ffn(activation, gated=gated)
    sparse = SparseFFN(weights, ExactPredictor(weights.gate, activation), activation)
    x = torch.randn(tokens, WIDTH)
    close(sparse(x, x), dense(x, x))
    fired = (x @ weights.gate.blocks.view(torch.float32).T > 0).float().mean()
    assert sparse.activity.density == pytest.approx(float(fired), abs=1e-6)
    assert 0.2 < sparse.activity.density < 0.8


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_threshold_equals_masked_dense(activation: str, tokens: int) -> None:
    _, weights = random_ffn(activation)
    sparse = SparseFFN(weights, GateThreshold(weights.gate, activation, 0.12), activation)
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


def test_nothing_active_gives_zeros() -> None:
    _, weights = random_ffn("silu")
    sparse = SparseFFN(weights, GateThreshold(weights.gate, "silu", 1e9), "silu")
    for tokens in (1, 4, 20):
        x = torch.randn(tokens, WIDTH)
        assert torch.equal(sparse(x, x), torch.zeros(tokens, WIDTH))
    assert sparse.activity.density == 0


def test_a_predictor_may_read_the_residual() -> None:
    """PowerInfer's predictor sees the un-normed input; both arguments must arrive as they are."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(Predictor):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
            seen.append((x, residual))
            return predict_above(torch.ones(x.shape[0], NEURONS), torch.zeros(1), None)

        def shard(self, neurons: torch.Tensor) -> Predictor:
            raise NotImplementedError

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
