"""What a batcher is asked for, and what it tells of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from pinfer.config import SamplingConfig

FinishReason = Literal["eos", "stop", "length", "context", "cancelled"]
MAX_TOP_LOGPROBS = 20  # OpenAI's limit
MAX_LOGIT_BIAS = 100.0  # OpenAI's: beyond it a token is as good as chosen or banned


class Constraint(Protocol):
    """A grammar that a continuation keeps to, with the state of one continuation."""

    def allowed(self) -> torch.Tensor:
        """bool [V]: the tokens that may come next; the end of text is among them where the grammar may end."""

    def accept(self, token: int) -> None:
        """Go on past a token that was allowed."""


@dataclass(frozen=True)
class Request:
    """One continuation of one prompt.

    prompt:          token ids, at least one.
    max_tokens:      most tokens to draw; None goes on to the end of text or of the context.
    stop:            strings that end the text, themselves not part of it.
    ignore_eos:      never draw an end of text.
    logit_bias:      token id to what is added to its logit before everything else, within ±100.
    top_logprobs:    with every token its log-probability and those of so many best ones (0: its own alone); None: none.
                     They are of the model's distribution, before penalties, bias and temperature.
    prompt_logprobs: tell the same of the prompt's tokens, the first one excepted.
    constraint:      what the continuation keeps to, or None.
    sparsity:        share of neurons left out, instead of the engine's own setting; ValueError from the batcher where
                     its method has no such setting.
    quality:         share of the dense model's quality to keep (exp of minus the loss in nats), likewise.
    """

    prompt: Sequence[int]
    max_tokens: int | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    prompt_logprobs: bool = False
    constraint: Constraint | None = None
    sparsity: float | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt is empty: there is nothing to continue")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, not {self.max_tokens}")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS:
            raise ValueError(f"top_logprobs must lie in [0, {MAX_TOP_LOGPROBS}], not {self.top_logprobs}")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MAX_LOGIT_BIAS:  # so that NaN fails
                raise ValueError(f"logit_bias of token {token} must lie in [-100, 100], not {bias}")
        for name in ("sparsity", "quality"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must lie in [0, 1], not {value}")
        if self.sparsity is not None and self.quality is not None:
            raise ValueError("sparsity and quality say the same in two ways: give one of them")


@dataclass(frozen=True)
class Token:
    """A token that was drawn, or one of the prompt. logprob: natural log, None where it was not asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # (id, logprob), best first


@dataclass(frozen=True)
class PromptRead:
    """The prompt has been read. tokens: its tokens with log-probabilities where they were asked for, else ()."""

    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Delta:
    """Text that has become final, and the tokens that came since the last event. Either may be empty."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True)
class Usage:
    """What a request took. Density is that of its decode steps: its own neurons, without those of its neighbours."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, taken from an earlier request's cache
    completion_tokens: int
    queued_s: float
    prefill_s: float
    decode_s: float
    density: float | None = None


@dataclass(frozen=True)
class Done:
    """The last event of a request that came to an end."""

    reason: FinishReason
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """The last event of a request that failed in the batcher; other requests go on where they can."""

    error: Exception


Event = PromptRead | Delta | Done | Failed


class QueueFull(Exception):
    """The queue holds as many requests as it may: HTTP's 429."""


class Closed(Exception):
    """The batcher drains or has ended, or its engine has died: HTTP's 503."""


class ContextExceeded(ValueError):
    """A prompt that leaves no room to generate. prompt_tokens, context: counts of tokens."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        super().__init__(
            f"the prompt has {prompt_tokens} tokens, the context holds {context} with at least one to generate"
        )
        self.prompt_tokens, self.context = prompt_tokens, context
