"""Loads the C++ core: the library that a wheel carries, else one compiled at first use.

That one is cached under the user's cache folder by its sources, flags, instruction sets and compiler,
so that an edit rebuilds it. Where no compiler exists the ops fall back to the torch reference, and
`core_problem()` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
from pathlib import Path

from pinfer.kernels.cpp.compile import CompileError, cached_library, levels_to_build, packaged_library
from pinfer.kernels.registry import BackendUnavailable


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


def forget_core() -> None:
    """Look for the library anew at the next use; for tests that change what it is built from."""
    load_core.cache_clear()
    _try_load.cache_clear()


@functools.cache
def _try_load() -> ctypes.CDLL | CoreError:
    if os.environ.get("PINFER_NO_CORE"):
        return CoreError("the C++ core is switched off by PINFER_NO_CORE")
    try:
        core = _packaged() or ctypes.CDLL(str(cached_library(cache_folder(), levels_to_build())))
    except CompileError as error:
        return CoreError(str(error))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return CoreError(f"the C++ core cannot be built: {error}")
    _declare(core)
    if core.pinfer_instruction_set() is None:
        return CoreError("the C++ core was compiled for another processor; PINFER_ALL_SETS=1 compiles it for any")
    return core


def _packaged() -> ctypes.CDLL | None:
    """The library that a wheel carries, if it is of these sources and this system can load it."""
    path = packaged_library()
    if path.exists():
        # Torch's own OpenMP runtime is already in the process; ours resolves to the same one by name.
        with contextlib.suppress(OSError):  # made for another C library
            return ctypes.CDLL(str(path))
    return None


def _declare(core: ctypes.CDLL) -> None:
    """The signatures of the functions that core.cpp exports."""
    integers = ctypes.POINTER(ctypes.c_int32)
    signatures = {
        "pinfer_run": (ctypes.c_int32, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)),
        "pinfer_worker_new": (
            ctypes.c_void_p,
            (ctypes.c_int32, integers, ctypes.c_int32, ctypes.c_int32, ctypes.c_int64, ctypes.c_double),
        ),
        "pinfer_worker_settled": (ctypes.c_int32, (ctypes.c_void_p,)),
        "pinfer_worker_stop": (ctypes.c_int32, (ctypes.c_void_p,)),
        "pinfer_worker_free": (None, (ctypes.c_void_p,)),
        "pinfer_submit": (ctypes.c_int32, (ctypes.c_void_p,)),
        "pinfer_wait": (ctypes.c_int32, (ctypes.c_void_p,)),
        "pinfer_run_job": (None, (ctypes.c_void_p,)),
        "pinfer_node_of": (ctypes.c_int32, (ctypes.c_void_p,)),
        "pinfer_knows_type": (ctypes.c_int32, (ctypes.c_int32,)),
        "pinfer_scratch": (ctypes.c_int64, (ctypes.c_int64, ctypes.c_int64)),
        "pinfer_use": (ctypes.c_int32, (ctypes.c_char_p,)),
        "pinfer_instruction_set": (ctypes.c_char_p, ()),
        "pinfer_read": (ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32)),
        "pinfer_pin": (ctypes.c_int32, (integers, ctypes.c_int32)),
        "pinfer_memory": (ctypes.c_int32, (ctypes.c_int32, integers, ctypes.c_int32, ctypes.c_int32)),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(core, name)
        function.restype, function.argtypes = result, arguments


def cache_folder() -> Path:
    """Where compiled code is kept: $PINFER_CACHE, else the XDG cache folder."""
    if own := os.environ.get("PINFER_CACHE"):
        return Path(own).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative and empty values ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "pinfer"
