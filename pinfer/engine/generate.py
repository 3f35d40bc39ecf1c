"""Generation: read the prompt in chunks, then one token at a time, streaming text."""

from __future__ import annotations

import itertools
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from pinfer import sparsify
from pinfer.config import SamplingConfig
from pinfer.engine.devices import PREFILL_CHUNK
from pinfer.engine.load import Engine
from pinfer.engine.run_stats import RunStatistics
from pinfer.engine.sampling import Sampler
from pinfer.engine.step import DecodeStep
from pinfer.engine.stop import StopStrings
from pinfer.models import KVCache

FinishReason = Literal["eos", "stop", "length", "context"]


@dataclass(frozen=True)
class GenerationStats:
    """Figures of one generation. Densities are over decode alone, or over the prompt where nothing was decoded."""

    prompt_tokens: int
    prompt_s: float
    decoded_tokens: int
    decode_steps: int
    decode_s: float
    density: float
    peak_rss_bytes: int
    vram_bytes: int
    remarks: tuple[str, ...]  # on what a lane did instead of what it was asked for
    unrecorded: str | None  # why decode steps were not repeated from a recording, which is slower

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prompt_s if self.prompt_s else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed in forward passes: the first token comes out of the prefill and takes none."""
        return self.decode_steps / self.decode_s if self.decode_s else 0.0


class Generation:
    """One continuation of a prompt. Iterating yields text as it becomes final; afterwards the fields are set.

    prompt:     token ids, at least one, fewer than the context holds.
    max_tokens: most tokens to draw; None goes on to the end of text or of the context.
    before:     a finished generation that the prompt repeats and goes on from: its cache is taken over.
    statistics: gathers what the run tells of its placement.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        *,
        max_tokens: int | None,
        sampling: SamplingConfig,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        before: Generation | None = None,
        statistics: RunStatistics | None = None,
    ) -> None:
        context = engine.model.context
        if not prompt:
            raise ValueError("the prompt is empty and the model asks for no opening token: nothing to continue")
        if len(prompt) >= context:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, the context holds {context} with at least one to generate: "
                f"shorten it or raise --ctx-size (the model's limit is {engine.config.context_length})"
            )
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"the number of tokens to generate must be at least 0, not {max_tokens}")
        self._engine, self._statistics = engine, statistics
        self._banned = sorted(engine.tokenizer.eog_ids) if ignore_eos else []
        room = context - len(prompt)
        self._limit = room if max_tokens is None else min(room, max_tokens)
        self._limited_by_context = max_tokens is None or max_tokens > room
        self._sampler = Sampler(sampling)
        self._stop = StopStrings(stop)
        self._detokenizer = engine.tokenizer.stream(after=prompt)
        self._cache = engine.model.new_cache() if before is None else before.hand_over(prompt)
        self._decode_step = DecodeStep(engine.model, self._cache, record=engine.run.record)
        self._state: Literal["new", "running", "done", "handed over"] = "new"
        self.prompt = list(prompt)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason = "length"
        self.seed = self._sampler.seed
        self._history = list(prompt)
        self._steps = self._read = 0
        self._prompt_s = self._decode_s = 0.0

    def __iter__(self) -> Iterator[str]:
        if self._state != "new":
            raise RuntimeError("a generation runs once; make another to run again")
        self._state = "running"
        try:
            yield from self._run()
        finally:  # an interrupted one may be continued as well
            self._state = "done"
            if self._statistics is not None and self._steps:
                self._statistics.count()

    def _run(self) -> Iterator[str]:
        sparsify.reset_activity(self._engine.model)
        logits = self._prefill()
        if self._limit > 0:
            yield from self._decode(logits)
            tail = self._stop.push(self._detokenizer.flush()) + self._stop.flush()
            if tail:
                self.text += tail
                yield tail

    def hand_over(self, prompt: Sequence[int]) -> KVCache:
        """This generation's cache for one whose prompt goes on from it; this one cannot run again.

        ValueError unless the prompt repeats every token the cache holds and has one more, and for a
        generation that is still running or has handed its cache over before.
        """
        self._check_over()
        held = (self.prompt + self.ids)[: self._cache.length]
        if len(prompt) <= len(held) or list(prompt[: len(held)]) != held:
            raise ValueError("the prompt does not continue the earlier generation")
        self._state = "handed over"
        return self._cache

    def forget(self) -> None:
        """Empty the cache: any prompt may go on from this generation, in the memory that it has. ValueError as above."""
        self._check_over()
        self._cache.length = 0

    def rewind(self, prompt: Sequence[int]) -> int:
        """Keep of the cache what `prompt` begins with, so that it may go on from here; returns so many tokens.

        At least the last token of `prompt` is left to compute. ValueError as above.
        """
        self._check_over()
        held = (self.prompt + self.ids)[: self._cache.length]
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(held, prompt[:-1], strict=False))
        self._cache.length = sum(1 for _ in same)
        return self._cache.length

    def _check_over(self) -> None:
        if self._state == "running":
            raise ValueError("the earlier generation is still running")
        if self._state == "handed over":
            raise ValueError("the earlier generation has handed its cache over already")

    def _prefill(self) -> torch.Tensor:
        began = time.perf_counter()
        tokens = torch.tensor(self.prompt[self._cache.length :])
        self._read = len(tokens)
        for chunk in tokens.split(PREFILL_CHUNK):
            with self._engine.computing():
                logits = self._engine.model(chunk, self._cache, last_only=True)
        self._prompt_s = time.perf_counter() - began
        return self._trim(logits)

    def _decode(self, logits: torch.Tensor) -> Iterator[str]:
        while True:
            began = time.perf_counter()
            token = self._sampler(logits, self._history, self._banned)
            if token in self._engine.tokenizer.eog_ids:
                self.finish_reason = "eos"
                return
            self.ids.append(token)
            self._history.append(token)
            text = self._stop.push(self._detokenizer.push(token))
            self.text += text
            self._decode_s += time.perf_counter() - began
            if text:
                yield text
            if not self._may_go_on():
                return
            began = time.perf_counter()
            logits = self._step(token)
            self._decode_s += time.perf_counter() - began

    def _may_go_on(self) -> bool:
        if self._stop.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) >= self._limit:
            self.finish_reason = "context" if self._limited_by_context else "length"
        else:
            return True
        return False

    def _step(self, token: int) -> torch.Tensor:
        """One decode step: logits float32 [V] after `token`."""
        if self._steps == 0:  # from here on density is that of decode
            sparsify.reset_activity(self._engine.model)
        self._steps += 1
        statistics = self._statistics
        with self._engine.computing():
            if statistics is None or not statistics.wanted(self._steps - 1):
                return self._trim(self._decode_step(token))
            with statistics.sampling(self._steps - 1):
                return self._trim(self._engine.model(torch.tensor([token]), self._cache))

    def _trim(self, logits: torch.Tensor) -> torch.Tensor:
        """The last row, without the padding that some embeddings have behind the vocabulary."""
        return logits[-1, : self._engine.tokenizer.vocab_size].cpu()

    @property
    def stats(self) -> GenerationStats:
        return GenerationStats(
            prompt_tokens=self._read,
            prompt_s=self._prompt_s,
            decoded_tokens=len(self.ids),
            decode_steps=self._steps,
            decode_s=self._decode_s,
            density=sparsify.density(self._engine.model),
            peak_rss_bytes=peak_rss_bytes(),
            vram_bytes=self._engine.vram_bytes,
            remarks=tuple(self._decode_step.remarks),
            unrecorded=self._decode_step.reason if self._steps else None,
        )


def peak_rss_bytes() -> int:
    """Most memory this process has held, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
