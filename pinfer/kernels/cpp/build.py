"""Compiles and loads the C++ core at first use.

The library is cached under the user's cache folder by a hash of its sources, flags, compiler and
processor, so that an edit rebuilds it and two machines never share one. Where no compiler exists
the ops fall back to the torch reference, and `core_problem()` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pinfer.kernels.registry import BackendUnavailable

SOURCES = ("core.cpp", "blocks.h")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-march=native", "-ffp-contract=fast", "-fno-math-errno")
BUILD_TIMEOUT_S = 300


class CoreError(BackendUnavailable):
    """The C++ core cannot be compiled or loaded; the message says what to install."""


@functools.cache
def load_core() -> ctypes.CDLL:
    """The compiled library, built if need be; CoreError says why it cannot be had."""
    outcome = _try_load()
    if isinstance(outcome, CoreError):
        raise outcome
    return outcome


def core_available() -> bool:
    return not isinstance(_try_load(), CoreError)


def core_problem() -> str | None:
    """Why the core is missing, or None."""
    outcome = _try_load()
    return str(outcome) if isinstance(outcome, CoreError) else None


@functools.cache
def _try_load() -> ctypes.CDLL | CoreError:
    if os.environ.get("PINFER_NO_CORE"):
        return CoreError("the C++ core is switched off by PINFER_NO_CORE")
    try:
        # torch's own OpenMP runtime is already in the process; ours resolves to the same one by name.
        core = ctypes.CDLL(str(_build()))
    except CoreError as error:
        return error
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return CoreError(f"the C++ core cannot be built: {error}")
    core.pinfer_select_active.restype = ctypes.c_int64
    return core


def cache_folder() -> Path:
    """Where compiled code is kept: $PINFER_CACHE, else the XDG cache folder."""
    if own := os.environ.get("PINFER_CACHE"):
        return Path(own).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative and empty values ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "pinfer"


def _build() -> Path:
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [found for name in ("g++", "clang++") if (found := shutil.which(name))][:1]
    )
    if not compiler:
        raise CoreError("no C++ compiler found (g++ or clang++, or name one in CXX)")
    folder = Path(__file__).parent
    if shutil.which(compiler[0]) is None:
        raise CoreError(f"no C++ compiler found at {compiler[0]}, which CXX names")
    library = cache_folder() / f"core-{_fingerprint(compiler, folder)}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        _compile(compiler, folder, library)
    return library


def _fingerprint(compiler: list[str], folder: Path) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((folder / name).read_bytes())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    digest.update(repr((FLAGS, compiler, version, _cpu(), torch.__version__, sys.platform)).encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """The instruction sets of this processor, which -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(
        next((line for line in lines if line.startswith(key)), "") for key in ("model name", "flags", "Features")
    )


def _compile(compiler: list[str], folder: Path, library: Path) -> None:
    handle, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        command = [*compiler, *FLAGS, "-shared", str(folder / "core.cpp"), "-o", unfinished]
        result = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
            raise CoreError(f"{shlex.join(compiler)} cannot compile the C++ core: {first.strip()}")
        with open(unfinished, "rb") as built:
            os.fsync(built.fileno())  # a crash must not leave a short library under the final name
        os.replace(unfinished, library)
    finally:
        Path(unfinished).unlink(missing_ok=True)
