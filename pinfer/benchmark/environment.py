"""Under which conditions figures were made: software, commit, processor."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import pinfer
from pinfer.engine.hardware import cpu_name

ROOT = Path(pinfer.__file__).resolve().parent.parent


def environment() -> dict[str, str | None]:
    """Plain data for a report; `commit` is None where pinfer does not run from its own checkout."""
    return {
        "pinfer": pinfer.__version__,
        "commit": commit(ROOT),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "machine": platform.machine(),
    }


def commit(root: Path) -> str | None:
    """The commit checked out in `root`, read from its .git folder: git itself may be missing or refuse the owner."""
    git = root / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head or None
        name = head.removeprefix("ref: ")
        if (git / name).exists():
            return (git / name).read_text().strip() or None
        packed = (git / "packed-refs").read_text().splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
