"""Compiles Triton kernels for real targets without a device; run by test_aot.py in a process of its own.

Triton decides at import whether it interprets, so this cannot share a process with the other tests.
Prints one JSON object a line: kernel, target, and whether the code spills registers.
"""

from __future__ import annotations

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

from pinfer.kernels.dequantize.gpu import _dequantize_kernel
from pinfer.kernels.quant_matmul.gpu import BLOCK_K, BLOCK_N, _quant_matmul_kernel
from pinfer.kernels.select_active.gpu import _select_active_kernel
from pinfer.kernels.sparse_ffn.gpu import _combine_kernel, _sparse_ffn_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BYTES, FLOATS, INTS = "*u8", "*fp32", "*i32"

SPARSE_FFN = {
    **dict.fromkeys(("x_ptr", "gate_values_ptr", "partial_ptr"), FLOATS),
    **dict.fromkeys(("gate_ptr", "up_ptr", "down_ptr", "mask_ptr"), BYTES),
    **dict.fromkeys(("indices_ptr", "count_ptr"), INTS),
    **dict.fromkeys(("gate_stride", "up_stride", "down_stride"), "i64"),
    **dict.fromkeys(("tokens", "neurons", "width"), "i32"),
}
SELECT_ACTIVE = {
    "scores_ptr": FLOATS, "threshold_ptr": FLOATS, "threshold_stride": "i32", "indices_ptr": INTS, "count_ptr": INTS,
    "tokens": "i32", "neurons": "i32",
}  # fmt: skip


def jobs() -> list[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """(label, kernel, argument types, constants, warps) of everything to compile."""
    listed: list[tuple[str, Any, dict[str, str], dict[str, Any], int]] = [
        ("select_active", _select_active_kernel, SELECT_ACTIVE, {"BLOCK_N": 2048}, 4),
        ("combine", _combine_kernel, {"partial_ptr": FLOATS, "out_ptr": FLOATS, "programs": "i32", "size": "i32"}, {"BLOCK": 1024}, 4),
    ]  # fmt: skip
    for kind in TYPES:
        matmul = {
            "x_ptr": FLOATS,
            "blocks_ptr": BYTES,
            "row_stride": "i64",
            "out_ptr": FLOATS,
            "rows": "i32",
            "columns": "i32",
        }
        expand = {"blocks_ptr": BYTES, "row_stride": "i64", "out_ptr": FLOATS, "columns": "i32"}
        sparse = {"ACTIVATION": "silu", "GATE_TYPE": kind, "UP_TYPE": kind, "DOWN_TYPE": kind, "HAS_UP": True,
                  "HAS_MASK": False, "HAS_GATE_VALUES": False, "BLOCK_D": 4096}  # fmt: skip
        listed += [
            (f"dequantize {kind}", _dequantize_kernel, expand, {"TYPE": kind, "BLOCK_K": 1024}, 4),
            (
                f"quant_matmul {kind}",
                _quant_matmul_kernel,
                matmul,
                {"TYPE": kind, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K},
                4,
            ),
            (f"sparse_ffn {kind}", _sparse_ffn_kernel, SPARSE_FFN, sparse, 8),
        ]
    return listed


def compile_for(
    kernel: Any, arguments: dict[str, str], constants: dict[str, Any], warps: int, target: GPUTarget, **options: Any
) -> Any:
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, {})
    return triton.compile(source, target=target, options={"num_warps": warps, **options})


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


def main(target_name: str) -> None:
    target = TARGETS[target_name]
    for label, kernel, arguments, constants, warps in jobs():
        compiled = compile_for(kernel, arguments, constants, warps, target)
        print(json.dumps({"kernel": label, "target": target_name, "spills": spills(compiled, target)}))
    if target_name.startswith("sm_"):
        label, kernel, arguments, constants, warps = next(job for job in jobs() if job[0] == "sparse_ffn Q4_K")
        starved = compile_for(kernel, arguments, constants, warps, target, maxnreg=24)
        print(json.dumps({"kernel": "control", "target": target_name, "spills": spills(starved, target)}))


if __name__ == "__main__":
    main(sys.argv[1])
