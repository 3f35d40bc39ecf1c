"""The one error of every file reader."""

from __future__ import annotations


class FormatError(ValueError):
    """A file is not what it should be.

    The message starts with the file's path and names the key, tensor or byte offset at fault.
    """


def shown(text: str | bytes, limit: int = 80) -> str:
    """`text` from a file as a message may carry it: quoted, escaped, on one line and not too long."""
    quoted = ascii(text[:limit])
    return quoted if len(text) <= limit else f"{quoted}..."
