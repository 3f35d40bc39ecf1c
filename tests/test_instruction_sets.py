"""Every CPU op under every instruction set this processor has, against the op's fp32 reference."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pinfer.kernels import ops
from pinfer.kernels.cpp import core_problem, load_core
from pinfer.kernels.cpp.build import forget_core
from pinfer.kernels.cpp.compile import LEVELS
from pinfer.kernels.registry import Op
from tests.test_kernels import agrees, all_cases


@pytest.fixture(scope="module")
def core() -> Iterator[ctypes.CDLL]:
    """The core with all instruction sets, where a first use compiles this processor's widest alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PINFER_ALL_SETS", "1")
        forget_core()
        if core_problem():
            pytest.skip(f"no CPU core: {core_problem()}")
        yield load_core()
    forget_core()


@pytest.fixture(params=LEVELS)
def instruction_set(request: pytest.FixtureRequest, core: ctypes.CDLL) -> Iterator[str]:
    """Each set by turns; the choice before is restored."""
    before = core.pinfer_instruction_set()
    if not core.pinfer_use(request.param.encode()):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    core.pinfer_use(before)


@pytest.mark.parametrize(("op", "case", "backend"), [one for one in all_cases() if one.values[2] == "cpu"])
def test_every_set_agrees_with_the_reference(
    op: Op, case: dict[str, Any], backend: str, instruction_set: str, generator: torch.Generator, poisoned_memory: None
) -> None:
    assert agrees(op, backend, op.make_inputs(generator, **case))


def test_the_named_set_is_in_use(core: ctypes.CDLL, instruction_set: str) -> None:
    assert core.pinfer_instruction_set().decode() == instruction_set


def test_an_unknown_set_is_refused_and_changes_nothing(core: ctypes.CDLL) -> None:
    before = core.pinfer_instruction_set()
    assert not core.pinfer_use(b"neon512")
    assert core.pinfer_instruction_set() == before


def test_null_stands_for_the_widest(core: ctypes.CDLL) -> None:
    before = core.pinfer_instruction_set()
    assert core.pinfer_use(b"portable")
    assert core.pinfer_use(None)
    usable = [name for name in LEVELS if core.pinfer_use(name.encode())]
    assert core.pinfer_use(None)
    assert core.pinfer_instruction_set().decode() == usable[-1]
    core.pinfer_use(before)


def test_sets_agree_with_each_other(core: ctypes.CDLL, generator: torch.Generator) -> None:
    """int8 dots are exact integers, so sets differ by the rounding of a few float additions alone."""
    inputs = ops.quant_matmul.make_inputs(generator, type="Q4_K", tokens=3, rows=37, columns=1280, int8=True)
    before, results = core.pinfer_instruction_set(), []
    for name in LEVELS:
        if core.pinfer_use(name.encode()):
            results.append(ops.quant_matmul.implementation("cpu")(**inputs))
    core.pinfer_use(before)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)
