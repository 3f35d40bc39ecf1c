"""The study of the gate's bytes: its arithmetic against shift_threshold, its rounding against plain rounding."""

from __future__ import annotations

import pytest
import torch

from experiments.error_feedback import grid, rounded
from experiments.gate_bytes import Layer, ScreenedFFN, Variant
from pinfer.ffn import DenseFFN, FFNWeights, SparseFFN
from pinfer.predictors import FFNMatrices, fit_weighted_threshold
from pinfer.quant import Q8_0, QuantTensor
from pinfer.quantize import quantize
from pinfer.sparsify import transposed_down

WIDTH, NEURONS = 64, 160
PLAIN = {"small_m": False, "refit": False, "norms": False}


class Example:
    """A random SiLU FFN and inputs whose channels differ in size and go together."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        gate, up, down = normal(NEURONS, WIDTH) / 8, normal(NEURONS, WIDTH) / 8, normal(WIDTH, NEURONS) / 12
        self.ffn = DenseFFN(*(QuantTensor.from_dense(one) for one in (gate, up, down)), "silu")
        mixing = normal(WIDTH, WIDTH) * torch.logspace(-1, 0.5, WIDTH) / 8
        self.calibration, self.x = (normal(tokens, WIDTH) @ mixing for tokens in (3000, 50))
        self.layer = Layer(self.ffn, self.calibration)

    def run(self, x: torch.Tensor, sparsity: float, **choices: object) -> torch.Tensor:
        return ScreenedFFN(self.layer, Variant("", sparsity, **choices))(x, x)

    def error(self, **choices: object) -> float:
        dense = self.layer.dense(self.x)
        return float((self.run(self.x, 0.6, **choices) - dense).norm() / dense.norm())


@pytest.fixture(scope="module")
def example() -> Example:
    return Example()


@pytest.mark.parametrize("choices", [{}, {"exact": True}, {"copy": (16, WIDTH)}, {"copy": (16, WIDTH), "exact": True}])
def test_with_a_precise_copy_it_is_shift_threshold(example: Example, choices: dict[str, object]) -> None:
    ffn = example.ffn
    predictor = fit_weighted_threshold(
        FFNMatrices(ffn.gate, ffn.up, ffn.down, "silu"), example.calibration, shifted=True
    )
    down = transposed_down(0, ffn)[0]
    predictor = predictor.at_density(0.4)
    predictor.compensation = quantize(example.layer.matrix, Q8_0)
    shipped = SparseFFN(FFNWeights(ffn.gate, ffn.up, down), predictor, "silu")
    expected = shipped(example.x, example.x)
    result = example.run(example.x, 0.6, **PLAIN, **choices)
    assert float((result - expected).norm() / expected.norm()) < (0.01 if "copy" in choices else 1e-4)


def test_an_opening_token_is_dense_and_not_counted(example: Example) -> None:
    ffn = ScreenedFFN(example.layer, Variant("", 0.6, copy=(2, 64), skipped=0.5))
    y = ffn(example.x, example.x, opens=True)
    assert torch.allclose(y[0], example.layer.dense(example.x)[0], atol=1e-5)
    assert ffn.tokens == len(example.x) - 1


def test_errors_order_as_precision_does(example: Example) -> None:
    by_bits = [example.error(copy=(bits, 32)) for bits in (2, 3, 4)]
    assert by_bits[0] > 1.1 * by_bits[1] > 1.1 * by_bits[2]
    assert example.error(copy=(2, 32), exact=True) < 0.9 * by_bits[0]
    assert example.error(skipped=0.6) > example.error(skipped=0.25) > example.error()
    assert example.error(refit=False) > example.error()


def test_bytes_are_of_what_is_read(example: Example) -> None:
    for choices, gate in (
        ({}, 1.0),
        ({"copy": (4, 32)}, 4.5 / 32),
        ({"copy": (2, 64), "exact": True}, 2.25 / 32 + 0.4),
    ):
        ffn = ScreenedFFN(example.layer, Variant("", 0.6, **choices))
        ffn(example.layer.x, example.layer.x)
        layer, matrix = example.layer, WIDTH * WIDTH * 4.5 / 8
        expected = gate * layer.gate_bytes + matrix + 0.4 * (layer.up_bytes + layer.down_bytes)
        assert ffn.read_bytes == pytest.approx(expected, rel=0.01)


def test_error_feedback_keeps_products_closer_than_rounding(example: Example) -> None:
    weights, moment = example.layer.gate, example.layer.moment
    error = lambda own: float((example.x @ (own - weights).T).norm())  # noqa: E731
    for bits in (2, 3, 4):
        scale = weights.abs().amax(dim=1, keepdim=True) / 2 ** (bits - 1)
        plain = min(error(grid(bits).nearest(weights / (s * scale)) * s * scale) for s in (0.5, 0.7, 0.9, 1.0))
        assert error(rounded(weights, moment, bits, WIDTH)) < 0.8 * plain
    with pytest.raises(ValueError, match="64 columns are no multiple of groups of 48"):
        rounded(weights, moment, 4, 48)
