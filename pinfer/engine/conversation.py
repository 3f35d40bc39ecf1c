"""A chat with a model: the messages so far, and the cache of what was computed for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pinfer.chat import encode_chat, find_template, stop_strings
from pinfer.config import SamplingConfig
from pinfer.engine.generate import Generation
from pinfer.engine.load import Engine
from pinfer.engine.run_stats import RunStatistics


class Conversation:
    """Turns of a chat. Each renders all messages anew and computes only the ids that the cache does not hold.

    template: a chat template; None takes the model's own, or one that suits its vocabulary.
    system:   a first message that outlives all others.
    messages: what was said so far, the system message included; `ask` and the end of an answer add to it.

    Turns that do not fit the context are forgotten, the oldest first; `forgotten` counts messages.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        template: str | None = None,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        statistics: RunStatistics | None = None,
    ) -> None:
        self._engine, self._tools = engine, tools
        self._template = find_template(engine.tokenizer) if template is None else template
        self._max_tokens, self._ignore_eos, self._statistics = max_tokens, ignore_eos, statistics
        self._sampling = engine.run.sampling if sampling is None else sampling
        self._stop = [*stop, *stop_strings(self._template)]
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._last: Generation | None = None
        self.messages: list[dict[str, Any]] = list(self._first)
        self.forgotten = 0

    def ask(self, text: str) -> Generation:
        """The answer to a user's message, to be iterated before the next is asked.

        ValueError for a message that alone does not fit the context, ChatTemplateError where the
        template refuses; the message is then as if it had not been.
        """
        self._engine.check_length(text)
        before = self._last
        earlier = list(self.messages)
        if before is not None and earlier[-1]["role"] == "user":
            earlier.append({"role": "assistant", "content": before.text})
        messages, ids = self._fitting([*earlier, {"role": "user", "content": text}])
        if before is not None:
            before.rewind(ids)
        self._last = Generation(
            self._engine,
            ids,
            before=before,
            max_tokens=self._max_tokens,
            sampling=self._sampling,
            stop=self._stop,
            ignore_eos=self._ignore_eos,
            statistics=self._statistics,
        )
        self.messages = messages
        return self._last

    def _fitting(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
        """The messages without the oldest turns that the context has no room for, and their ids."""
        while True:
            ids = encode_chat(self._engine.tokenizer, messages, template=self._template, tools=self._tools)
            start = len(self._first)
            turns = [i for i in range(start + 1, len(messages)) if messages[i]["role"] == "user"]
            if len(ids) < self._engine.model.context or not turns:
                return messages, ids
            self.forgotten += turns[0] - start
            messages = [*self._first, *messages[turns[0] :]]
