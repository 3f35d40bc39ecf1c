"""Perplexity and distance figures on models whose answers are known."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.models import build_model
from pinfer.quality import logit_distance, perplexity, windows
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
