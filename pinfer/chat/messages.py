"""Messages of a chat as callers give them: checked, and made what templates expect."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pinfer.formats.errors import shown

# Roles that templates know. A control token may be built around one of these alone.
ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "model", "observation")
_DEPTH = 32


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages, with parts of text joined to one text.

    A message is a mapping with `role` (a text) and `content`: a text, a list of {"type": "text",
    "text": …}, or None where there are `tool_calls`. Whatever else it has is passed on, if it is
    plain data. Arguments of tool calls may be a text of JSON. Raises ValueError naming the message and the field.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise ValueError(f"messages is {shown(repr(messages))}, not a list")
    if not messages:
        raise ValueError("messages is empty: a chat needs at least one message")
    return [_read_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def read_plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of plain data: texts, numbers, booleans, None, lists and mappings with texts as keys."""
    if depth > _DEPTH:
        raise ValueError(f"{where} is nested more than {_DEPTH} deep")
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str):
        return _read_text(value, where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {shown(repr(key))}, not a text")
        return {_read_text(key, where): read_plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [read_plain(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value)]
    raise ValueError(f"{where} is {shown(repr(value))}, which is no plain data")


def texts_in(value: Any) -> Iterator[str]:
    """Every text in plain data, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)


def _read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {shown(repr(message))}, not an object")
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(f"{where}.role is {shown(repr(message.get('role')))}, not a text such as 'user'")
    read = read_plain(message, where)
    calls = read.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise ValueError(f"{where}.tool_calls is {shown(repr(calls))}, not a list of objects")
    for call in calls or []:
        _read_arguments(call.get("function", call))
    content = read.get("content")
    if isinstance(content, list):
        read["content"] = "\n".join(_read_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None and calls:
        read["content"] = ""
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content is {shown(repr(content))}, not a text")
    return read


def _read_arguments(function: Any) -> None:
    """Arguments that are an object written as text, as in OpenAI's interface, become the object that templates expect."""
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        with contextlib.suppress(ValueError, RecursionError):
            arguments = json.loads(function["arguments"])
            if isinstance(arguments, dict):
                function["arguments"] = read_plain(arguments, "arguments")


def _read_part(part: Any, where: str) -> str:
    if not isinstance(part, dict):
        raise ValueError(f"{where} is {shown(repr(part))}, not an object")
    if part.get("type") != "text":
        raise ValueError(f"{where}.type is {shown(repr(part.get('type')))}; only 'text' is supported")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{where}.text is {shown(repr(part.get('text')))}, not a text")
    return part["text"]


def _read_text(text: str, where: str) -> str:
    """ValueError for a lone surrogate: no UTF-8 carries it, and marks of control tokens are such."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"{where} holds the lone surrogate U+{code:04X} at index {error.start}; it is not Unicode"
        ) from None
    return str(text)
