"""What commands read and print: text to stdout, everything else to stderr, colours only on a terminal."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

MAX_PROMPT_BYTES = 64 * 2**20


def note(text: str) -> None:
    """A remark for the user, on stderr."""
    print(f"pinfer: {text}", file=sys.stderr, flush=True)


def emit_json(values: dict[str, Any]) -> None:
    """One JSON object on one line of stdout; numbers that are not finite become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    print(json.dumps(finite, ensure_ascii=False, allow_nan=False), flush=True)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Let the command line say it, instead of exiting in silence."""
        raise BrokenPipeError


def console() -> Console:
    """A rich console on stdout; it drops colours by itself where that is no terminal."""
    return _Console(file=sys.stdout, highlight=False, soft_wrap=True)


def read_prompt(prompt: str | None, file: str | None) -> str | None:
    """The text of -p or -f, or of piped standard input; None where there is none of them.

    ValueError for both at once, for a file that is not UTF-8, or for one above 64 MiB.
    """
    if prompt is not None and file is not None:
        raise ValueError("give the prompt with -p or with -f, not both")
    if prompt is not None:
        return prompt
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        return None
    if file in (None, "-"):
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        name, data = "standard input", sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
    else:
        name = file
        with Path(file).open("rb") as handle:
            data = handle.read(MAX_PROMPT_BYTES + 1)
    if len(data) > MAX_PROMPT_BYTES:
        raise ValueError(f"{name}: a prompt may have at most {MAX_PROMPT_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8 at byte {error.start}") from error


def printable(text: str) -> Text:
    """Text from a file, safe to print: no markup, and control characters spelled out."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def size(n_bytes: float) -> str:
    """Bytes in decimal units (GB = 10^9 bytes)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"
