"""Chats as the texts and the token ids that a model expects.

A chat template turns messages into one text. What users wrote in it never becomes a control
token, even where it spells one: see marks.py for how the two are told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pinfer.chat.messages import ROLES, read_messages, read_plain, texts_in
from pinfer.chat.process import SHARED
from pinfer.chat.templates import find_template
from pinfer.formats.tokenizer import Tokenizer


class Piece(NamedTuple):
    """A stretch of a rendered chat: one control token that the template wrote, or text that holds none."""

    text: str
    control: bool


@dataclass(frozen=True)
class Rendered:
    """A chat as its template writes it, in pieces; two of text never follow each other."""

    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    named_tokens: Mapping[str, str] | None = None,
    control_tokens: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Rendered:
    """Render `template` in a process of its own, with limits of time, memory and size.

    messages:       mappings with role and content, as in OpenAI's interface (see `read_messages`).
    tools:          schemas of functions that the template may show.
    named_tokens:   what `bos_token`, `eos_token` and so on stand for.
    control_tokens: texts that are control tokens of the model where the template writes them.
    options:        further variables, such as enable_thinking.

    Raises ValueError naming the message and field for malformed messages, ChatTemplateError for a
    template that fails, refuses the messages or goes over a limit.
    """
    if not isinstance(template, str):
        raise ValueError(f"the chat template is {type(template).__name__}, not a text")
    named = {name: str(text) for name, text in (named_tokens or {}).items()}
    variables = {
        "messages": read_messages(messages),
        "tools": None if tools is None else read_plain(list(tools), "tools"),
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **read_plain(dict(options or {}), "options"),
    }
    said = list(texts_in(variables))
    tokens = [token for token in set(control_tokens) if _may_write(template, token) or token in named.values()]
    request = {
        "template": template,
        "variables": variables,
        "named": named,
        "roles": list(ROLES),
        "tokens": sorted(tokens),
        "said": sorted(token for token in tokens if any(token in text for text in said)),
    }
    return Rendered(tuple(Piece(text, control) for text, control in SHARED.ask(request)))


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    options: Mapping[str, Any] | None = None,
) -> list[int]:
    """The ids of a chat by `template`, or by the model's own, or by one that suits its vocabulary.

    Begins with one BOS token if the model asks for one, whether the template writes it or not.
    Errors are those of `render`.
    """
    rendered = render(
        find_template(tokenizer, with_tools=tools is not None) if template is None else template,
        messages,
        tools=tools,
        add_generation_prompt=add_generation_prompt,
        named_tokens=tokenizer.named_tokens,
        control_tokens=tokenizer.control_tokens,
        options=options,
    )
    return encode_rendered(tokenizer, rendered)


def encode_rendered(tokenizer: Tokenizer, rendered: Rendered) -> list[int]:
    """The ids of a rendered chat, with one BOS token in front if the model asks for one."""
    ids = tokenizer.encode_pieces(rendered.pieces)
    if tokenizer.add_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
        return [tokenizer.bos_id, *ids]
    return ids


def _may_write(template: str, token: str) -> bool:
    """Whether a template's literals can make up a control token, whole or around a role."""
    if token in template:
        return True
    halves = [token.split(role) for role in ROLES if token.count(role) == 1]
    return any(all(half and half in template for half in pair) for pair in halves)
