"""Compiles the C++ core with sanitizers beside fuzz_core.cpp, and runs that: `make sanitize`.

  python tests/fuzz/sanitize.py [address|pages|thread] [--programs N] [--seed N]

`address` watches for memory errors and undefined behaviour, `thread` for data races; `pages` runs the
core as it is compiled for use, in buffers that end at guarded pages. Needs a compiler alone. Exits with the fuzzer's code: not 0 where something was found.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "pinfer/kernels/cpp"
COMMON = ("-O1", "-g", "-fno-omit-frame-pointer")
SANITIZERS = {
    "address": (*COMMON, "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "pages": ("-DFUZZ_GUARD_PAGES",),
    "thread": (*COMMON, "-fsanitize=thread", "-DFUZZ_OWN_THREADS"),
}


def load_compile() -> Any:
    """compile.py by its path: importing the package would want torch."""
    spec = importlib.util.spec_from_file_location("pinfer_compile", CORE / "compile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(sanitizer: str, into: Path, folder: Path = CORE) -> Path:
    """The fuzzer with the core of `folder`; CompileError if that fails."""
    core, program = load_compile(), into / f"fuzz-{sanitizer}"
    compiler, extra = core.find_compiler(), SANITIZERS[sanitizer]
    objects = core.compile_objects(compiler, into, core.LEVELS, folder, extra)
    flags = ("-std=c++17", "-fopenmp", *extra, "-pthread", "-I", str(folder))
    core.call(compiler, (*flags, str(HERE / "fuzz_core.cpp"), *map(str, objects), "-o", str(program)))
    return program


def command(sanitizer: str, program: Path, arguments: list[str]) -> list[str]:
    # ThreadSanitizer of older compilers dies where the kernel scatters addresses widely.
    fixed = ["setarch", platform.machine(), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    return [*fixed, str(program), *arguments]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sanitizer", nargs="?", default="address", choices=SANITIZERS)
    parser.add_argument("--programs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        program = build(wanted.sanitizer, Path(temporary))
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
        arguments = [str(wanted.programs), str(wanted.seed)]
        return subprocess.run(command(wanted.sanitizer, program, arguments), env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
