"""Windows, losses, distances and neuron counts against answers worked out by hand or by brute force."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.models import build_model
from pinfer.quality import (
    compare_logits,
    count_neurons,
    evaluate,
    logit_distance,
    over_windows,
    perplexity,
    sliding_windows,
    spread,
    windows,
)
from pinfer.quality.compare import quantile
from tests.gguf_files import write_tiny_llama


def test_perplexity_is_the_mean_over_every_scored_token(tmp_path: Path) -> None:
    gguf = GGUFFile.open(write_tiny_llama(tmp_path / "m.gguf"))
    model = build_model(gguf, model_config(gguf), 32)
    pieces = [torch.arange(1, 20), torch.arange(30, 50)]
    result = perplexity(model, pieces)
    losses = []
    for piece in pieces:
        with torch.inference_mode():
            probabilities = model(piece, model.new_cache()).double().softmax(-1)
        losses += [-math.log(probabilities[i, piece[i + 1]]) for i in range(len(piece) - 1)]
    assert result.tokens == len(losses) == 37
    assert result.nll == pytest.approx(sum(losses) / 37, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert result.standard_error > 0


def test_windows_open_with_bos_and_cover_the_text_once() -> None:
    pieces = list(windows(list(range(100)), 33, bos=7))
    assert all(piece[0] == 7 for piece in pieces)
    assert torch.cat([piece[1:] for piece in pieces]).tolist() == list(range(96))
    assert torch.cat(list(windows(list(range(100)), 33, bos=None))).tolist() == list(range(99))


@pytest.mark.parametrize(("tokens", "length"), [([], 8), ([1], 8), ([1, 2, 3], 2)])
def test_too_little_text_is_refused(tokens: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="too"):
        list(windows(tokens, length, bos=1))


def test_distance() -> None:
    reference = torch.tensor([[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert logit_distance(reference, reference) == logit_distance(reference, reference + 0)
    same = logit_distance(reference, reference)
    assert (same.agreement, same.kl, same.max_logit_error) == (1.0, pytest.approx(0, abs=1e-7), 0.0)
    other = logit_distance(reference, reference.flip(0))
    p = torch.tensor([2.0, 0.0, 0.0]).softmax(0)
    assert other.agreement == 0
    assert other.kl == pytest.approx(float((p * (p / p[[1, 0, 2]]).log()).sum()), rel=1e-5)
    assert other.max_logit_error == 2.0


SIZES = [(8, 8), (8, 3), (8, 1), (5, 4), (40, 40), (39, 7)]


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize(("length", "stride"), SIZES)
def test_sliding_windows_score_every_token_once(length: int, stride: int, bos: int | None) -> None:
    text = list(range(100, 141))
    found = sliding_windows(text, length, stride, bos)
    scored = [(w.start + i, int(t)) for w in found for i, t in enumerate(w.targets[-w.scored :])]
    first = 0 if bos is not None else 1  # nothing precedes the first token without a BOS
    assert scored == [(at, text[at]) for at in range(first, 41)]
    for window in found:
        assert len(window.inputs) == len(window.targets) <= length
        assert window.inputs[1:].tolist() == window.targets[:-1].tolist()
        if bos is not None:
            assert window.inputs[0] == bos
    assert all(len(window.inputs) == length for window in found[:-1])
    assert all(window.scored == stride for window in found[1:-1])


@pytest.mark.parametrize("bos", [None, 263])
@pytest.mark.parametrize(("length", "stride"), [(12, 12), (12, 5), (9, 1)])
def test_sliding_losses_are_those_of_each_token_from_its_own_context(
    tmp_path: Path, length: int, stride: int, bos: int | None
) -> None:
    gguf = GGUFFile.open(write_tiny_llama(tmp_path / "m.gguf"))
    model = build_model(gguf, model_config(gguf), 32)
    text = torch.randint(0, 260, (41,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.inference_mode():
        found = list(evaluate(model, sliding_windows(text, length, stride, bos)))
        expected = []
        opened = 0 if bos is None else -1  # where the sequence with its BOS begins, counted in the text
        for at in range(opened + 1, 41):
            number = max(0, -(-(at - opened - length) // stride))  # the first window that reaches token `at`
            begin = opened + number * stride
            context = text[begin:at] if bos is None else [bos, *text[begin + 1 : at]]
            last = model(torch.tensor(context), model.new_cache())[-1].double()
            expected.append(-float(last.log_softmax(-1)[text[at]]))
    got = torch.cat([one.tokens["dense_nll"] for one in found])
    torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "length", "stride", "says"),
    [(40, 1, 1, "too short"), (40, 8, 9, r"\[1, 8\]"), (40, 8, 0, r"\[1, 8\]"), (7, 8, 8, "7 tokens"), (0, 8, 8, "0 tokens")],
)  # fmt: skip
def test_bad_windows_are_refused(tokens: int, length: int, stride: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        sliding_windows(list(range(tokens)), length, stride, bos=1)


def test_a_text_that_just_fills_a_window() -> None:
    assert [w.scored for w in sliding_windows([5] * 8, 8, 8, bos=1)] == [8]
    assert [w.scored for w in sliding_windows([5] * 9, 8, 8, bos=None)] == [8]
    with pytest.raises(ValueError, match="at least 9"):
        sliding_windows([5] * 8, 8, 8, bos=None)


def test_spread_takes_windows_from_all_over() -> None:
    found = sliding_windows(list(range(100)), 10, 10, bos=1)
    assert [w.start for w in spread(found, 5)] == [0, 20, 40, 60, 80]
    assert spread(found, None) == found == spread(found, 10)
    for count in (0, 11):
        with pytest.raises(ValueError, match="10 windows"):
            spread(found, count)


def test_compared_logits_position_by_position(generator: torch.Generator) -> None:
    dense, noise = torch.randn(20, 30, generator=generator), torch.randn(20, 30, generator=generator)
    sparse, targets = dense + 0.7 * noise, torch.randint(0, 30, (20,), generator=generator)
    got = compare_logits(dense, sparse, targets)
    assert 0 < got["argmax_agreement"].mean() < got["argmax_in_dense_top5"].mean()
    for i in range(20):
        p, q = (logits[i].double().softmax(0) for logits in (dense, sparse))
        best, others = (sorted(range(30), key=lambda v: -float(x[v]))[:5] for x in (p, q))
        expected = {
            "dense_nll": -math.log(p[targets[i]]),
            "sparse_nll": -math.log(q[targets[i]]),
            "kl": sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True)),
            "argmax_agreement": float(best[0] == others[0]),
            "argmax_in_dense_top5": float(others[0] in best),
            "top5_overlap": len({*best} & {*others}) / 5,
        }
        assert {name: float(values[i]) for name, values in got.items()} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_logits_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        compare_logits(torch.zeros(3, 8), torch.zeros(3, 9), torch.zeros(3, dtype=torch.int64))


def test_mean_over_windows_and_its_standard_error() -> None:
    equal = [torch.tensor([1.0, 3.0]), torch.tensor([5.0, 5.0]), torch.tensor([2.0, 8.0])]
    estimate = over_windows(equal)
    assert estimate.value == 4.0
    assert estimate.standard_error == pytest.approx(float(torch.tensor([2.0, 5.0, 5.0]).std()) / math.sqrt(3))
    unequal = over_windows([torch.tensor([1.0]), torch.tensor([2.0, 3.0, 6.0])])
    assert unequal.value == 3.0
    # sums 1 and 11 of 1 and 3 tokens: residuals -2 and 2
    assert unequal.standard_error == pytest.approx(math.sqrt(2 / 1 * (4 + 4)) / 4)
    assert math.isnan(over_windows(equal[:1]).standard_error)
    assert over_windows([window - (window - 0.25) for window in equal]).standard_error == 0


WEIGHT = torch.tensor([[8.0, 4.0, 2.0, 1.0, 1.0], [0.0, 1.0, 3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
COMPUTED = torch.tensor([[1, 0, 1, 0, 1], [1, 0, 0, 1, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)


def test_neurons_against_those_that_fired() -> None:
    counts = count_neurons(WEIGHT, COMPUTED, WEIGHT > 0)
    assert (counts.tokens, counts.neurons, counts.computed, counts.active, counts.caught) == (3, 15, 7, 7, 3)
    assert (counts.density, counts.recall, counts.over_prediction) == (7 / 15, 3 / 7, 1.0)
    assert counts.weighted_recall == pytest.approx((11 / 16 + 0 + 1) / 3)
    both = counts + counts
    assert (both.tokens, both.recall, both.weighted_recall) == (6, 3 / 7, counts.weighted_recall)


def test_neurons_against_the_heaviest_of_each_token() -> None:
    # token 0: three computed, the heaviest three are 0, 1, 2, of which 0 and 2 are computed;
    # token 1: two computed, the heaviest are 2 and 1; token 2: all weigh the same, which is no miss.
    counts = count_neurons(WEIGHT, COMPUTED, None)
    assert (counts.computed, counts.active, counts.caught) == (7, 7, 4)
    assert counts.over_prediction == 1.0


@pytest.mark.parametrize("fired", [WEIGHT > 0, None])
def test_everything_and_nothing_computed(fired: torch.Tensor | None) -> None:
    everything = count_neurons(WEIGHT, torch.ones_like(COMPUTED), fired)
    assert (everything.density, everything.recall, everything.weighted_recall) == (1.0, 1.0, 1.0)
    nothing = count_neurons(WEIGHT[:2], torch.zeros_like(COMPUTED[:2]), None if fired is None else fired[:2])
    assert (nothing.density, nothing.weighted_recall, nothing.caught) == (0.0, 0.0, 0)
    silent = count_neurons(WEIGHT[2:], COMPUTED[2:], torch.zeros(1, 5, dtype=torch.bool))
    assert (silent.recall, silent.over_prediction) == (1.0, None)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_quantile(generator: torch.Generator, share: float) -> None:
    values = torch.randn(101, generator=generator)
    assert quantile(values, share) == pytest.approx(float(values.double().quantile(share)))
