"""Compiles every build for every target without a device, and kernels with known faults; run by test_aot.py.

Triton decides at import whether it interprets, so this needs a process without TRITON_INTERPRET.
Writes one JSON object: the rows of the survey with the rules they break, what the controls showed,
and the seconds taken.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path

import triton
import triton.language as tl

from pinfer.kernels import ops
from pinfer.kernels.aot import FLOATS, Build
from pinfer.kernels.compiled import compile as compiling
from pinfer.kernels.compiled.figures import Row, figures_of
from pinfer.kernels.compiled.survey import survey


@triton.jit
def _copy_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at, mask=at < size, other=0.0), mask=at < size)


@triton.jit
def _add_up_kernel(x_ptr, out_ptr, rows, BLOCK: tl.constexpr):
    """Holds two rows in registers: BLOCK / 64 of them a thread at 4 warps."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    total = tl.zeros([BLOCK], tl.float32)
    for row in range(rows):
        total += x * tl.load(x_ptr + row * BLOCK + at)
    tl.store(out_ptr + at, total)


@triton.jit
def _atomic_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _refused_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK == 0, "refused on purpose")
    tl.store(x_ptr, 0.0)


POINTERS = {"x_ptr": FLOATS, "out_ptr": FLOATS}
COPY = Build(
    "copy", _copy_kernel, POINTERS | {"size": "i32"}, {"BLOCK": 4096}, 4, multiples_of_16=("size",), wide_share=0.99
)
ADD_UP = Build("add up", _add_up_kernel, POINTERS | {"rows": "i32"}, {"BLOCK": 4096}, 4)
# AMD has no limit to set, but 512 registers a thread: this one asks for 1,024.
ADD_UP_HUGE = Build("add up, huge", _add_up_kernel, POINTERS | {"rows": "i32"}, {"BLOCK": 32_768}, 1)
ATOMIC = Build("atomic", _atomic_kernel, POINTERS, {"BLOCK": 256}, 4)
REFUSED = Build("refused", _refused_kernel, {"x_ptr": FLOATS}, {"BLOCK": 4}, 4)


def rows_of(compiled: list[tuple[Build, compiling.Artifact]]) -> list[Row]:
    """Controls as rows of the survey."""
    return [
        Row(
            "control", build.label, build.kernel.fn.__name__, artifact.target, build.num_warps, build.num_stages,
            build.wide_share, build.atomics, figures,
        )
        for (build, artifact), figures in zip(compiled, figures_of([a for _, a in compiled]), strict=True)
    ]  # fmt: skip


def controls() -> dict[str, dict[str, list[str]]]:
    """The rules that each control breaks, by target; sound ones break none."""
    compiled: list[tuple[Build, compiling.Artifact]] = []
    names = ("copy", "copy, unaligned", "add up", "add up, starved", "atomic")
    for target in compiling.TARGETS:
        starved = (ADD_UP_HUGE, {}) if target == "gfx942" else (ADD_UP, {"maxnreg": 24})
        for build, options in ((COPY, {}), (COPY, {"aligned": False}), (ADD_UP, {}), starved, (ATOMIC, {})):
            compiled.append((build, compiling.artifact_of(build, target, **options)))
    found: dict[str, dict[str, list[str]]] = {target: {} for target in compiling.TARGETS}
    for at, row in enumerate(rows_of(compiled)):
        found[row.target][names[at % len(names)]] = row.problems()
    return found


def refused() -> list[str]:
    """What is reported, target by target, of a kernel that does not compile."""
    return [str(item) for item in compiling.artifacts_of(REFUSED, list(compiling.TARGETS))]


def unaligned_op(target: str) -> list[str]:
    """The same for the first build of an op that promises 16-byte loads."""
    build = next(build for op in ops.OPS for build in compiling.builds_of(op) if build.wide_share)
    [row] = rows_of([(build, compiling.artifact_of(build, target, aligned=False))])
    return row.problems()


def differently_assembled() -> list[str]:
    """Ops whose code for sm_86 or sm_89 is not what Triton compiles for it alone: their first build, by turns.

    And the first one that uses tensor cores, for both.
    """
    different, newer = [], ["sm_86", "sm_89"]
    for number, op in enumerate(ops.OPS):
        builds = compiling.builds_of(op)
        on_tensor_cores = [build for build in builds if "TOKENS" in build.constants][:1]
        for build in builds[:1] + on_tensor_cores:
            chosen = newer if build in on_tensor_cores else [newer[number % 2]]
            for artifact in compiling.artifacts_of(build, ["sm_80", *chosen]):
                own = compiling.artifact_of(build, artifact.target)
                if compiling.kernel_code(own.cubin) != compiling.kernel_code(artifact.cubin):
                    different.append(f"{op.name}: {build.label} on {artifact.target}")
    return different


def differently_disassembled(target: str) -> list[str]:
    """Kernels whose opcodes, read out of one image of several kernels, are not those of a listing of their own."""
    cubins = [compiling.artifact_of(build, target).cubin for build in (COPY, ADD_UP, ATOMIC)]
    different = []
    for cubin, together in zip(cubins, compiling.disassemble(target, cubins), strict=True):
        with compiling.file_of(cubin) as path:
            alone = compiling.run_tool("cuobjdump", "-sass", path)
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?([A-Z][\w.]*)", alone)
        if opcodes != [instruction.opcode for instruction in together]:
            different.append(f"{len(opcodes)} opcodes, {len(together)} in the image")
    return different


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    started = time.perf_counter()
    rows = survey(ops.OPS, compiling.TARGETS)
    surveyed = time.perf_counter()
    result = {
        "rows": [{"op": r.op, "build": r.build, "target": r.target, "problems": r.problems()} for r in rows],
        "controls": controls(),
        "refused": refused(),
        "unaligned_op": unaligned_op("sm_90"),
        "differently_assembled": differently_assembled(),
        "differently_disassembled": [name for t in ("sm_80", "sm_90") for name in differently_disassembled(t)],
        "seconds": {"survey": surveyed - started, "controls": time.perf_counter() - surveyed},
    }
    output.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
