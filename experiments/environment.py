"""Under which conditions a figure was made: commit, software, machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import pinfer
from pinfer.engine.hardware import cpu_name

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, Any]:
    """Plain data for a record; `commit` is None outside a git checkout."""
    return {
        "pinfer": pinfer.__version__,
        "commit": _git("rev-parse", "--verify", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
        "machine": platform.machine(),
    }


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() or None
