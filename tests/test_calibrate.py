"""Densities by layer: the allocation against brute force, the trials against plain forward passes, whole calibrations."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.fitting import FitSettings, fit_predictors
from pinfer.engine.text import Text, cut
from pinfer.ffn import DenseFFN, FFNWeights, SparseFFN
from pinfer.models import KVCache
from pinfer.predictors import ExactPredictor, Predictor
from pinfer.quality import (
    Calibration,
    Curve,
    Loss,
    Passage,
    Refit,
    Target,
    Transfer,
    Trials,
    allocate,
    bound,
    calibrate,
)
from pinfer.quality.trials import Scores
from pinfer.solve.parts import Parts, deal
from pinfer.sparsify import exact_predictors, fitted_predictors, sparsify, transposed_down
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

DENSITIES = (0.1, 0.2, 0.4, 0.7, 1.0)
COSTS = st.lists(st.floats(1e-6, 5), min_size=5, max_size=5).map(lambda costs: Curve(DENSITIES, tuple(costs)))
FALLING = st.lists(st.floats(0.05, 0.9), min_size=5, max_size=5).map(
    lambda ratios: Curve(DENSITIES, tuple(math.prod(ratios[: i + 1]) for i in range(5)))
)
MEANS = st.floats(0.1, 1.0)


# ---- the allocation ----


@given(st.lists(COSTS, min_size=1, max_size=6), MEANS)
def test_the_mean_is_the_one_asked_for(curves: list[Curve], mean: float) -> None:
    densities = allocate(curves, mean)
    assert sum(densities) / len(densities) == pytest.approx(mean, abs=1e-9)
    assert all(0.1 <= density <= 1 for density in densities)


@given(st.lists(COSTS, min_size=1, max_size=6), MEANS, MEANS)
def test_no_layer_loses_by_a_greater_mean(curves: list[Curve], one: float, other: float) -> None:
    less, more = (allocate(curves, mean) for mean in sorted((one, other)))
    assert all(low <= high + 1e-9 for low, high in zip(less, more, strict=True))


@settings(deadline=None)
@given(FALLING, FALLING, st.floats(0.12, 0.98))
def test_no_other_split_of_two_layers_costs_less(one: Curve, other: Curve, mean: float) -> None:
    first, second = allocate([one, other], mean)
    total = one.cost(first) + other.cost(second)
    least = max(0.1, 2 * mean - 1)
    steps = [least + (min(1.0, 2 * mean - 0.1) - least) * step / 400 for step in range(401)]
    costs = [one.cost(density) + other.cost(2 * mean - density) for density in steps]
    assert total <= min(costs) + 1e-9
    assert total == pytest.approx(min(costs), rel=0.02, abs=1e-6)  # of the grid's steps


@given(COSTS, st.integers(1, 5), MEANS)
def test_layers_that_are_alike_get_the_same(curve: Curve, count: int, mean: float) -> None:
    assert allocate([curve] * count, mean) == pytest.approx([mean] * count, abs=1e-9)


@given(FALLING, st.floats(3, 50), st.floats(0.15, 0.8))
def test_density_goes_where_it_matters(curve: Curve, times: float, mean: float) -> None:
    dear = Curve(curve.densities, tuple(times * cost for cost in curve.costs))
    low, high, again = allocate([curve, dear, curve], mean)
    assert low == pytest.approx(again, abs=1e-9)
    assert high > low


@given(COSTS)
def test_a_hull_is_convex_and_touches_no_more_than_the_curve(curve: Curve) -> None:
    corners = curve.hull
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(corners)]
    assert all(low <= high for low, high in itertools.pairwise(slopes))
    assert all(slope <= 0 for slope in slopes)
    assert all(curve.cost(d) <= c * (1 + 1e-9) for d, c in zip(curve.densities, curve.costs, strict=True))
    assert corners[0] == (0.1, curve.costs[0])
    assert corners[-1] == (1.0, pytest.approx(min(curve.costs)))


def test_costs_are_interpolated_by_their_logarithm() -> None:
    curve = Curve((0.2, 0.6), (1e-1, 1e-5))
    assert curve.cost(0.4) == pytest.approx(1e-3)
    assert (curve.cost(0.0), curve.cost(1.0)) == pytest.approx((1e-1, 1e-5))


def test_what_is_no_curve_is_refused() -> None:
    for densities, costs in (((), ()), ((0.1, 0.2), (1.0,)), ((0.2, 0.1), (1.0, 0.5)), ((0.5, 1.2), (1.0, 0.5))):
        with pytest.raises(ValueError, match="curve"):
            Curve(densities, costs)
    with pytest.raises(ValueError, match="finite"):
        Curve((0.1,), (math.nan,))
    with pytest.raises(ValueError, match=r"0\.05 is below 0\.1"):
        allocate([Curve((0.1, 1.0), (1.0, 0.1))], 0.05)


# ---- targets, bounds, parts ----


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({}, "one of them, not None and None"),
        ({"density": 0.3, "quality": 0.9}, "one of them, not 0.3 and 0.9"),
        ({"density": 0.001}, r"density must lie in \[0.002, 1\], not 0.001"),
        ({"density": 1.5}, "not 1.5"),
        ({"density": math.nan}, "not nan"),
        ({"quality": 1.0}, r"quality must lie in \(0, 1\), such as 0.99, not 1"),
        ({"quality": 0.0}, "not 0"),
        ({"quality": math.nan}, "not nan"),
    ],
)
def test_bad_targets_are_refused(target: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(**target)


def test_a_bound_is_above_both_estimates() -> None:
    steady = Loss(kl=0.01, kl_error=0.003, kl_spread=0.004, added=0.002, added_error=0.001, density=0.5)
    assert bound(steady) == pytest.approx(0.01 + 1.64 * 0.005)
    noisy = Loss(kl=0.01, kl_error=0.0, kl_spread=0.0, added=0.01, added_error=0.1, density=0.5)
    assert bound(noisy) == pytest.approx(0.174)
    assert bound(noisy, 2.0) == pytest.approx(0.184)
    assert bound(steady, 2.0) == pytest.approx(2 * bound(steady))
    assert Transfer(0.01, 0.03).factor == pytest.approx(3)
    assert Transfer(0.03, 0.01).factor == 1  # another kind may be easier; the next need not be


# ---- trials and whole calibrations of tiny models ----


def random_sequences(count: int, length: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 250, (length,), generator=generator) for _ in range(count)]


class Case:
    """A dense engine, how its predictors are fitted, and sequences for each part."""

    def __init__(self, engine: Engine, how: FitSettings, parts: Parts) -> None:
        self.engine, self.parts = engine, parts
        self.model = engine.model
        self.fit: Callable[[Sequence[torch.Tensor]], Sequence[Predictor]] = partial(fit_predictors, engine.model, how)
        with engine.computing():
            self.predictors = self.fit(parts.fit)

    def calibrate(self, target: Target, **others: Any) -> Calibration:
        with self.engine.computing():
            return calibrate(self.model, self.predictors, self.parts.search, self.parts.validation, target, **others)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, KVCache(self.model.config, len(tokens))).double()


@pytest.fixture(scope="module", params=["shift_threshold", "sign_bits", "low_rank"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A random model: gemma3 with GELU for shift_threshold, llama with ReLU for the others."""
    path = tmp_path_factory.mktemp("calibrate") / "tiny.gguf"
    if request.param == "shift_threshold":
        write_tiny_gemma3(path, n_layers=3, weight_type="Q8_0")
    else:
        write_tiny_llama(path, n_layers=3, weight_type="Q8_0")
    engine = load_engine(RunConfig(model=str(path), method="dense", precision="float32"))
    parts = Parts(*(random_sequences(count, 24, count) for count in (8, 5, 7)))
    return Case(engine, FitSettings(request.param, rank=32), parts)


def test_one_layers_trial_is_a_run_with_that_layer_sparse(tiny: Case) -> None:
    with tiny.engine.computing():
        trials, passage = Trials(tiny.model, tiny.predictors), Passage(tiny.model, tiny.parts.search)
        passage.walk.advance()
        found = trials.layer(passage, (0.3, 1.0))
        dense = [tiny.logits(tokens) for tokens in tiny.parts.search]
        block = tiny.model.blocks[1]
        ffn = block.ffn
        for density, kl in zip((0.3, 1.0), found, strict=True):
            weights = FFNWeights(ffn.gate, ffn.up, *transposed_down(1, ffn))
            block.ffn = SparseFFN(weights, tiny.predictors[1].at_density(density), ffn.activation)
            try:
                sparse = [tiny.logits(tokens) for tokens in tiny.parts.search]
            finally:
                block.ffn = ffn
            scored = [
                F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)[1:-1]
                for p, q in zip(dense, sparse, strict=True)
            ]
            assert kl == pytest.approx(float(torch.cat(scored).mean()), rel=1e-3, abs=1e-6)
    assert found[0] > found[1]


def test_the_whole_models_loss(tiny: Case) -> None:
    densities = [0.2, 0.5, 0.9]
    with tiny.engine.computing():
        trials, passage = Trials(tiny.model, tiny.predictors), Passage(tiny.model, tiny.parts.validation)
        loss = trials.whole(passage, densities)
        dense = [tiny.logits(tokens) for tokens in tiny.parts.validation]
        with trials.at(dict(enumerate(densities))):
            sparse = [tiny.logits(tokens) for tokens in tiny.parts.validation]
    added = [
        F.cross_entropy(q[1:-1], tokens[2:], reduction="none") - F.cross_entropy(p[1:-1], tokens[2:], reduction="none")
        for p, q, tokens in zip(dense, sparse, tiny.parts.validation, strict=True)
    ]
    means = torch.stack([one.mean() for one in added])
    assert loss.added == pytest.approx(float(means.mean()), abs=1e-5)
    assert loss.added_error == pytest.approx(float(means.std()) / math.sqrt(len(means)), abs=1e-5)
    assert 0 < loss.kl_spread < loss.kl
    assert loss.density == pytest.approx(sum(densities) / 3, abs=0.15)
    assert all(isinstance(ffn, DenseFFN) for ffn in tiny.model.ffns())


def test_a_trial_that_fails_leaves_the_model_dense(tiny: Case) -> None:
    with tiny.engine.computing():
        trials = Trials(tiny.model, tiny.predictors)
        with pytest.raises(ValueError, match="does not lie in"):
            trials.whole(Passage(tiny.model, tiny.parts.search), [0.5, 0.5, 7.0])
    assert all(isinstance(ffn, DenseFFN) for ffn in tiny.model.ffns())


def test_a_stride_scores_some_of_the_same_positions(tiny: Case) -> None:
    with tiny.engine.computing():
        every, some = (Passage(tiny.model, tiny.parts.search, stride) for stride in (1, 3))
        trials = Trials(tiny.model, tiny.predictors)
        all_scores, thinned = (trials.scores(passage, [0.3] * 3) for passage in (every, some))
    for one, other in zip(all_scores, thinned, strict=True):
        assert len(one.kl) == 24 - 2
        torch.testing.assert_close(one.kl[::3], other.kl, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one.added[::3], other.added, rtol=1e-3, atol=1e-4)
    assert (some.tokens, some.scored) == (5 * 24, 5 * 8)


def test_logits_a_few_at_a_time_score_the_same(tiny: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores() -> list[Scores]:
        with tiny.engine.computing():
            passage = Passage(tiny.model, tiny.parts.search)
            return Trials(tiny.model, tiny.predictors).scores(passage, [0.3] * 3)

    whole, row_bytes = scores(), 4 * tiny.model.config.vocab_size
    monkeypatch.setattr("pinfer.quality.trials.LOGIT_BYTES", 7 * row_bytes)
    monkeypatch.setattr("pinfer.quality.trials.SOFTMAX_BYTES", 3 * row_bytes)
    for one, other in zip(whole, scores(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_density_is_met(tiny: Case) -> None:
    found = tiny.calibrate(Target(density=0.4))
    assert sum(found.densities) / 3 == pytest.approx(0.4)
    assert found.figures["target"] == {"density": 0.4}
    assert found.figures["tokens"]["validation_scored"] == 7 * 22
    best = min(found.figures[name]["kl"] for name in ("sensitivity", "uniform"))
    assert found.figures[found.figures["allocation"]]["kl"] == best
    assert json.loads(json.dumps(found.figures, allow_nan=False)) == found.figures
    assert [curve.densities[-1] for curve in found.curves] == [1.0] * 3
    assert all(isinstance(ffn, DenseFFN) for ffn in tiny.model.ffns())


def test_every_neuron_may_be_asked_for(tiny: Case) -> None:
    assert tiny.calibrate(Target(density=1.0)).densities == [1.0] * 3


def test_a_quality_is_met_and_less_density_would_not_do(tiny: Case) -> None:
    target = Target(quality=0.8)
    found = tiny.calibrate(target)
    figures = found.figures
    assert figures["bound"] <= target.allowed == -math.log(0.8)
    assert figures["density"] == pytest.approx(sum(found.densities) / 3)
    with tiny.engine.computing():
        trials, passage = Trials(tiny.model, tiny.predictors), Passage(tiny.model, tiny.parts.validation)
        assert bound(trials.whole(passage, found.densities)) == pytest.approx(figures["bound"])
        sparser = [0.6 * density for density in found.densities]
        assert bound(trials.whole(passage, sparser)) > target.allowed
    assert not figures["sparsest_suffices"]


def test_kinds_of_text_not_fitted_on_take_a_margin(tiny: Case) -> None:
    halves: list[Sequence[torch.Tensor]] = []

    def fit(sequences: Sequence[torch.Tensor]) -> Sequence[Predictor]:
        halves.append(sequences)
        return tiny.fit(sequences)

    target = Target(quality=0.8)
    names: list[str] = []
    measure = Refit(fit, tiny.parts.fit)
    found = tiny.calibrate(target, refit=measure, measured=lambda name, *_: names.append(name))
    assert [list(half) for half in halves] == [tiny.parts.fit[:4], tiny.parts.fit[4:]]
    figures = found.figures
    factor = Transfer(**figures["transfer"]).factor
    assert bound(Loss(**figures[figures["allocation"]]), factor) == pytest.approx(figures["bound"])
    assert figures["bound"] <= target.allowed
    probed = {float(name.rsplit(" ", 1)[1]) for name in names if name.startswith("fitted on half")}
    known = {f"fitted on half {half} at {density!r}": [0.01, 0.03] for half in (0, 1) for density in probed}
    wary = tiny.calibrate(target, refit=Refit(fit, tiny.parts.fit), known=known)
    assert wary.figures["transfer"] == {"own": 0.01, "other": 0.03}
    assert wary.figures["density"] > found.figures["density"]


@pytest.mark.parametrize(("target", "shares"), [(Target(density=0.3), (0, 1)), (Target(quality=0.85), (0.5,))])
def test_an_interrupted_calibration_goes_on_to_the_same_result(
    tiny: Case, target: Target, shares: tuple[float, ...]
) -> None:
    made: list[tuple[str, Any]] = []
    whole = tiny.calibrate(target, measured=lambda name, found, _: made.append((name, found)))
    for done in (max(1, int(share * len(made))) for share in shares):
        known = json.loads(json.dumps(dict(made[:done])))
        again: list[str] = []
        resumed = tiny.calibrate(target, known=known, measured=lambda name, _found, _s, again=again: again.append(name))
        assert resumed == whole
        assert again == [name for name, _ in made[done:]]


def test_another_target_takes_over_what_was_measured(tiny: Case) -> None:
    known: dict[str, Any] = {}
    tiny.calibrate(Target(density=0.3), measured=lambda name, found, _: known.update({name: found}))
    fresh = tiny.calibrate(Target(density=0.45))
    made: list[str] = []
    assert tiny.calibrate(Target(density=0.45), known=known, measured=lambda name, *_: made.append(name)) == fresh
    tried = len(fresh.figures["tries"])
    assert len([name for name in made if name.startswith("layer")]) <= 3 * (tried - 4)


def test_the_sparsest_allocation_may_be_enough(tiny: Case) -> None:
    found = tiny.calibrate(Target(quality=1e-4))
    assert found.figures["sparsest_suffices"]
    assert found.densities == [found.figures["tries"][0]] * 3


def test_a_quality_out_of_reach_says_by_how_much(tiny: Case) -> None:
    with pytest.raises(ValueError, match=r"quality 0\.9999999 allows 1e-07 nats.*every neuron.*may be lost \(KL"):
        tiny.calibrate(Target(quality=0.9999999))
    assert all(isinstance(ffn, DenseFFN) for ffn in tiny.model.ffns())


def test_what_cannot_be_calibrated_says_so(tiny: Case, tmp_path: Path) -> None:
    target, parts = Target(density=0.5), tiny.parts
    for search, validation, name in ((parts.search[:3], parts.validation, "search"), (parts.search, [], "validation")):
        with pytest.raises(ValueError, match=f"at least 4 sequences to {name}"), tiny.engine.computing():
            calibrate(tiny.model, tiny.predictors, search, validation, target)
    with pytest.raises(ValueError, match="at least 3 tokens"), tiny.engine.computing():
        calibrate(tiny.model, tiny.predictors, parts.search, [torch.tensor([5, 6])] * 4, target)
    with pytest.raises(ValueError, match="2 predictors for a model of 3 layers"), tiny.engine.computing():
        calibrate(tiny.model, tiny.predictors[:2], parts.search, parts.validation, target)
    relu = load_engine(RunConfig(model=str(write_tiny_llama(tmp_path / "m.gguf")), method="dense"))
    with relu.computing():
        exact = [exact_predictors(layer, ffn) for layer, ffn in enumerate(relu.model.ffns())]
        assert isinstance(exact[0], ExactPredictor)
        with pytest.raises(ValueError, match="ExactPredictor has no threshold"):
            calibrate(relu.model, exact, parts.search, parts.validation, target)
        sparsify(relu.model, fitted_predictors(exact))
        with pytest.raises(ValueError, match="sparse already"):
            calibrate(relu.model, exact, parts.search, parts.validation, target)


# ---- the shipped model ----


@pytest.fixture(scope="module")
def shipped() -> Case:
    engine = load_engine(RunConfig(method="dense", precision="float32"))
    text = Text.read(None)
    return Case(
        engine,
        FitSettings("low_rank"),
        deal(cut(engine.tokenizer, text, 2400, engine.config.context_length, 60), engine.config.n_layers),
    )


def test_the_shipped_models_layers_differ(shipped: Case) -> None:
    known: dict[str, Any] = {}
    found = shipped.calibrate(Target(density=0.1), measured=lambda name, one, _: known.update({name: one}))
    figures = found.figures
    assert figures["allocation"] == "sensitivity"
    assert figures["sensitivity"]["kl"] < 0.7 * figures["uniform"]["kl"]
    assert max(found.densities) > 3 * min(found.densities)
    kept = shipped.calibrate(Target(quality=0.97), known=known)
    assert kept.figures["bound"] <= -math.log(0.97)
    assert kept.figures["density"] < 0.2
    dense, sparse = 0.0, 0.0
    with shipped.engine.computing():
        trials = Trials(shipped.model, shipped.predictors)
        for tokens in shipped.parts.validation:
            dense += float(F.cross_entropy(shipped.logits(tokens)[1:-1], tokens[2:], reduction="sum"))
            with trials.at(dict(enumerate(kept.densities))):
                sparse += float(F.cross_entropy(shipped.logits(tokens)[1:-1], tokens[2:], reduction="sum"))
    scored = sum(len(tokens) - 2 for tokens in shipped.parts.validation)
    assert math.exp((dense - sparse) / scored) >= 0.97
