"""The one error of every file reader."""

from __future__ import annotations


class FormatError(ValueError):
    """A file is not what it should be.

    The message starts with the file's path and names the key, tensor or byte offset at fault.
    """


def is_pointer(start: bytes) -> bool:
    """Whether a file that starts so is what Git LFS leaves where the file itself was not fetched."""
    return start.startswith(b"version https://git-lfs.github.com/")


POINTER = "this is Git LFS's pointer to the file, not the file; git lfs pull fetches it"


def shown(text: str | bytes, limit: int = 80) -> str:
    """`text` from a file as a message may carry it: quoted, escaped, on one line and not too long."""
    quoted = ascii(text[:limit])
    return quoted if len(text) <= limit else f"{quoted}..."
