"""Thresholds by density, and predictors that go into a file and come back."""

from __future__ import annotations

import json
import math

import pytest
import torch

from pinfer.predictors import (
    CalibrationInputs,
    Cuts,
    ExactPredictor,
    FFNMatrices,
    GateOf,
    LowRankSettings,
    Packed,
    Predictor,
    fit_gate_threshold,
    fit_low_rank,
    fit_sign_bits,
    fit_weighted_threshold,
    pack,
    unpack,
)
from pinfer.predictors.cuts import DENSITIES
from pinfer.quant import Q8_0, QuantTensor
from pinfer.quantize import quantize

WIDTH, NEURONS, TOKENS = 64, 200, 300


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


GATE = quantize(normal(NEURONS, WIDTH) / 8 - 0.05, Q8_0)
X = normal(TOKENS, WIDTH, seed=1)


def fitted(kind: str) -> Predictor:
    if kind == "gate_threshold":
        return fit_gate_threshold(GATE, "silu", X)
    if kind == "sign_bits":
        return fit_sign_bits(GATE, "relu", X, X, 0.9)
    if kind == "low_rank":
        return fit_low_rank(GATE, "relu", CalibrationInputs(X, X, X), LowRankSettings(32, 0.9))
    up, down = normal(NEURONS, WIDTH, seed=2) * torch.rand(NEURONS, 1), normal(WIDTH, NEURONS, seed=3)
    matrices = FFNMatrices(GATE, QuantTensor.from_dense(up), QuantTensor.from_dense(down), "silu")
    return fit_weighted_threshold(matrices, X, shifted=kind == "shift_threshold")


KINDS = ("gate_threshold", "weighted_threshold", "shift_threshold", "low_rank", "sign_bits")


def reached(predictor: Predictor) -> float:
    return float(predictor(X, X).mask.float().mean())


def test_as_many_margins_lie_above_a_cut_as_its_density_says() -> None:
    margins = normal(40, 250)
    cuts = Cuts.of(margins, torch.zeros(1), torch.ones(1))
    for density in DENSITIES:
        assert float((margins > cuts.cut(density)).float().mean()) == pytest.approx(density, abs=1e-4)
    for density in (0.33, 0.011, 0.96):  # between those kept
        assert float((margins > cuts.cut(density)).float().mean()) == pytest.approx(density, abs=0.01)
    assert cuts.cut(0.0) == cuts.cut(DENSITIES[0])
    assert cuts.cut(1.0) == -math.inf


def test_thresholds_are_of_each_neurons_base_and_scale() -> None:
    margins, base, scale = normal(50, 3), torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 10.0, 0.1])
    threshold = Cuts.of(margins, base, scale).threshold(0.5)
    scores = base + margins * scale
    assert float((scores > threshold).float().mean()) == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(threshold, base + float(margins.median()) * scale, rtol=0.05, atol=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_predictor_names_the_density_it_is_set_to(kind: str) -> None:
    predictor = fitted(kind)
    before = predictor.threshold.clone()
    # Sums of signs are whole numbers: many are equal, and pass or not together.
    slack = 0.09 if kind == "sign_bits" else 0.01
    for density in (0.05, 0.3, 0.62):
        changed = predictor.at_density(density)
        assert reached(changed) == pytest.approx(density, abs=slack)
        assert changed.expected_density == density
        assert changed.shard(torch.arange(8)).expected_density == density
    assert reached(predictor.at_density(1.0)) == 1.0
    assert torch.equal(predictor.threshold, before), "the predictor itself stays as it was"


def test_what_cannot_be_set_says_so() -> None:
    with pytest.raises(ValueError, match="ExactPredictor has no threshold"):
        ExactPredictor(GATE, "relu").at_density(0.5)
    for density in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"does not lie in \[0, 1\]"):
            fitted("gate_threshold").at_density(density)
    with pytest.raises(ValueError, match="must fall"):
        Cuts(torch.arange(len(DENSITIES)).float(), torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_back(kind: str) -> None:
    predictors = [fitted(kind), fitted(kind).at_density(0.4)]
    activation = "relu" if kind in ("low_rank", "sign_bits") else "silu"
    tensors, layers = pack(predictors)
    again = unpack(Packed(tensors, json.loads(json.dumps(layers))), [GateOf(GATE, activation)] * 2)
    for one, other in zip(predictors, again, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one(X, X).mask, other(X, X).mask)
        assert (one.quality, one.density, one.own_bytes) == (other.quality, other.density, other.own_bytes)
        assert torch.equal(one.at_density(0.2).threshold, other.at_density(0.2).threshold)
        shifts = one(X, X).shift, other(X, X).shift
        assert shifts[0] is shifts[1] is None or torch.equal(*shifts)


@pytest.mark.parametrize("kind", KINDS)
def test_what_belongs_to_another_model_is_refused(kind: str) -> None:
    tensors, layers = pack([fitted(kind)])
    smaller = GateOf(GATE[:100], "relu")
    if kind != "gate_threshold":  # whose one threshold fits any gate
        with pytest.raises(ValueError, match="layer 0 does not fit"):
            unpack(Packed(tensors, layers), [smaller])
    with pytest.raises(ValueError, match="predictors of 1 layers, for a model of 2"):
        unpack(Packed(tensors, layers), [smaller] * 2)
    for name in tensors:
        if name != "blk.0.cuts":
            less = {key: one for key, one in tensors.items() if key != name}
            with pytest.raises(ValueError, match="layer 0 does not fit"):
                unpack(Packed(less, layers), [GateOf(GATE, "relu")])
    with pytest.raises(ValueError, match="layer 0 does not fit"):
        unpack(Packed(tensors, [layers[0] | {"kind": "oracle"}]), [GateOf(GATE, "relu")])


def test_what_is_made_of_the_model_is_not_kept() -> None:
    with pytest.raises(ValueError, match="made of the model itself"):
        pack([ExactPredictor(GATE, "relu")])
