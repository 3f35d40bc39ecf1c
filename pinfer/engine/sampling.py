"""Drawing the next token, in llama.cpp's order: penalty, top-k, top-p, min-p, temperature."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import torch

from pinfer.config import SamplingConfig
from pinfer.kernels.ops import top_k


class Sampler:
    """Draws tokens; equal seeds give equal draws. `seed` is the one in use, drawn if none was given."""

    def __init__(self, config: SamplingConfig) -> None:
        self.config = config
        self.seed = secrets.randbits(32) if config.seed is None else config.seed
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, logits: torch.Tensor, history: Sequence[int], banned: Sequence[int] = ()) -> int:
        """Choose from logits float32 [V], given all tokens so far and ids that must not be drawn.

        RuntimeError if the logits are not finite.
        """
        config = self.config
        wanted = 1 if config.temperature == 0 else config.top_k or logits.numel()
        # One pass over the vocabulary: the banned are drawn with the rest and dropped.
        logits, tokens = top_k(_penalise(logits, history, config), min(wanted + len(banned), logits.numel()))
        if not math.isfinite(logits[0]):
            raise RuntimeError("the model's output is not finite: its weights or its input are damaged")
        if banned:
            allowed = torch.isin(tokens, torch.tensor(banned), invert=True)
            logits, tokens = logits[allowed][:wanted], tokens[allowed][:wanted]
        if config.temperature == 0:
            return int(tokens[0])
        logits, tokens = _candidates(logits, tokens, config)
        # In double and from the best one down, so that no temperature overflows.
        probabilities = ((logits.double() - logits.max()) / config.temperature).softmax(-1)
        return int(tokens[torch.multinomial(probabilities, 1, generator=self._generator)])


def _penalise(logits: torch.Tensor, history: Sequence[int], config: SamplingConfig) -> torch.Tensor:
    """Repetition penalty (Keskar et al. 2019) over the last `repeat_last_n` tokens."""
    recent = list(history[-config.repeat_last_n :]) if config.repeat_last_n else []
    if config.repeat_penalty == 1 or not recent:
        return logits
    seen = torch.tensor(sorted(set(recent)))
    logits = logits.clone()
    score = logits[seen]
    logits[seen] = torch.where(score > 0, score / config.repeat_penalty, score * config.repeat_penalty)
    return logits


def _candidates(
    logits: torch.Tensor, tokens: torch.Tensor, config: SamplingConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the top-k logits and token ids, best first, those that survive top-p and min-p; at least one does."""
    if config.top_p < 1:
        probabilities = logits.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of the better ones
        keep = int((before < config.top_p).sum())
        logits, tokens = logits[: max(1, keep)], tokens[: max(1, keep)]
    if config.min_p > 0:
        probabilities = logits.softmax(-1)
        keep = int((probabilities >= config.min_p * probabilities[0]).sum())
        logits, tokens = logits[: max(1, keep)], tokens[: max(1, keep)]
    return logits, tokens
