"""The sampler's stages, one by one, and that equal seeds give equal draws."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from pinfer.config import SamplingConfig
from pinfer.engine.sampling import Sampler

LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -1.0])
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "seed": 1}


def draws(config: SamplingConfig, n: int = 3000, history: tuple[int, ...] = ()) -> Counter[int]:
    sampler = Sampler(config)
    return Counter(sampler(LOGITS, history) for _ in range(n))


def with_stage(**stage: Any) -> SamplingConfig:
    return SamplingConfig(**{**OFF, **stage})


def test_greedy_takes_the_best() -> None:
    assert draws(with_stage(temperature=0), 5) == {1: 5}


def test_all_stages_off_draws_from_the_softmax() -> None:
    drawn = draws(with_stage())
    for token, probability in enumerate(LOGITS.softmax(0).tolist()):
        assert drawn[token] / 3000 == pytest.approx(probability, abs=0.03)


@pytest.mark.parametrize(
    ("stage", "survivors"),
    [
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 1}, {1}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.6}, {1}),  # the best alone holds 0.64
        ({"top_p": 0.65}, {1, 3}),
        ({"top_p": 1e-9}, {1}),
        ({"min_p": 0.3}, {1, 3}),  # e^-1 = 0.37 of the best, e^-2 = 0.14
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "min_p": 0.3}, {1, 3}),
    ],
)
def test_stages_cut_the_tail(stage: dict[str, Any], survivors: set[int]) -> None:
    assert set(draws(with_stage(**stage))) == survivors


def test_temperature_flattens() -> None:
    hot, cold = draws(with_stage(temperature=5.0)), draws(with_stage(temperature=0.5))
    assert hot[1] < draws(with_stage())[1] < cold[1]


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    penalised = with_stage(repeat_penalty=2.0)
    drawn = draws(penalised, history=(1, 4))
    expected = torch.tensor([0.0, 1.5, 1.0, 2.0, -2.0]).softmax(0)
    for token, probability in enumerate(expected.tolist()):
        assert drawn[token] / 3000 == pytest.approx(probability, abs=0.03)


def test_repeat_penalty_forgets_beyond_its_window() -> None:
    config = with_stage(temperature=0, repeat_penalty=10.0, repeat_last_n=2)
    assert draws(config, 1, history=(1, 0, 0)) == {1: 1}
    assert draws(config, 1, history=(0, 1, 0)) == {3: 1}
    assert draws(with_stage(temperature=0, repeat_penalty=10.0, repeat_last_n=0), 1, history=(1,)) == {1: 1}


def test_temperature_comes_after_the_cuts() -> None:
    """A high temperature must not let the tail through top-p or min-p."""
    assert set(draws(with_stage(temperature=50.0, min_p=0.3))) == {1, 3}
    assert set(draws(with_stage(temperature=50.0, top_p=0.65))) == {1, 3}


def test_top_p_keeps_the_token_that_reaches_it_and_no_more() -> None:
    halves = torch.tensor([0.5, 0.25, 0.25]).log()
    sampler = Sampler(with_stage(top_p=0.5))
    assert {sampler(halves, ()) for _ in range(200)} == {0}


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-12])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    assert set(draws(with_stage(temperature=temperature), 50)) == {1}


def test_banned_tokens_are_never_drawn() -> None:
    sampler = Sampler(with_stage())
    assert 1 not in {sampler(LOGITS, (), [1, 3]) for _ in range(300)}
    assert Sampler(with_stage(temperature=0))(LOGITS, (), [1]) == 3


def test_equal_seeds_draw_alike_and_a_missing_one_is_reported() -> None:
    first, second = Sampler(with_stage(seed=5)), Sampler(with_stage(seed=5))
    assert [first(LOGITS, ()) for _ in range(50)] == [second(LOGITS, ()) for _ in range(50)]
    free = Sampler(with_stage(seed=None))
    again = Sampler(with_stage(seed=free.seed))
    assert [free(LOGITS, ()) for _ in range(50)] == [again(LOGITS, ()) for _ in range(50)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_stop_the_run(bad: float) -> None:
    with pytest.raises(RuntimeError, match="not finite"):
        Sampler(with_stage())(torch.tensor([0.0, bad]), ())
