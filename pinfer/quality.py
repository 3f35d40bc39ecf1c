"""Quality of a model on a text: perplexity, and distance from the same checkpoint run dense."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
        return math.exp(self.nll)


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


@dataclass(frozen=True)
class Distance:
    """How far one set of logits is from a reference set over the same tokens.

    agreement: share of positions with the same argmax; kl: mean KL(reference ‖ other) in nats;
    max_logit_error: largest absolute difference of any logit.
    """

    agreement: float
    kl: float
    max_logit_error: float


def logit_distance(reference: torch.Tensor, other: torch.Tensor) -> Distance:
    """Compare logits float32 [T, V] with a reference of the same shape."""
    kl = F.kl_div(other.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean")
    return Distance(
        agreement=float((reference.argmax(-1) == other.argmax(-1)).float().mean()),
        kl=float(kl),
        max_logit_error=float((reference - other).abs().max()),
    )
