"""CPU kernels over random shapes, types, densities and memory layouts, against their references."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinfer.kernels import cases, ops
from pinfer.kernels.activation import ACTIVATIONS, HAS_CUTOFF
from pinfer.kernels.cpp import binding, core_problem
from pinfer.kernels.registry import Op
from pinfer.quant import BY_NAME, QuantTensor

TYPES = list(BY_NAME)
SEEDS = st.integers(0, 2**32 - 1)
Case = tuple[dict[str, Any], float]  # an op's inputs, and about the RMS of its result
Layout = list[tuple[int, int]]  # the address and the gap between rows of each weight
LAYOUTS = st.lists(st.tuples(st.integers(0, 65), st.integers(0, 70)), min_size=3, max_size=3)
some = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def core_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch, poisoned_memory: None) -> Iterator[None]:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    monkeypatch.setattr(binding, "WORTH_WAKING", 0)  # small work too goes to all threads
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def moved(weight: QuantTensor, offset: int, gap: int) -> QuantTensor:
    """The same rows at any address, `gap` bytes of NaN apart."""
    rows, length = weight.blocks.shape
    memory = torch.full((offset + rows * (length + gap) + 1,), 0xFF, dtype=torch.uint8)
    blocks = memory.as_strided((rows, length), (length + gap, 1), offset)
    blocks.copy_(weight.blocks)
    return QuantTensor(blocks, weight.type, weight.columns)


def at_exact_steps(x: torch.Tensor, block: int, generator: torch.Generator) -> torch.Tensor:
    """Floats that int8 rounds to themselves, so that no tie is rounded one way here and the other there."""
    steps = torch.randint(-127, 128, x.shape, generator=generator).float()
    steps[:, ::block] = 127
    return steps / 64


def check(op: Op, case: Case, layout: Layout, threads: int) -> dict[str, Any]:
    """Agreement within the op's tolerance of the result's RMS, or of what it is by chance; the inputs the core had."""
    inputs, scale = case
    torch.set_num_threads(threads)
    places = iter(layout)
    ours = {
        name: moved(value, *next(places)) if isinstance(value, QuantTensor) else copy.deepcopy(value)
        for name, value in inputs.items()
    }
    result = op.implementation("cpu")(**ours)
    expected = op.reference(**inputs)
    assert result.shape == expected.shape
    assert result.isfinite().all()
    assert rms(result - expected) <= op.tolerance * max(rms(expected), scale)
    return ours


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def width(draw: st.DrawFn, *names: str | None) -> int:
    """Columns that are whole in every type's blocks, odd multiples and long rows among them."""
    block = max(BY_NAME[name].block_size for name in names if name)
    if block == 1:
        return draw(st.integers(1, 300))
    return block * draw(st.integers(1, 5 if block == 256 else 70))


@st.composite
def matmuls(draw: st.DrawFn) -> Case:
    name, int8 = draw(st.sampled_from(TYPES)), draw(st.booleans())
    tokens = draw(st.one_of(st.integers(1, 16), st.integers(17, 40)))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    shape = {"rows": draw(st.integers(1, 70)), "columns": width(draw, name)}
    inputs = ops.quant_matmul.make_inputs(
        generator, type=name, tokens=tokens, **shape, biased=draw(st.booleans()), int8=int8
    )
    if int8 and BY_NAME[name].block_size > 1:
        inputs["x"] = at_exact_steps(inputs["x"], BY_NAME[name].block_size, generator)
    return inputs, 1.0


@st.composite
def ffns(draw: st.DrawFn) -> Case:
    name, int8 = draw(st.sampled_from(TYPES)), draw(st.booleans())
    up = draw(st.sampled_from([name, name, *TYPES]))
    down = draw(st.sampled_from([name, "Q8_0", *TYPES]))
    columns, neurons = width(draw, name, up, down), draw(st.integers(1, 130))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    activation = draw(st.sampled_from(list(ACTIVATIONS)))
    inputs = ops.sparse_ffn.make_inputs(
        generator,
        type=name,
        down_type=down,
        tokens=draw(st.integers(1, 16)),
        neurons=neurons,
        width=columns,
        density=draw(st.sampled_from([0.0, 0.02, 0.3, 1.0])),
        activation=activation,
        gated=draw(st.booleans()),
        masked=draw(st.booleans()),
        with_gate_values=draw(st.booleans()),
        shifted=draw(st.booleans()),
        biased=draw(st.booleans()),
        cutoff=draw(st.sampled_from([0.0, 0.3])) if activation in HAS_CUTOFF else 0.0,
        int8=int8,
    )
    if inputs["up"] is not None:
        inputs["up"] = cases.random_blocks(generator, BY_NAME[up], neurons, columns)
    if int8:
        blocks = [BY_NAME[kind].block_size for kind in (name, up) if BY_NAME[kind].block_size > 1]
        inputs["x"] = at_exact_steps(inputs["x"], min(blocks), generator) if blocks else inputs["x"]
    return inputs, (int(inputs["active"].count) / columns) ** 0.5


@st.composite
def sparse_inputs(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(TYPES))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    rows, columns = draw(st.integers(1, 90)), width(draw, name)
    inputs = ops.input_sparse_matmul.make_inputs(
        generator,
        type=name,
        tokens=draw(st.integers(1, 20)),
        inputs=rows,
        outputs=columns,
        density=draw(st.sampled_from([0.0, 0.1, 0.6, 1.0])),
    )
    return inputs, (rows / columns) ** 0.5


@st.composite
def attentions(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    inputs = ops.attention.make_inputs(
        torch.Generator().manual_seed(draw(SEEDS)),
        tokens=draw(st.integers(1, 16)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=draw(st.integers(1, 80)),
        start=draw(st.integers(0, 70)),
        window=draw(st.one_of(st.none(), st.integers(1, 30))),
        softcap=draw(st.one_of(st.none(), st.floats(0.1, 60))),
        room=draw(st.integers(0, 3)),
    )
    return inputs, 1.0


@some
@given(matmuls(), LAYOUTS, st.integers(1, 3))
def test_quant_matmul(case: Case, layout: Layout, threads: int) -> None:
    check(ops.quant_matmul, case, layout, threads)


@some
@given(ffns(), LAYOUTS, st.integers(1, 3))
def test_sparse_ffn(case: Case, layout: Layout, threads: int) -> None:
    check(ops.sparse_ffn, case, layout, threads)


@some
@given(sparse_inputs(), LAYOUTS, st.integers(1, 3))
def test_input_sparse_matmul(case: Case, layout: Layout, threads: int) -> None:
    check(ops.input_sparse_matmul, case, layout, threads)


@some
@given(attentions(), st.integers(1, 3))
def test_attention(case: Case, threads: int) -> None:
    ours = check(ops.attention, case, [], threads)
    for cache in ("keys", "values"):
        assert torch.equal(ours[cache], case[0][cache])
