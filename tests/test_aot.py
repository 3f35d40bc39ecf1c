"""Every kernel compiles ahead of time for the named GPU generations: no spills, wide loads, no atomics.

The figures are read out of the machine code itself; kernels with known faults must be seen to have them.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from pinfer.kernels import ops
from tests.conftest import AheadOfTime

pytest.importorskip("triton", reason="Triton is not installed on this platform")

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "gfx942")
# A cold build takes 0.7 s of a core for the five targets together, one on tensor cores 5, and there are some 240.
pytestmark = pytest.mark.timeout(1200)


@pytest.fixture(scope="module")
def compiled(ahead_of_time: AheadOfTime) -> dict[str, Any]:
    return json.loads(ahead_of_time.result())


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_are_sound(compiled: dict[str, Any], target: str) -> None:
    problems = [problem for row in compiled["rows"] if row["target"] == target for problem in row["problems"]]
    assert not problems, "\n".join(["", *problems])


def test_every_op_with_a_triton_module_is_compiled_for_every_target(compiled: dict[str, Any]) -> None:
    expected = {(op.name, target) for op in ops.OPS if op.triton is not None for target in TARGETS}
    assert {(row["op"], row["target"]) for row in compiled["rows"]} == expected


def test_labels_name_one_build_each(compiled: dict[str, Any]) -> None:
    names = [(row["op"], row["build"], row["target"]) for row in compiled["rows"]]
    assert sorted({name[:2] for name in names if names.count(name) > 1}) == []


@pytest.mark.parametrize("target", TARGETS)
def test_faults_are_seen(compiled: dict[str, Any], target: str) -> None:
    found = compiled["controls"][target]
    assert found["copy"] == []
    assert found["add up"] == []
    assert ["wide_share 0.000, promised 0.99" in problem for problem in found["copy, unaligned"]] == [True]
    spills, stack = found["add up, starved"]
    assert "spill instructions" in spills
    assert "bytes of stack" in stack
    assert ["atomic instructions" in problem for problem in found["atomic"]] == [True]
    assert all(f" on {target}: " in problem for problems in found.values() for problem in problems)


def test_a_kernel_that_does_not_compile_is_reported_for_every_target(compiled: dict[str, Any]) -> None:
    assert [
        f"'{target}'" in error and "refused on purpose" in error
        for target, error in zip(TARGETS, compiled["refused"], strict=True)
    ] == [True] * 5


def test_an_ops_promise_of_wide_loads_is_broken_without_aligned_pointers(compiled: dict[str, Any]) -> None:
    assert ["wide_share" in problem for problem in compiled["unaligned_op"]] == [True]


def test_sharing_ptx_and_disassembling_together_change_nothing(compiled: dict[str, Any]) -> None:
    assert compiled["differently_assembled"] == []
    assert compiled["differently_disassembled"] == []
