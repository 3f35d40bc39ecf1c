"""Compiles the Triton kernels of every op for a real target without a device; run by test_aot.py.

Triton decides at import whether it interprets, so this needs a process without TRITON_INTERPRET.
Prints one JSON object a line: op, kernel, target, and whether the code spills registers.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pinfer.kernels import ops
from pinfer.kernels.aot import Build
from pinfer.kernels.registry import Op

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_for(build: Build, target: GPUTarget, **options: Any) -> Any:
    names = build.kernel.arg_names
    signature = {name: build.arguments.get(name, "constexpr") for name in names}
    source = ASTSource(build.kernel, signature, {(names.index(n),): value for n, value in build.constants.items()}, {})
    return triton.compile(source, target=target, options={"num_warps": build.num_warps, **options})


def spills(compiled: Any, target: GPUTarget) -> bool:
    """Whether registers go to memory: a stack frame in NVIDIA's cubin, scratch stores in AMD's assembly."""
    if target.backend != "cuda":
        return "scratch_store" in compiled.asm["amdgcn"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    stack = re.findall(r"STACK:(\d+)", usage)
    if not stack:
        raise RuntimeError(f"cuobjdump reports no stack usage: {usage}")
    return any(int(n_bytes) for n_bytes in stack)


def report(op: str, label: str, target: str, spilled: bool) -> None:
    print(json.dumps({"op": op, "kernel": label, "target": target, "spills": spilled}), flush=True)


def main(target_name: str) -> None:
    target = TARGETS[target_name]
    for op in ops.OPS:
        for build in builds_of(op):
            report(op.name, build.label, target_name, spills(compile_for(build, target), target))
    if target.backend == "cuda":  # a large kernel again, starved of registers: it must be seen to spill
        control = builds_of(ops.sparse_ffn)[-1]
        report("control", control.label, target_name, spills(compile_for(control, target, maxnreg=24), target))


def builds_of(op: Op) -> list[Build]:
    """What an op's Triton module asks to be compiled; nothing for an op that leaves GPUs to torch."""
    return [] if op.triton is None else importlib.import_module(op.triton.split(":")[0]).builds()


if __name__ == "__main__":
    main(sys.argv[1])
