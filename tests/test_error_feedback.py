"""Rounding with error feedback: against plain rounding, against an exhaustive statement of its rule, and its layout."""

from __future__ import annotations

import pytest
import torch

from pinfer import error_feedback as module
from pinfer.error_feedback import GRIDS, Grid, error_feedback, levels_and_scales
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.quant import Q4_0, Q5_0, Q8_0, QuantTensor, QuantType
from pinfer.quantize import pack_levels, quantize

WIDTH, ROWS = 96, 70


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int) -> torch.Tensor:
    """Inputs float32 [T, D] whose channels differ in size and go together."""
    return normal(tokens, WIDTH, seed=1) @ (normal(WIDTH, WIDTH, seed=2) * torch.logspace(-1, 0.5, WIDTH)) / 10


WEIGHTS, X = normal(ROWS, WIDTH), inputs(2000)
MOMENT = X.T @ X / len(X)


def error(rounded: QuantTensor, x: torch.Tensor = X, weights: torch.Tensor = WEIGHTS) -> float:
    """Relative error of the products with x."""
    return float(((dequantize(rounded) - weights) @ x.T).norm() / (weights @ x.T).norm())


@pytest.mark.parametrize("kind", [Q4_0, Q5_0])
def test_products_are_nearer_than_by_plain_rounding(kind: QuantType) -> None:
    assert error(error_feedback(WEIGHTS, MOMENT, kind)) < 0.6 * error(quantize(WEIGHTS, kind))


@pytest.mark.parametrize("tokens", [1, 10, 40])
def test_fewer_inputs_than_columns_do(tokens: int) -> None:
    x = X[:tokens]
    rounded = error_feedback(WEIGHTS, x.T @ x / tokens, Q4_0)
    assert error(rounded, x) < 0.5 * error(quantize(WEIGHTS, Q4_0), x)
    assert error(rounded, inputs(300)) < 3 * error(quantize(WEIGHTS, Q4_0), inputs(300))


def test_without_inputs_the_weights_themselves_are_kept() -> None:
    rounded = dequantize(error_feedback(WEIGHTS, torch.zeros(WIDTH, WIDTH), Q4_0))
    plain = dequantize(quantize(WEIGHTS, Q4_0))
    assert float((rounded - WEIGHTS).norm()) < float((plain - WEIGHTS).norm())


@pytest.mark.parametrize("kind", [Q4_0, Q5_0])
def test_blocks_hold_the_levels_exactly(kind: QuantType) -> None:
    levels, scales = levels_and_scales(WEIGHTS, MOMENT, 32, GRIDS[kind])
    packed = pack_levels(levels, scales, kind)
    assert packed.type is kind and packed.shape == (ROWS, WIDTH)
    assert torch.equal(dequantize(packed), levels * scales.repeat_interleave(32, dim=1))
    assert torch.equal(packed.blocks, error_feedback(WEIGHTS, MOMENT, kind).blocks)
    assert levels.min() == GRIDS[kind].low and levels.max() == GRIDS[kind].high
    assert torch.equal(levels, levels.round())


def test_each_column_gains_what_those_before_it_lost() -> None:
    """One group of 16 columns, a scale of 1, in float64: the textbook form (GPTQ), which inverts the moment."""
    weights, x = 3 * normal(5, 16, seed=3), normal(200, 16, seed=4) @ normal(16, 16, seed=5)
    moment, grid = x.T @ x / 200, Grid(-8, 7)
    order = moment.diagonal().argsort(descending=True)
    damping, passed = module._passed_on(moment[order][:, order])
    result = module._rounded(weights.T.contiguous(), torch.ones(1, 5), 16, passed, order, grid)
    damped = moment.double() + damping * torch.eye(16)
    left, remaining, expected = weights.double(), order.tolist(), torch.empty(5, 16, dtype=torch.float64)
    while remaining:
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        column = remaining[0]
        expected[:, column] = left[:, column].round().clamp(-8, 7)
        lost = (left[:, column] - expected[:, column])[:, None]
        left[:, remaining] = left[:, remaining] - lost * inverse[0] / inverse[0, 0]
        remaining = remaining[1:]
    assert torch.equal(result.T.double(), expected)


def test_rows_are_rounded_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = error_feedback(WEIGHTS, MOMENT, Q4_0)
    monkeypatch.setattr(module, "CHUNK_WEIGHTS", 33 * WIDTH)
    monkeypatch.setattr(module, "BLOCK", 7)
    assert error(error_feedback(WEIGHTS, MOMENT, Q4_0)) == pytest.approx(error(whole), rel=0.02)


@pytest.mark.parametrize(("size", "limit"), [(0.0, 0.0), (1e-9, 1.0), (1e-6, 0.5), (6e4, 0.05)])
def test_tiny_and_huge_weights(size: float, limit: float) -> None:
    """A scale below 3e-8 is 0 in fp16, and near that it is coarse."""
    weights = size * WEIGHTS / WEIGHTS.abs().max()
    lost = (dequantize(error_feedback(weights, MOMENT, Q4_0)) - weights) @ X.T
    assert float(lost.norm()) <= 1.001 * limit * float((weights @ X.T).norm())


def test_what_cannot_be_rounded_is_refused() -> None:
    for bad in (torch.nan, torch.inf, 1e5):
        weights = WEIGHTS.clone()
        weights[3, 4] = bad
        with pytest.raises(ValueError, match="not finite or too large for Q4_0"):
            error_feedback(weights, MOMENT, Q4_0)
    moment = MOMENT.clone()
    moment[0, 1] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        error_feedback(WEIGHTS, moment, Q4_0)
    with pytest.raises(ValueError, match=r"\[95, 95\], expected"):
        error_feedback(WEIGHTS, MOMENT[1:, 1:], Q4_0)
    with pytest.raises(ValueError, match="not positive"):
        error_feedback(WEIGHTS, MOMENT - 2 * MOMENT.diagonal().mean() * torch.eye(WIDTH), Q4_0)
    with pytest.raises(ValueError, match="expected float32"):
        error_feedback(WEIGHTS.double(), MOMENT, Q4_0)
    with pytest.raises(ValueError, match="to Q4_0 or Q5_0, not to Q8_0"):
        error_feedback(WEIGHTS, MOMENT, Q8_0)
    with pytest.raises(ValueError, match="95 columns"):
        error_feedback(WEIGHTS[:, 1:], MOMENT[1:, 1:], Q4_0)
