"""Training low-rank predictors: one layer's factors, the pairs they are trained on, a whole model, interruptions."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.measure import dense_ffn
from pinfer.engine.pairs import CONTRIBUTIONS, INPUTS, MIN_PAIRS, LayerPairs, PairPlan, collect_pairs, decode, encode
from pinfer.engine.text import EVALUATION_TEXT, Text, cut
from pinfer.engine.train import FOLDER, LayerResult, TrainSettings, Watcher, remove_checkpoint, train
from pinfer.engine.train_estimate import estimate_training
from pinfer.kernels.activation import hidden_of
from pinfer.kernels.ops import dequantize, quant_matmul
from pinfer.models import LayerWalk
from pinfer.predictors import frontier as frontiers
from pinfer.predictors.frontier import Frontier
from pinfer.predictors.low_rank import closed_form, spectrum, with_moments_of
from pinfer.predictors.pair_source import HeldPairs, Pairs, PairSource
from pinfer.predictors.ranks import LayerNeed, factor_bytes, rank_under_budget
from pinfer.predictors.training import (
    FLOOR,
    LayerTraining,
    Trained,
    TrainingSettings,
    gradients,
    scores,
    train_low_rank,
)
from pinfer.quant import BY_NAME, Q4_0, Q8_0, QuantTensor
from pinfer.quantize import quantize
from tests.gguf_files import write_tiny_llama

N_LAYERS = 3
TEXT = Text("words", "hello the world, then they wrote what the others had told them to write. " * 120)
QUICK = TrainingSettings(rank=32, steps=6, batch_tokens=64, measure_every=2, patience=9)


def load(path: Path | None = None, **settings: Any) -> Engine:
    return load_engine(RunConfig(model=None if path is None else str(path), method="dense", threads=1, **settings))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "m.gguf", n_layers=N_LAYERS)


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return load(model)


def sequences_of(engine: Engine, tokens: int = 700) -> list[torch.Tensor]:
    return cut(engine.tokenizer, TEXT, tokens, 128)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# One layer.


@pytest.fixture(scope="module")
def shipped_layer(tmp_path_factory: pytest.TempPathFactory) -> tuple[LayerPairs, QuantTensor, Pairs]:
    """Layer 1 of the shipped model: pairs of the calibration text, its gate, and pairs of another text to test on."""
    engine = load()
    sequences = cut(engine.tokenizer, Text.read(None), 10_000, 256)
    other = cut(engine.tokenizer, Text("other", EVALUATION_TEXT.read_text()), 2500, 256)
    found = []
    for part in (sequences, other):
        folder = tmp_path_factory.mktemp("pairs")
        with engine.computing():
            walk = LayerWalk(engine.model, part)
            walk.advance()
            mark = collect_pairs(engine, walk, folder, plan_of(engine, part), None)
        found.append(LayerPairs(folder, mark, check=True))
    return found[0], dense_ffn(engine, 1).gate, found[1].take(torch.arange(found[1].tokens))


def plan_of(engine: Engine, sequences: list[torch.Tensor], budget_bytes: int = 10**9) -> PairPlan:
    return PairPlan.of([len(one) for one in sequences], engine.config.d_model, engine.config.d_ffn, budget_bytes)


def recall_of(pairs: Pairs, first: QuantTensor, second: QuantTensor, bias: torch.Tensor, named: float = 1.3) -> float:
    found = Frontier()
    found.add(scores(pairs.inputs, dequantize(first), dequantize(second), bias), pairs.contribution)
    return found.at(named)[0].weighted_recall


def test_training_beats_the_closed_form_by_far(shipped_layer: tuple[LayerPairs, QuantTensor, Pairs]) -> None:
    source, gate, test = shipped_layer
    inputs = source.take(torch.arange(0, source.tokens, 5)).inputs
    first, second = closed_form(gate, with_moments_of(inputs), 64)
    sizes = (inputs @ first.T @ second.T).square().mean(0).sqrt()  # each neuron's score, to have one cut for all
    factors = quantize(first, Q8_0), quantize(second / sizes[:, None], Q8_0)
    before = recall_of(test, *factors, torch.zeros(gate.rows))
    settings = TrainingSettings(rank=64, steps=200, batch_tokens=256, measure_every=50)
    trained = train_low_rank(source, gate, settings)
    after = recall_of(test, trained.first, trained.second, trained.bias)
    assert 0.7 < before < 0.92  # rank 64 of 256 leaves much to gain
    assert after > before + 0.05
    assert trained.figures.reach.weighted_recall > 0.93
    named = [reach.weighted_recall for reach in trained.figures.frontier]
    assert named == sorted(named)


def planted(
    generator: torch.Generator, tokens: int = 2000, n: int = 96, width: int = 64, heavy: float = 1.0
) -> HeldPairs:
    """Pairs whose neurons fire on directions of their own."""
    x = torch.randn(tokens, width, generator=generator)
    gate = planted_gate(n, width)
    fires = x @ gate.T / gate.norm(dim=1) + 0.4 * torch.randn(tokens, n, generator=generator) > 1
    contribution = fires * torch.rand(tokens, n, generator=generator)
    held = tokens // 4
    return HeldPairs(Pairs(x[held:], contribution[held:]), Pairs(x[:held], contribution[:held]))


def planted_gate(n: int = 96, width: int = 64) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(4))


def planted_training(source: PairSource, **changed: Any) -> Trained:
    settings = dataclasses.replace(QUICK, **{"steps": 60, "measure_every": 20} | changed)
    noise = torch.randn(96, 64, generator=torch.Generator().manual_seed(5))  # so that the start can be bettered
    return train_low_rank(source, QuantTensor.from_dense(planted_gate() + noise), settings)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_what_was_judged_is_what_is_stored(generator: torch.Generator, kind: str) -> None:
    source = planted(generator)
    trained = planted_training(source, weight_type=kind)
    assert trained.first.type == trained.second.type == BY_NAME[kind]
    assert (trained.first.shape, trained.second.shape, trained.bias.shape) == ((32, 64), (96, 32), (96,))
    validation = source.validation(0, source.validation_tokens)
    judged = recall_of(validation, trained.first, trained.second, trained.bias, QUICK.over_prediction)
    assert judged == trained.figures.reach.weighted_recall == max(value for _, value in trained.figures.curve)
    assert trained.figures.density == float((validation.contribution > 0).double().mean())


def test_training_rounds_as_it_stores(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factors that gradients are taken at are those that `quantize` would store."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def spy(pairs: Pairs, *factors: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.append(factors[:2])
        return gradients(pairs, *factors)

    monkeypatch.setattr("pinfer.predictors.training.gradients", spy)
    training = LayerTraining(planted(generator), QuantTensor.from_dense(planted_gate()), QUICK)
    training.advance()
    state = training.state()
    training.advance()
    for name, used in zip(("first", "second"), seen[QUICK.measure_every], strict=True):
        assert torch.equal(used, dequantize(quantize(state[name], Q4_0)))
        assert not torch.equal(used, state[name])


@pytest.mark.parametrize(("tokens", "n", "width", "rank"), [(1, 3, 5, 2), (17, 41, 13, 7)])
def test_gradients_are_those_of_the_loss(
    generator: torch.Generator, tokens: int, n: int, width: int, rank: int
) -> None:
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    c = torch.rand(tokens, n, generator=generator, dtype=torch.float64)
    c = c * (c > 0.6)
    c[0] = 0  # a token of which nothing is active
    factors = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((rank, width), (n, rank), (n,))
    ]
    leaves = [one.clone().requires_grad_() for one in factors]
    z = scores(x, *leaves)
    y = (c > 0).double()
    w = torch.where(c > 0, c / c.sum(1, keepdim=True).clamp_min(1e-30) * y.sum(1, keepdim=True), 0)
    (F.softplus(z) * (1 - y) + F.softplus(-z) * (3 * w + FLOOR) * y).sum().backward()
    for leaf, ours in zip(leaves, gradients(Pairs(x, c), *factors, 3.0), strict=True):
        torch.testing.assert_close(ours, leaf.grad)


def test_early_stopping_ends_where_nothing_is_to_be_learned(generator: torch.Generator) -> None:
    x, c = torch.randn(600, 64, generator=generator), (torch.rand(600, 96, generator=generator) < 0.1).float()
    source = HeldPairs(Pairs(x[200:], c[200:]), Pairs(x[:200], c[:200]))
    figures = planted_training(source, steps=10_000, measure_every=5, patience=3).figures
    measured = [value for _, value in figures.curve]
    best = measured.index(max(measured))
    assert figures.step == figures.curve[best][0]
    assert len(measured) == best + 1 + 3
    assert figures.steps == figures.curve[-1][0] < 10_000


def test_a_step_limit_ends_it_too(generator: torch.Generator) -> None:
    figures = planted_training(planted(generator), steps=7, measure_every=5).figures
    assert [step for step, _ in figures.curve] == [0, 5, 7]


def test_rare_neurons_that_contribute_much_are_worth_naming(generator: torch.Generator) -> None:
    """Inputs tell nothing; twelve neurons fire on a token in ten and contribute 100 times as much as the others, on one in two."""
    x, rare = torch.zeros(2000, 64), torch.arange(96) % 8 == 0
    fires = torch.rand(2000, 96, generator=generator) < torch.where(rare, 0.1, 0.5)
    c = fires * torch.where(rare, 100.0, 1.0)
    source = HeldPairs(Pairs(x[500:], c[500:]), Pairs(x[:500], c[:500]))
    options = {"steps": 400, "over_prediction": 0.35, "measure_every": 100, "learning_rate": 0.1}
    weighted = planted_training(source, contribution_weight=10.0, **options).figures.reach
    alike = planted_training(source, contribution_weight=1e-3, **options).figures.reach
    assert weighted.weighted_recall > alike.weighted_recall + 0.2
    assert weighted.recall < alike.recall  # it is not that it caught more of all


def test_the_same_seed_gives_the_same_bits_and_another_does_not(generator: torch.Generator) -> None:
    source = planted(generator)
    first, again, other = (planted_training(source, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.second.blocks, again.second.blocks)
    assert torch.equal(first.bias, again.bias)
    assert first.figures == again.figures
    assert not torch.equal(first.bias, other.bias)


@pytest.mark.parametrize("after", range(4))
def test_a_training_goes_on_bit_for_bit(generator: torch.Generator, after: int) -> None:
    source, gate = planted(generator), QuantTensor.from_dense(planted_gate())
    whole = train_low_rank(source, gate, QUICK)
    training = LayerTraining(source, gate, QUICK)
    for _ in range(after):
        training.advance()
    state = training.state()
    training.take_step()  # what is exported does not follow
    again = train_low_rank(source, gate, QUICK, state)
    for name in ("first", "second"):
        assert torch.equal(getattr(again, name).blocks, getattr(whole, name).blocks)
    assert torch.equal(again.bias, whole.bias)
    assert again.figures == whole.figures


def test_a_state_of_another_layer_is_refused(generator: torch.Generator) -> None:
    source, gate = planted(generator), QuantTensor.from_dense(planted_gate())
    state = LayerTraining(source, gate, QUICK).state()
    with pytest.raises(ValueError, match=r"has no first float32 \[64, 64\]"):
        LayerTraining(source, gate, dataclasses.replace(QUICK, rank=64), state)
    with pytest.raises(ValueError, match=r"has no square.bias float32 \[96\]"):
        LayerTraining(source, gate, QUICK, {name: one for name, one in state.items() if name != "square.bias"})


def test_a_training_that_diverges_says_so(generator: torch.Generator) -> None:
    source = planted(generator)
    training = LayerTraining(source, QuantTensor.from_dense(planted_gate()), QUICK)
    source._train.inputs[:] = 3e38
    with pytest.raises(ValueError, match=r"training diverged by step \d \(a weight is .*\): lower learning_rate"):
        training.advance()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rank": 0}, "rank must be a multiple of 32 from 32 to 64, not 0"),
        ({"rank": 48}, "rank must be"),
        ({"rank": 96}, "rank must be"),
        ({"weight_type": "Q4_K"}, "weight_type must be one of Q4_0, Q8_0, not 'Q4_K'"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_tokens": -1}, "batch_tokens must be"),
        ({"measure_every": 0}, "measure_every must be"),
        ({"patience": 0}, "patience must be"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0 and at most 1, not 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"contribution_weight": float("inf")}, "contribution_weight must be"),
        ({"over_prediction": -1.0}, "over_prediction must be"),
        ({"over_prediction": float("nan")}, "over_prediction must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_settings_are_refused(engine: Engine, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    settings = dataclasses.replace(QUICK, **changed)
    with pytest.raises(ValueError, match=re.escape(message)):
        settings.check(96, 64)
    with pytest.raises(ValueError, match=re.escape(message)):
        train(engine, tmp_path, sequences_of(engine), TrainSettings(settings, ffn_share=None))
    assert list(tmp_path.iterdir()) == []


def test_a_width_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="80 columns are no multiple of Q4_0's block"):
        QUICK.check(96, 80)


def test_a_source_without_tokens_is_refused(generator: torch.Generator) -> None:
    source = planted(generator)
    source._validation = Pairs(torch.empty(0, 64), torch.empty(0, 96))
    with pytest.raises(ValueError, match="1500 tokens to train on and 0 to judge by"):
        planted_training(source)


# The frontier.


@pytest.mark.parametrize("named", [0.1, 0.7, 1.0, 2.5, 99.0])
def test_the_frontier_is_that_of_sorting(generator: torch.Generator, named: float) -> None:
    score = (torch.randn(70, 31, generator=generator) * 3).round(decimals=1)  # apart by more than a bin
    c = torch.rand(70, 31, generator=generator) * (torch.rand(70, 31, generator=generator) < 0.2)
    c[5] = 0
    found = Frontier()
    for part in (slice(0, 11), slice(11, 70)):
        found.add(score[part], c[part])
    active = (c > 0).sum()
    cuts = [score >= value for value in score.unique()]
    best = max((cut for cut in cuts if cut.sum() <= named * active), key=lambda cut: int(cut.sum()), default=score > 99)
    share = (c * best).sum(1) / c.sum(1)
    (reach,) = found.at(named)
    assert reach.named == pytest.approx(float(best.sum() / active))
    assert reach.recall == pytest.approx(float((best & (c > 0)).sum() / active))
    assert reach.weighted_recall == pytest.approx(float(share[c.sum(1) > 0].mean()))
    assert found.density == pytest.approx(float((c > 0).float().mean()))


def test_no_cut_is_low_enough_for_few_names() -> None:
    found = Frontier()
    found.add(torch.zeros(2, 9), torch.ones(2, 9))
    none, every = found.at(0.5, 1.0)
    assert none == frontiers.Reach(0.0, 0.0, 0.0)
    assert (every.named, every.recall) == (1.0, 1.0)


# Ranks.


def need(energies: list[float], density: float = 0.1, n: int = 256, width: int = 128) -> LayerNeed:
    per_direction = torch.tensor(energies, dtype=torch.float64).repeat_interleave(32) / 32
    return LayerNeed(n, width, density, per_direction)


def test_ranks_by_hand() -> None:
    a_step = factor_bytes(32, 256, 128, Q4_0)
    assert a_step == 32 * 128 // 32 * 18 + 256 * 18
    flat, steep = need([1, 1, 1, 1]), need([97, 1, 1, 1])
    assert rank_under_budget([flat, steep], 2 * a_step, Q4_0) == (32, 32)
    assert rank_under_budget([flat, steep], 4 * a_step + 7, Q4_0) == (96, 32)
    assert rank_under_budget([steep, flat], 10**9, Q4_0) == (128, 128)  # no more than the smaller side
    assert rank_under_budget([need([1, 1, 1, 1], 0.01), need([4, 2, 2, 2], 0.3)], 4 * a_step, Q4_0) == (32, 96)
    with pytest.raises(ValueError, match=f"rank 32 in every layer takes {2 * a_step} bytes"):
        rank_under_budget([flat, steep], 2 * a_step - 1, Q4_0)


def test_equal_layers_have_equal_ranks() -> None:
    flat = [LayerNeed(256, 256, 0.1, torch.ones(256, dtype=torch.float64))] * 3
    budget = 3 * factor_bytes(96, 256, 256, BY_NAME["Q4_0"])
    assert rank_under_budget(flat, budget, BY_NAME["Q4_0"]) == (96, 96, 96)


def test_no_other_ranks_gain_more(generator: torch.Generator) -> None:
    needs = [need(torch.rand(4, generator=generator).sort(descending=True).values.tolist(), 0.1 + i) for i in range(3)]
    budget = 7 * factor_bytes(32, 256, 128, Q8_0)

    def gained(ranks: tuple[int, ...]) -> float:
        return sum(one.gain(at) for one, rank in zip(needs, ranks, strict=True) for at in range(0, rank, 32))

    ours = rank_under_budget(needs, budget, Q8_0)
    fitting = [ranks for ranks in itertools.product((32, 64, 96, 128), repeat=3) if sum(ranks) <= 7 * 32]
    assert gained(ours) == pytest.approx(max(map(gained, fitting)))


def test_the_spectrum_is_what_a_rank_leaves_out(generator: torch.Generator) -> None:
    gate, x = torch.randn(50, 32, generator=generator), torch.randn(200, 32, generator=generator)
    outputs = x @ gate.T
    expected = torch.linalg.svdvals(outputs / outputs.square().mean(0).sqrt()).double().square()[:32]
    found = spectrum(QuantTensor.from_dense(gate), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    compressed = spectrum(QuantTensor.from_dense(gate), with_moments_of(x))
    torch.testing.assert_close(compressed / compressed.sum(), expected / expected.sum(), rtol=1e-4, atol=1e-6)


# Pairs.


def test_codes_keep_shares(generator: torch.Generator) -> None:
    c = torch.rand(40, 300, generator=generator).pow(8) * (torch.rand(40, 300, generator=generator) < 0.4)
    c[3], c[4, 7:], c[5, 0] = 0, 0, 1e-30
    share = c / c.sum(1, keepdim=True).clamp_min(1e-38)
    found = decode(encode(c * 1e-3))
    assert torch.equal(found > 0, c > 0)
    large = share >= 2**-20
    assert ((found[large] / share[large]).log2().abs() <= np.log2(1.028)).all()
    assert (found[(c > 0) & ~large] == 2**-20).all()
    assert float(found.max()) <= 1


def test_tokens_are_thinned_evenly_within_the_budget() -> None:
    lengths = [100] * 40
    whole = PairPlan.of(lengths, 8, 16, 10**9)
    assert (whole.counted, whole.kept, whole.tokens) == (3960, 3960, 37 * 99)  # three sequences are a sixteenth
    plan = PairPlan.of(lengths, 8, 16, 1000 * 32 + 31)
    assert (plan.kept, plan.nbytes) == (1000, 32_000)
    kept = [token for token in range(3960) if plan.before(token + 1) > plan.before(token)]
    assert len(kept) == 1000
    assert set(np.diff(kept)) == {3, 4}
    assert plan.tokens == sum(token < 37 * 99 for token in kept)
    with pytest.raises(ValueError, match=rf"of width 8 and 16 neurons take {MIN_PAIRS * 32} bytes"):
        PairPlan.of(lengths, 8, 16, MIN_PAIRS * 32 - 1)
    PairPlan.of(lengths, 8, 16, MIN_PAIRS * 32)
    for few in ([400], [100, 100], [1] * 999):
        with pytest.raises(ValueError, match="training needs 2 sequences and 256 tokens"):
            PairPlan.of(few, 8, 16, 10**9)
    with pytest.raises(ValueError, match="at least 2 tokens beside those held out"):
        PairPlan.of([1, 300], 8, 16, 10**9)


@pytest.mark.parametrize(("activation", "sparsity"), [("relu", None), ("relu", 0.8), ("silu", 0.6), ("gelu_tanh", 0.6)])
@pytest.mark.parametrize("budget", [10**9, 300 * (2 * 64 + 96)])
def test_pairs_are_what_the_layer_did(
    tmp_path: Path, activation: str, sparsity: float | None, budget: int, model: Path
) -> None:
    engine = load(model, activation=activation)
    sequences = sequences_of(engine)
    plan = plan_of(engine, sequences, budget)
    with engine.computing():
        walk, direct = LayerWalk(engine.model, sequences), LayerWalk(engine.model, sequences)
        mark = collect_pairs(engine, walk, tmp_path, plan, sparsity)
        seen: list[torch.Tensor] = []
        ffn = dense_ffn(engine, 0)
        hook = ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        direct.advance()
        hook.remove()
        x = torch.cat([one[1:] for one in seen])
        hidden = hidden_of(activation, quant_matmul(x, ffn.gate), quant_matmul(x, ffn.up))
        c = hidden.abs() * dequantize(ffn.down).norm(dim=0)
    assert all(torch.equal(*both) for both in zip(walk.residuals, direct.residuals, strict=True))
    pairs = LayerPairs(tmp_path, json.loads(json.dumps(mark)), check=True)
    kept = [token for token in range(plan.counted) if plan.before(token + 1) > plan.before(token)]
    assert pairs.tokens + pairs.validation_tokens == len(kept) == min(plan.counted, budget // 224)
    parts = pairs.take(torch.arange(pairs.tokens)), pairs.validation(0, pairs.validation_tokens)
    found = Pairs(*(torch.cat(both) for both in zip(*parts, strict=True)))
    assert torch.equal(found.inputs, x[kept].half().float())
    c = c[kept]
    active = c > (0 if sparsity is None else c.quantile(sparsity))
    # Thresholds are of all tokens, to 0.1 %: few may differ among the tokens kept.
    assert ((found.contribution > 0) != active).float().mean() < (0.03 if sparsity else 1e-9)
    both = (found.contribution > 0) & active
    share = c / (c * (found.contribution > 0)).sum(1, keepdim=True)
    both &= share > 2**-18
    # Kernels for one sequence and for all together round apart where a product is close to 0.
    assert (found.contribution[both] / share[both]).log().abs().quantile(0.999) < 0.03
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == plan.nbytes <= budget


def test_pages_that_are_let_go_come_back(
    engine: Engine, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinfer.engine.pairs.RESIDENT_BYTES", 0)
    run_training(engine, tmp_path)
    assert listing(tmp_path) == whole


def test_activations_that_are_not_finite_are_refused(tmp_path: Path, engine: Engine) -> None:
    sequences = sequences_of(engine)
    with engine.computing():
        walk = LayerWalk(engine.model, sequences)
        walk.residuals[1] = walk.residuals[1] * float("nan")
        with pytest.raises(ValueError, match="layer 0: the activations are not finite"):
            collect_pairs(engine, walk, tmp_path, plan_of(engine, sequences), None)


# A model.


class Recorder(Watcher):
    """Notes what it is told, and interrupts at the so many-th event of this run."""

    def __init__(self, events: int = 10**6) -> None:
        self.left, self.notes, self.began_after = events, list[str](), -1
        self.done: list[LayerResult] = []

    def _event(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        self.began_after = layers_done

    def sequence(self) -> None:
        self._event()

    def measured(self, layer: int, step: int, weighted_recall: float) -> None:
        self._event()

    def layer(self, number: int, found: LayerResult) -> None:
        assert number == found.layer
        self.done.append(found)
        self._event()

    def note(self, text: str) -> None:
        self.notes.append(text)


SETTINGS = TrainSettings(QUICK, ffn_share=0.2)
EVENTS = 6 + 3 + 1  # sequences, measurements and an end


def run_training(
    engine: Engine, folder: Path, watcher: Watcher | None = None, **changed: Any
) -> tuple[LayerResult, ...]:
    settings = dataclasses.replace(SETTINGS, **changed)
    return train(engine, folder, sequences_of(engine), settings, watcher)


@pytest.fixture(scope="module")
def whole(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    run_training(engine, folder)
    return listing(folder)


def test_a_whole_model(engine: Engine, tmp_path: Path, whole: dict[str, bytes]) -> None:
    watcher = Recorder()
    results = run_training(engine, tmp_path, watcher)
    assert tuple(watcher.done) == results
    assert watcher.notes == []
    assert [result.layer for result in results] == list(range(N_LAYERS))
    for result in results:
        assert result.predictor_bytes == factor_bytes(result.rank, 96, 64, Q4_0)
        assert result.trained.figures.steps == QUICK.steps
    assert sum(one.predictor_bytes for one in results) <= 0.2 * sum(one.ffn_bytes for one in results)
    assert listing(tmp_path) == whole
    again = Recorder()
    same = run_training(engine, tmp_path, again)
    assert again.began_after == N_LAYERS
    for ours, theirs in zip(same, results, strict=True):
        assert ours.trained.figures == theirs.trained.figures
        assert torch.equal(ours.trained.second.blocks, theirs.trained.second.blocks)
    remove_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_one_rank_for_all(engine: Engine, tmp_path: Path) -> None:
    factors = dataclasses.replace(QUICK, rank=64, weight_type="Q8_0")
    results = run_training(engine, tmp_path, factors=factors, ffn_share=None)
    assert [(result.rank, result.trained.first.type) for result in results] == [(64, Q8_0)] * N_LAYERS


@pytest.mark.parametrize("events", range(1, N_LAYERS * EVENTS + 1, 4))
def test_ctrl_c_anywhere_and_it_ends_the_same(
    engine: Engine, tmp_path: Path, whole: dict[str, bytes], events: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_training(engine, tmp_path, Recorder(events))
    watcher = Recorder()
    run_training(engine, tmp_path, watcher)
    assert watcher.began_after == (events - 1) // EVENTS + (events % EVENTS == 0)
    if events > 6:
        assert "going on after" in watcher.notes[0]
    assert listing(tmp_path) == whole


def test_files_of_a_layer_that_is_done_go_where_a_kill_left_them(
    engine: Engine, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **_: Any) -> None:
        raise KeyboardInterrupt

    class AtTheLastLayer(Recorder):
        def measured(self, layer: int, step: int, weighted_recall: float) -> None:
            if layer == N_LAYERS - 1 and step == QUICK.steps:
                monkeypatch.setattr(Path, "unlink", killed)

    with pytest.raises(KeyboardInterrupt):
        run_training(engine, tmp_path, AtTheLastLayer())
    monkeypatch.undo()
    assert listing(tmp_path) != whole
    run_training(engine, tmp_path)
    run_training(engine, tmp_path)
    assert listing(tmp_path) == whole


@pytest.mark.parametrize("other", ["settings", "text", "model"])
def test_another_run_starts_anew(
    engine: Engine, model: Path, tmp_path: Path, whole: dict[str, bytes], other: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        if other == "settings":
            run_training(engine, tmp_path, Recorder(EVENTS + 8), factors=dataclasses.replace(QUICK, seed=5))
        elif other == "text":
            train(engine, tmp_path, sequences_of(engine, 760), SETTINGS, Recorder(EVENTS + 8))
        else:
            path = write_tiny_llama(tmp_path.parent / f"{tmp_path.name}.gguf", n_layers=N_LAYERS, seed=3)
            run_training(load(path), tmp_path, Recorder(EVENTS + 8))
    watcher = Recorder()
    run_training(engine, tmp_path, watcher)
    assert watcher.began_after == 0
    assert "starting anew" in watcher.notes[0]
    assert "of other settings, another text or another model" in watcher.notes[0]
    assert listing(tmp_path) == whole


@pytest.fixture(scope="module")
def interrupted(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that ends within its second layer."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(KeyboardInterrupt):
        run_training(engine, folder, Recorder(EVENTS + 8))
    return folder


@pytest.mark.parametrize("kind", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize(
    "damaged",
    [
        "checkpoint.json",
        "layer-000.*",
        "residuals-001.*",
        "training-001-*",
        f"pairs/{INPUTS}",
        f"pairs/{CONTRIBUTIONS}",
    ],
)
def test_a_damaged_checkpoint_is_not_read(
    engine: Engine, interrupted: Path, tmp_path: Path, whole: dict[str, bytes], damaged: str, kind: str
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    (path,) = (tmp_path / FOLDER).glob(damaged)
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(
            content[:middle] + (b"" if kind == "truncated" else bytes([content[middle] ^ 1]) + content[middle + 1 :])
        )
    watcher = Recorder()
    run_training(engine, tmp_path, watcher)
    assert watcher.began_after == 0
    assert (
        ("starting anew" in watcher.notes[0]) if (damaged, kind) != ("checkpoint.json", "gone") else not watcher.notes
    )
    assert listing(tmp_path) == whole


def test_files_of_a_layer_keep_to_the_budget_and_go(engine: Engine, tmp_path: Path) -> None:
    budget = 400 * (2 * 64 + 96)

    class Sizes(Recorder):
        sizes: list[int] = []  # noqa: RUF012

        def _event(self) -> None:
            pairs = tmp_path / FOLDER / "pairs"
            self.sizes.append(sum(path.stat().st_size for path in pairs.iterdir()) if pairs.is_dir() else 0)

    run_training(engine, tmp_path, Sizes(), disk_bytes=budget)
    assert max(Sizes.sizes) == budget
    assert Sizes.sizes[EVENTS - 1 :: EVENTS] == [0] * N_LAYERS  # where a layer is done


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"disk_bytes": 10}, "a disk budget of 10 bytes is too small: 256 tokens"),
        ({"ffn_share": 0.01}, "is too small for the predictors: rank 32 in every layer takes"),
        ({"ffn_share": 0.0}, "ffn_share must be above 0"),
        ({"ffn_share": float("nan")}, "ffn_share must be above 0"),
        ({"sparsity": 1.0}, "sparsity must be between 0 and 1, not 1"),
        ({"sparsity": float("nan")}, "sparsity must be between"),
    ],
)
def test_bad_settings_of_a_run_are_refused(
    engine: Engine, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    for function in (lambda: run_training(engine, tmp_path, **changed), lambda: estimated(engine, **changed)):
        with pytest.raises(ValueError, match=message):
            function()
    assert list(tmp_path.iterdir()) == []


def test_an_activation_that_is_never_zero_needs_a_sparsity(model: Path, tmp_path: Path) -> None:
    engine = load(model, activation="silu")
    with pytest.raises(ValueError, match=r"needs a sparsity, such as 0.5, for a model whose activation is silu"):
        run_training(engine, tmp_path)
    results = run_training(engine, tmp_path, sparsity=0.7)
    assert all(0.25 < result.trained.figures.density < 0.35 for result in results)


def estimated(engine: Engine, **changed: Any) -> Any:
    return estimate_training(engine, sequences_of(engine), dataclasses.replace(SETTINGS, **changed))


def test_an_estimate_writes_nothing_and_leaves_the_model_as_it_was(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = estimated(engine)
    assert list(tmp_path.iterdir()) == []
    assert (found.layers, found.kept_tokens) == (N_LAYERS, sum(len(one) - 1 for one in sequences_of(engine)))
    assert found.total_s >= N_LAYERS * found.layer_s > N_LAYERS * (found.collect_s + QUICK.steps * found.step_s) > 0
    assert found.peak_rss_bytes > 50e6

    class Largest(Recorder):
        found = 0

        def _event(self) -> None:
            self.found = max(self.found, sum(map(len, listing(tmp_path).values())))

    largest = Largest()
    run_training(engine, tmp_path, largest)
    assert listing(tmp_path) == whole
    assert 0.3 * found.disk_bytes < largest.found <= 1.1 * found.disk_bytes


# A whole training in the folder "whole", then four that each kill themselves at some step that computes or
# touches the disk, then the same four again. Every one is a process, forked from one that has loaded the model.
KILLED = """
import os, random, signal, sys
from pathlib import Path
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.engine.text import Text, cut
from pinfer.engine.train import TrainSettings, train
from pinfer.models import LayerWalk
from pinfer.predictors.training import LayerTraining, TrainingSettings

left = calls = 0

def deadly(function):
    def call(*arguments, **options):
        global left, calls
        left, calls = left - 1, calls + 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

places = (os, ("fsync", "replace")), (Path, ("unlink", "mkdir")), (LayerTraining, ("take_step",)), (LayerWalk, ("step",))
for owner, names in places:
    for name in names:
        setattr(owner, name, deadly(getattr(owner, name)))
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
# A thread alone: OpenMP's do not survive a fork.
engine = load_engine(RunConfig(method="dense", threads=1))
sequences = cut(engine.tokenizer, Text.read(None), 280, 64)
factors = TrainingSettings(rank=32, steps=4, batch_tokens=32, measure_every=2)

def forked(name, point):
    global left
    child = os.fork()
    if child == 0:
        left = point
        train(engine, folder / name, sequences, TrainSettings(factors, ffn_share=None))
        (folder / "calls").write_text(str(calls))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

assert forked("whole", -1) == 0
points = random.Random(seed).sample(range(2, int((folder / "calls").read_text())), 4)
print([forked(str(point), point) for point in points])
print([forked(str(point), -1) for point in points])
"""


def test_killed_anywhere_it_ends_the_same(tmp_path: Path) -> None:
    seed = random.randrange(1000)
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, (seed, done.stderr)
    assert done.stdout.splitlines() == [str([-signal.SIGKILL] * 4), str([0] * 4)], seed
    expected = listing(tmp_path / "whole")
    assert len(expected) == 6 + 1 + 1  # a result a layer, the last residuals, the state
    folders = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    assert len(folders) == 5
    for folder in folders:
        assert listing(folder) == expected, (seed, folder.name)
