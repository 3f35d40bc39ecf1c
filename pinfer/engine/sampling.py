"""Drawing the next token, in llama.cpp's order: penalty, top-k, top-p, min-p, temperature."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import torch

from pinfer.config import SamplingConfig


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
        if not torch.isfinite(logits).all():
            raise RuntimeError("the model's output is not finite: its weights or its input are damaged")
        config = self.config
        if banned:
            logits = logits.index_fill(0, torch.tensor(banned), -torch.inf)
        logits = _penalise(logits, history, config)
        if config.temperature == 0:
            return int(logits.argmax())
        logits, tokens = _candidates(logits, config)
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


def _candidates(logits: torch.Tensor, config: SamplingConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and token ids that survive top-k, top-p and min-p, best first; at least one does."""
    count = min(config.top_k or logits.numel(), logits.numel())
    logits, tokens = logits.topk(count)
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
