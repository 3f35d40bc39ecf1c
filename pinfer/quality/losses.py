"""Perplexity, and how certain a mean over windows is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pinfer.models import Transformer


@dataclass(frozen=True)
class Perplexity:
    """Mean negative log likelihood in nats over `tokens` predicted tokens, with its standard error over windows."""

    nll: float
    standard_error: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nll); inf where that has no float."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf

    @property
    def perplexity_standard_error(self) -> float:
        """To first order: d exp(nll) = exp(nll) · d nll."""
        return self.perplexity * self.standard_error


@dataclass(frozen=True)
class Estimate:
    """A mean over all tokens, and its standard error over windows (NaN for a single window)."""

    value: float
    standard_error: float


def over_windows(values: Sequence[torch.Tensor]) -> Estimate:
    """The mean of per-token values, one float [S] a window, S differing between windows.

    Tokens of a window are not independent, windows nearly are: with sums s_w over n_w tokens of W
    windows, mean m = Σ s_w / Σ n_w and standard error √(W / (W - 1) · Σ (s_w - m · n_w)²) / Σ n_w (the
    ratio estimator; for equal windows the deviation of their means over √W). For two runs over the
    same windows, pass differences: what makes a text hard then cancels.
    """
    sums = torch.stack([value.double().sum() for value in values])
    counts = torch.tensor([value.numel() for value in values], dtype=torch.float64)
    mean = sums.sum() / counts.sum()
    if len(values) == 1:
        return Estimate(float(mean), math.nan)
    spread = (sums - mean * counts).square().sum() * len(values) / (len(values) - 1)
    return Estimate(float(mean), float(spread.sqrt() / counts.sum()))


def windows(tokens: list[int], length: int, bos: int | None) -> Iterator[torch.Tensor]:
    """Cut a text into windows of int64 [length], each opened by BOS where the model uses one.

    A last piece of fewer than half a window is dropped. ValueError if the text yields none.
    """
    step = length - (bos is not None)
    if step < 2:
        raise ValueError(f"windows of {length} tokens are too short to predict from")
    pieces = [tokens[at : at + step] for at in range(0, len(tokens), step)]
    pieces = [piece for piece in pieces if len(piece) >= max(2, step // 2)]
    if not pieces:
        raise ValueError(f"the text has {len(tokens)} tokens: too few for a window of {length}")
    for piece in pieces:
        yield torch.tensor(piece if bos is None else [bos, *piece])


@torch.inference_mode()
def perplexity(model: Transformer, pieces: list[torch.Tensor]) -> Perplexity:
    """Teacher-forced over each window on its own; every token after a window's first is scored."""
    losses = []
    for piece in pieces:
        logits = model(piece, model.new_cache())
        losses.append(F.cross_entropy(logits[:-1], piece[1:], reduction="none"))
    means = torch.stack([loss.mean() for loss in losses])
    flat = torch.cat(losses).double()
    error = float(means.std() / math.sqrt(len(means))) if len(means) > 1 else math.nan
    return Perplexity(float(flat.mean()), error, flat.numel())
