"""JSON files from elsewhere: read within limits, and asked for values by key and type."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pinfer.formats.errors import POINTER, FormatError, is_pointer, shown


class Node:
    """A JSON value with its place (file and key), which every error names.

    A key that is missing and one whose value is null are the same here, as they are to the
    libraries that write these files.
    """

    def __init__(self, value: Any, where: str) -> None:
        self.value = value
        self.where = where

    @classmethod
    def read(cls, path: Path, limit_bytes: int) -> Node:
        """The object in a file; FormatError for anything else, OSError where the file cannot be read."""
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
        if len(data) > limit_bytes:
            raise FormatError(f"{path}: has more than {limit_bytes} bytes")
        if is_pointer(data):
            raise FormatError(f"{path}: {POINTER}")
        try:
            value = json.loads(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None
        except RecursionError:
            raise FormatError(f"{path}: nested too deeply") from None
        except ValueError as error:
            raise FormatError(f"{path}: not JSON: {shown(str(error))}") from None
        if not isinstance(value, dict):
            raise FormatError(f"{path}: not an object but {type(value).__name__}")
        return cls(value, f"{path}:")

    def fault(self, what: str) -> FormatError:
        return FormatError(f"{self.where} {what}")

    def at(self, key: str) -> Node:
        """The value under `key` of an object, a node with None where there is none."""
        if not isinstance(self.value, (dict, type(None))):
            raise self.fault(f"is {shown(repr(self.value))}, not an object")
        name = key if key.isidentifier() else shown(key)
        return Node((self.value or {}).get(key), f"{self.where}{' ' if self.where.endswith(':') else '.'}{name}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value under `key`, of type `kind` (an int is no bool), or `default` where there is none."""
        return self.at(key).as_(kind, default)

    def as_(self, kind: type, default: Any = None) -> Any:
        if self.value is None:
            return default
        if not isinstance(self.value, kind) or isinstance(self.value, bool) != (kind is bool):
            raise self.fault(f"is {shown(repr(self.value))}, not of type {kind.__name__}")
        if isinstance(self.value, str):
            self.check_text(self.value)
        return self.value

    def check_text(self, text: str) -> None:
        """FormatError for lone surrogates, which JSON can spell and UTF-8 cannot."""
        if not _is_unicode(text):
            raise self.fault(f"holds text that is not valid Unicode: {shown(text)}")

    def items(self) -> Iterator[Node]:
        """The items of a list; none where it is missing."""
        for index, value in enumerate(self.as_(list, [])):
            yield Node(value, f"{self.where}[{index}]")

    def fields(self) -> Iterator[tuple[str, Node]]:
        """The keys and values of an object; none where it is missing."""
        for key in self.as_(dict, {}):
            yield key, self.at(key)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
