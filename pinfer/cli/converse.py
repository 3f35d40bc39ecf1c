"""What pinfer generate does with prompts: continue a text, or answer in a chat; one prompt, or line by line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Protocol

from pinfer.chat import read_template, suitable
from pinfer.cli.console import note, size
from pinfer.engine import Conversation, Engine, Generation, GenerationStats
from pinfer.engine.run_stats import RunStatistics

YELLOW, RESET = "\x1b[33m", "\x1b[0m"


@dataclass(frozen=True)
class Task:
    """What stays the same from one prompt to the next."""

    engine: Engine
    max_tokens: int | None
    stop: list[str]
    ignore_eos: bool
    special: bool
    statistics: RunStatistics | None


class Speaker(Protocol):
    """Turns lines into generations. `continues`: the text goes on from the line, as no answer does."""

    continues: bool

    def reply(self, line: str) -> Generation: ...


class Continuation:
    """Each line continues the text so far, while the context lasts."""

    continues = True

    def __init__(self, task: Task) -> None:
        self._task = task
        self._before: Generation | None = None

    def reply(self, line: str) -> Generation:
        """What `line` leads to after an earlier generation; that is forgotten if both do not fit the context."""
        before, engine = self._before, self._task.engine
        if before is not None:
            ids = before.prompt + before.ids + self._encode(line, opening=False)
            if len(ids) < engine.model.context:
                return self._continue_from(ids)
            note("the context is full: earlier lines are forgotten (--ctx-size)")
        ids = self._encode(line)
        if before is not None:
            before.forget()  # there may be no room for a second cache
        return self._continue_from(ids)

    def _encode(self, text: str, *, opening: bool = True) -> list[int]:
        self._task.engine.check_length(text)
        add_bos = None if opening else False
        return self._task.engine.tokenizer.encode(text, add_bos=add_bos, parse_special=self._task.special)

    def _continue_from(self, ids: list[int]) -> Generation:
        self._before = Generation(
            self._task.engine,
            ids,
            before=self._before,
            max_tokens=self._task.max_tokens,
            sampling=self._task.engine.run.sampling,
            stop=self._task.stop,
            ignore_eos=self._task.ignore_eos,
            statistics=self._task.statistics,
        )
        return self._before


class Chat:
    """Each line is a user's message."""

    continues = False

    def __init__(self, task: Task, template: str | None, system: str | None) -> None:
        tokenizer = task.engine.tokenizer
        if template is None and tokenizer.chat_template is None:
            note(f"the model has no chat template: {suitable(tokenizer)} is used (--chat-template)")
        self._conversation = Conversation(
            task.engine,
            template=template,
            system=system,
            max_tokens=task.max_tokens,
            stop=task.stop,
            ignore_eos=task.ignore_eos,
            statistics=task.statistics,
        )

    def reply(self, line: str) -> Generation:
        """The answer; the oldest turns are forgotten if all do not fit the context."""
        forgotten = self._conversation.forgotten
        generation = self._conversation.ask(line)
        if self._conversation.forgotten > forgotten:
            note("the context is full: earlier messages are forgotten (--ctx-size)")
        return generation


@dataclass(frozen=True)
class Talk:
    """What was said on the command line of a chat; `chat` None leaves it to the model."""

    chat: bool | None
    template: str | None
    system: str | None

    @classmethod
    def chosen(cls, chat: bool | None, template: str | None, system: str | None, special: bool) -> Talk:
        """Check the flags and read the template. ValueError for flags that contradict each other."""
        given = [name for name, value in (("--chat-template", template), ("--system", system)) if value is not None]
        if chat is False and given:
            raise ValueError(f"{given[0]} has no meaning with --no-chat")
        if special and (chat or given):
            raise ValueError("--special has no meaning in a chat: only the template writes special tokens")
        text = None if template is None else read_template(template)
        if chat is None and (given or special):
            chat = bool(given)
        return cls(chat, text, system)

    def speaker(self, task: Task, interactive: bool) -> Speaker:
        chats = self.chat
        if chats is None:
            chats = interactive and task.engine.tokenizer.chat_template is not None
        return Chat(task, self.template, self.system) if chats else Continuation(task)


def converse(speaker: Speaker, opening: str | None, color: bool) -> None:
    """Prompts line by line until the end of input."""
    coloured = color and sys.stdout.isatty()
    line = opening
    while True:
        if line is None:
            try:
                line = input(f"{YELLOW}> {RESET}" if coloured else "> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            echo = None
        else:
            echo = line if speaker.continues else None  # of -p: typed lines stand on the screen already
        if line:
            generation = speaker.reply(line)
            stream(generation, echo, color)
            report(generation)
        line = None


def stream(generation: Generation, echo: str | None, color: bool) -> None:
    """Write the text as it comes, behind `echo`."""
    if echo is not None:
        coloured = color and sys.stdout.isatty()
        sys.stdout.write(f"{YELLOW}{echo}{RESET}" if coloured else echo)
    for text in generation:
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def report(generation: Generation) -> None:
    """Why it ended, if that is not plain, and its figures, to stderr."""
    if generation.finish_reason == "context":
        note("stopped: the context is full (--ctx-size)")
    for remark in generation.stats.remarks:
        note(remark)
    note(summary(generation.stats))


def summary(stats: GenerationStats) -> str:
    """The line after a generation."""
    decode = f"decode {stats.decoded_tokens} tokens"
    if stats.tokens_per_s:
        decode += f" at {stats.tokens_per_s:.1f} tokens/s"
    elif not stats.decoded_tokens:
        decode = "nothing generated"
    return (
        f"prompt {stats.prompt_tokens} tokens at {stats.prefill_tokens_per_s:.1f} tokens/s | {decode} | "
        f"density {100 * stats.density:.1f} % | peak memory {size(stats.peak_rss_bytes)}"
    ) + (f" and {size(stats.vram_bytes)} of the GPU's" if stats.vram_bytes else "")
