"""What a figure was measured on and with: GPU, driver, versions, commit, and a digest of the measured code."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton

ROOT = Path(__file__).parents[2]
MEASURED = ("pinfer/quant.py", "pinfer/kernels/**/*.py", "bench/gpu/*.py", "bench/baselines/*.py")
# How results are written down does not change them.
NOT_MEASURED = ("report.py", "verdict.py", "plot.py", "__main__.py")


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that two comparable figures share; results under another environment are measured anew."""
    commit = _output("git", "rev-parse", "HEAD")
    status = _output("git", "status", "--porcelain", "--", "pinfer", "bench/gpu", "bench/baselines")
    about = {
        "commit": commit,
        "dirty": None if status is None else bool(status),
        "code": code_digest(),
        "gpu": "none (interpreter)",
        "times_mean_nothing": device.type != "cuda",
        "driver": None,
        "max_clocks_mhz": None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": _nvidia_smi("driver_version"),
            "max_clocks_mhz": _nvidia_smi("clocks.max.sm,clocks.max.memory"),
        }
    return about


def clocks_now() -> str | None:
    """SM and memory clock in MHz, temperature and power draw as nvidia-smi reports them; None without it."""
    return _nvidia_smi("clocks.sm,clocks.memory,temperature.gpu,power.draw")


def slug(name: str) -> str:
    """A folder's name for a GPU: `NVIDIA H100 80GB HBM3` to `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def code_digest() -> str:
    """A digest of the files that decide a figure, so that a run of other code is not taken for this one's."""
    digest = hashlib.sha256()
    files = sorted({path for pattern in MEASURED for path in ROOT.glob(pattern) if path.name not in NOT_MEASURED})
    for path in files:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _nvidia_smi(fields: str) -> str | None:
    """What nvidia-smi says of this process's GPU, found by its UUID: numbers change with CUDA_VISIBLE_DEVICES."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None) if torch.cuda.is_available() else None
    if uuid is None:
        return None
    lines = _output("nvidia-smi", "-i", f"GPU-{uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    return lines.splitlines()[0] if lines else None


def _output(*command: str) -> str | None:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
