"""Compiles a Build for a GPU generation without a device; needs a process in which Triton does not interpret.

sm_80, sm_86 and sm_89 get the same PTX from Triton, so the three share one pass through its front end
and LLVM (0.15 s of a build's 0.2 s); `ptxas`, which allocates registers, runs for each. The test
holds one build of every op against Triton's own compilation for sm_86 and sm_89, byte for byte.
"""

from __future__ import annotations

import importlib
import inspect
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from pinfer.kernels.aot import Build, interpreting
from pinfer.kernels.compiled.instructions import Instruction, parse_sass
from pinfer.kernels.registry import Op

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SAME_PTX = ("sm_80", "sm_86", "sm_89")
_NVDISASM_NAMES = {"sm_80": "SM80", "sm_86": "SM86", "sm_89": "SM89", "sm_90": "SM90a"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Artifact:
    """What the compiler left of one build for one target.

    shared_bytes: dynamic shared memory that Triton asks for at launch.
    cubin:        NVIDIA's machine code, an ELF file; empty for AMD.
    assembly:     AMD's assembly with its metadata; empty for NVIDIA.
    """

    target: str
    num_warps: int
    shared_bytes: int
    cubin: bytes = b""
    assembly: str = ""


def builds_of(op: Op) -> list[Build]:
    """What an op's Triton module asks to be compiled; nothing for an op that leaves GPUs to torch."""
    return [] if op.triton is None else importlib.import_module(op.triton.split(":")[0]).builds()


def source_of(build: Build, *, aligned: bool = True) -> ASTSource:
    """Triton's compilation unit, specialised as its JIT would: pointers, and integers that the build names,
    are multiples of 16. `aligned=False` leaves that out, and with it every 16-byte load.

    ValueError if the build names a parameter that the kernel lacks, or leaves one out.
    """
    names = build.kernel.arg_names
    defaults = inspect.signature(build.kernel.fn).parameters
    constants = {n: defaults[n].default for n in names if defaults[n].default is not inspect.Parameter.empty}
    constants = {n: v for n, v in constants.items() if n not in build.arguments} | dict(build.constants)
    unknown = {*build.arguments, *build.constants, *build.multiples_of_16} - set(names)
    missing = set(names) - {*build.arguments, *constants}
    if unknown or missing:
        raise ValueError(f"build {build.label!r}: no such parameter {sorted(unknown)}, no value for {sorted(missing)}")
    signature = {name: build.arguments.get(name, "constexpr") for name in names}
    sixteens = {name for name, kind in build.arguments.items() if kind.startswith("*")} | set(build.multiples_of_16)
    attributes = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if aligned and name in sixteens}
    return ASTSource(build.kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)


def warps_on(build: Build, target: str) -> int:
    """The build's warps, fewer where they have 64 lanes and the build says so."""
    if TARGETS[target].warp_size == 32 or build.warps_of_64 is None:
        return build.num_warps
    return build.warps_of_64


def compile_build(build: Build, target: str, *, aligned: bool = True, **options: Any) -> Any:
    """Triton's CompiledKernel for a target of TARGETS; more options (`maxnreg`) go to its backend.

    RuntimeError where Triton interprets; Triton's own errors where the kernel does not compile.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets in this process and compiles nothing")
    options = {"num_warps": warps_on(build, target), "num_stages": build.num_stages, **options}
    return triton.compile(source_of(build, aligned=aligned), target=TARGETS[target], options=options)


def artifact_of(build: Build, target: str, **options: Any) -> Artifact:
    """Compile one build for one target; see `compile_build`."""
    return _artifact(build, target, compile_build(build, target, **options))


def artifacts_of(build: Build, targets: Iterator[str] | list[str]) -> Iterator[Artifact | tuple[str, Exception]]:
    """Compile one build for several targets; what fails is given as (target, its error)."""
    shared: Any = None
    for target in targets:
        try:
            if target in SAME_PTX and shared is not None:
                cubin = assemble(shared.asm["ptx"], build, target)
                yield Artifact(target, build.num_warps, shared.metadata.shared, cubin)
                continue
            compiled = compile_build(build, target)
            shared = compiled if target in SAME_PTX else shared
            yield _artifact(build, target, compiled)
        except Exception as error:  # a kernel that does not compile must not hide the others
            yield target, error


def assemble(ptx: str, build: Build, target: str) -> bytes:
    """Run Triton's `ptxas` step on PTX of another target of SAME_PTX."""
    backend = make_backend(TARGETS[target])
    options = backend.parse_options({"num_warps": build.num_warps, "num_stages": build.num_stages})
    ptx = re.sub(r"\.target sm_\w+", f".target {target}", ptx, count=1)
    return backend.make_cubin(ptx, {}, options, TARGETS[target].arch)


def _artifact(build: Build, target: str, compiled: Any) -> Artifact:
    if TARGETS[target].backend == "cuda":
        return Artifact(target, build.num_warps, compiled.metadata.shared, cubin=compiled.asm["cubin"])
    return Artifact(target, warps_on(build, target), compiled.metadata.shared, assembly=compiled.asm["amdgcn"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK (bytes of a thread), SHARED (static bytes of a CTA) and more, as `cuobjdump` reads them."""
    with file_of(cubin) as path:
        text = run_tool("cuobjdump", "-res-usage", path)
    usage = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", text.split("Function", 1)[-1])}
    if not {"REG", "STACK", "SHARED"} <= set(usage):
        raise RuntimeError(f"cuobjdump reports no resource usage: {text}")
    return usage


def disassemble(target: str, cubins: list[bytes]) -> list[list[Instruction]]:
    """The instructions of every cubin's kernel, by one run of `nvdisasm`.

    It takes 0.25 s to start (0.35 s for sm_90) and 2 ms a kernel, so the code of all of them is
    read as one raw image. The opcodes are those of a run per file.
    """
    codes = [kernel_code(cubin) for cubin in cubins]
    with file_of(b"".join(codes)) as path:
        listing = parse_sass(run_tool("nvdisasm", "-b", _NVDISASM_NAMES[target], path)) if codes else []
    if len(listing) * 16 != sum(map(len, codes)):
        raise RuntimeError(f"nvdisasm listed {len(listing)} instructions in {sum(map(len, codes))} bytes of {target}")
    starts = iter(listing)
    return [[next(starts) for _ in range(len(code) // 16)] for code in codes]


def kernel_code(cubin: bytes) -> bytes:
    """The one kernel's machine code: section `.text.<kernel>` of the ELF file, 16 bytes an instruction."""
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    entry_bytes, n_sections, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + at * entry_bytes) for at in range(n_sections)]
    names = sections[names_at][4]
    codes = [
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in sections
        if cubin.startswith(b".text.", names + name)
    ]
    if len(codes) != 1:
        raise RuntimeError(f"a cubin with {len(codes)} kernels, expected 1")
    return codes[0]


@cache
def ptxas_version() -> str:
    """As in `V12.8.93`."""
    found = re.search(r"V[\d.]+", run_tool("ptxas", "--version"))
    return found[0] if found else "unknown"


@contextmanager
def file_of(content: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        yield file.name


def run_tool(tool: str, *arguments: str) -> str:
    run = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{tool} failed: {(run.stderr or run.stdout).strip()}")
    return run.stdout
