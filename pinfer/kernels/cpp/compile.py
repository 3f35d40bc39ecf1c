"""Compiles the C++ core: the compiler, its flags, the instruction sets, and what a library was made from.

Needs the standard library alone: setup.py loads this file by its path, where torch is not installed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-Wno-psabi")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")), "-mprefer-vector-width=512")
# The instruction sets that kernels.cpp is compiled for, the narrowest first: its PINFER_LEVEL and the
# compiler's flags.
_X86 = platform.machine() in ("x86_64", "AMD64")
# On x86, -O3 takes three times as long over the portable set, which few processors need there.
LEVELS: dict[str, tuple[int, tuple[str, ...]]] = {"portable": (0, ("-O2",) if _X86 else ())} | (
    {"avx2": (2, _AVX2), "avx512": (512, (*_AVX2, *_AVX512))} if _X86 else {}
)
# What each asks of a processor, in the words of /proc/cpuinfo; core.cpp asks the processor itself.
_NEEDS = {"portable": set[str](), "avx2": {"avx2", "fma", "f16c"}}
_NEEDS["avx512"] = _NEEDS["avx2"] | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
BUILD_TIMEOUT_S = 300


class CompileError(RuntimeError):
    """There is no compiler, or it cannot compile the core; the message says what to install."""


def find_compiler() -> list[str]:
    """The command of a C++ compiler: what CXX names, else g++ or clang++; CompileError without one."""
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise CompileError(f"no C++ compiler found at {named[0]}, which CXX names")
        return named
    found = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if found is None:
        raise CompileError("no C++ compiler found (g++ or clang++, or name one in CXX)")
    return [found]


def levels_of(cpuinfo: str) -> tuple[str, ...]:
    """The set worth compiling for the processor that /proc/cpuinfo describes, its widest; all where the text says nothing."""
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), None)
    if line is None:
        return tuple(LEVELS)
    has = set(line.partition(":")[2].split())
    return ([name for name in LEVELS if _NEEDS[name] <= has][-1],)


def levels_to_build() -> tuple[str, ...]:
    """The sets that a first use compiles here: this processor's widest, or all where PINFER_ALL_SETS is set."""
    if os.environ.get("PINFER_ALL_SETS"):
        return tuple(LEVELS)
    try:
        return levels_of(Path("/proc/cpuinfo").read_text())
    except OSError:
        return tuple(LEVELS)


def source_fingerprint(folder: Path = FOLDER) -> str:
    """Sixteen hex digits that change with any source, header or flag."""
    digest = hashlib.sha256(repr((FLAGS, LEVELS)).encode())
    for path in sorted((*folder.glob("*.h"), *folder.glob("*.cpp"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def packaged_library(folder: Path = FOLDER) -> Path:
    """Where a wheel carries the library of these very sources; nothing need be there."""
    return folder / f"_core-{source_fingerprint(folder)}.so"


def cached_library(cache: Path, levels: Sequence[str], folder: Path = FOLDER) -> Path:
    """The library of `folder` in `cache`, compiled there unless it is. CompileError, OSError, subprocess.SubprocessError.

    Its name goes by the sets and not by the processor: core.cpp picks among them when it is loaded.
    """
    compiler = find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=30).stdout
    parts = (source_fingerprint(folder), tuple(levels), compiler, version, sys.platform, platform.machine())
    library = cache / f"core-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.so"
    if not library.exists():
        build_library(compiler, library, levels, folder)
    return library


def build_library(
    compiler: Sequence[str], library: Path, levels: Iterable[str] = LEVELS, folder: Path = FOLDER
) -> None:
    """Compile the core of `folder` for some instruction sets as `library`, which is never seen half-written."""
    library.parent.mkdir(parents=True, exist_ok=True)
    # Two processes that build at once each have a folder; the later one replaces an equal library.
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="building-") as temporary:
        made = Path(temporary) / library.name
        objects = compile_objects(compiler, Path(temporary), levels, folder)
        call(compiler, ("-shared", "-fopenmp", *map(str, objects), "-o", str(made)))
        with open(made, "rb") as built:
            os.fsync(built.fileno())  # a crash must not leave a short library under the final name
        os.replace(made, library)


def compile_objects(
    compiler: Sequence[str], into: Path, levels: Iterable[str], folder: Path = FOLDER, extra: Sequence[str] = ()
) -> list[Path]:
    """The objects in the order they must be linked in: core, then the sets, the narrowest first.

    Inline functions that several objects hold resolve to the first one's: code for any processor.
    """
    chosen = [name for name in LEVELS if name in set(levels)]
    jobs = {"core": (*(f"-DPINFER_HAS_{name.upper()}" for name in chosen), "-c", str(folder / "core.cpp"))}
    for name in chosen:
        level, flags = LEVELS[name]
        defines = (f"-DPINFER_LEVEL={level}", f"-DPINFER_NAMESPACE={name}")
        jobs[name] = (*flags, *defines, "-c", str(folder / "kernels.cpp"))
    objects = {name: into / f"{name}.o" for name in jobs}
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        # The widest set takes longest, so it starts first.
        for _ in pool.map(
            lambda name: call(compiler, (*FLAGS, *jobs[name], *extra, "-o", str(objects[name]))), reversed(jobs)
        ):
            pass
    return list(objects.values())


def call(compiler: Sequence[str], arguments: Sequence[str]) -> None:
    """Run the compiler; CompileError carries its first complaint."""
    result = subprocess.run([*compiler, *arguments], capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
    if result.returncode:
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr[:200])
        raise CompileError(f"{shlex.join(compiler)} cannot compile the C++ core: {first.strip()}")
