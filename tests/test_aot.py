"""Every kernel compiles ahead of time for the named GPU generations, without register spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pinfer.kernels import ops

pytest.importorskip("triton", reason="Triton is not installed on this platform")


def compiled(target: str) -> list[dict[str, object]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("aot_compile.py")
    run = subprocess.run([sys.executable, str(script), target], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "gfx942"])
def test_kernels_compile_without_spills(target: str) -> None:
    rows = compiled(target)
    compiled_ops = {op.name for op in ops.OPS if op.triton is not None}
    assert {row["op"] for row in rows} == compiled_ops | ({"control"} if "sm" in target else set())
    assert [row["kernel"] for row in rows if row["spills"] and row["op"] != "control"] == []
    assert all(row["spills"] for row in rows if row["op"] == "control"), "a starved kernel must be seen to spill"
