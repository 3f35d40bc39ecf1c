"""Every kernel compiles ahead of time for the named GPU generations, without register spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    control = [row for row in rows if row["kernel"] == "control"]
    kernels = [row for row in rows if row["kernel"] != "control"]
    assert len(kernels) == 2 + 3 * 13
    assert [row["kernel"] for row in kernels if row["spills"]] == []
    if target.startswith("sm_"):
        assert control[0]["spills"], "a kernel starved of registers must be seen to spill"
