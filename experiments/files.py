"""Atomic writes: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pinfer.files import write_atomically


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8."""
    write_atomically(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=1) + "\n")
