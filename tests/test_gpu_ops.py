"""The GPU kernels around the FFN: what a recorded step needs of them and the registry's cases cannot say."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pinfer.kernels import cases, ops
from pinfer.kernels.activation import ACTIVATIONS
from pinfer.kernels.planes import repack
from pinfer.kernels.registry import Op
from pinfer.kernels.select_active import Active
from pinfer.quant import BY_NAME, QuantTensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

NAN = float("nan")
MOST_LAUNCHES = {
    "attention": 2,
    "rms_norm": 1,
    "layer_norm": 1,
    "softcap": 1,
    "rope": 1,
    "embed": 1,
    "glu": 1,
    "tally": 1,
    "tally_kept": 0,
    "add": 0,
    "top_k": 0,
}
Launch = tuple[str, Any, dict[str, Any]]  # a kernel's name, its grid, its constants


def module_of(op: Op) -> Any:
    return importlib.import_module(f"pinfer.kernels.{op.name}.gpu")


@contextmanager
def launches(op: Op, patch: pytest.MonkeyPatch, run: bool) -> Iterator[list[Launch]]:
    """Lists what an op launches; with `run` False nothing is launched."""
    seen: list[Launch] = []

    class Recorder:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*arguments: Any, **constants: Any) -> None:
                seen.append((self.name, grid, constants))
                if run:
                    self.kernel[grid](*arguments, **constants)

            return launch

    with patch.context() as inside:
        if op.triton is not None:
            module = module_of(op)
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                inside.setattr(module, name, Recorder(name, getattr(module, name)))
        yield seen


def valueless(value: Any) -> Any:
    """The same argument on the meta device: a device other than the CPU, with shapes and no values to wait for."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, QuantTensor):
        return dataclasses.replace(value, blocks=valueless(value.blocks))
    if isinstance(value, Active):
        return Active(valueless(value.indices), valueless(value.count))
    return value


def recorded_cases() -> list[Any]:
    chosen = [op for op in ops.OPS if op.name in MOST_LAUNCHES]
    return [pytest.param(op, case, id=f"{op.name}-{at}") for op in chosen for at, case in enumerate(op.cases)]


@pytest.mark.parametrize(("op", "case"), recorded_cases())
def test_nothing_waits_for_values_on_a_gpu(
    op: Op, case: dict[str, Any], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any int(), bool(), .item() or shape that depends on data raises here: a CUDA graph can hold the op."""
    inputs = op.make_inputs(generator, **case)
    with launches(op, monkeypatch, run=False) as seen:
        result = op.implementation("triton")(**{name: valueless(value) for name, value in inputs.items()})
    for tensor in result if isinstance(result, tuple) else (result,):
        assert tensor.device.type == "meta"
    assert len(seen) == MOST_LAUNCHES[op.name]


def test_an_op_that_waits_is_caught(generator: torch.Generator) -> None:
    inputs = ops.rope.make_inputs(generator, **ops.rope.cases[0])
    with pytest.raises(RuntimeError, match="meta tensors"):
        ops.rope.reference(**{name: valueless(value) for name, value in inputs.items()})


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("window", [None, 20, 100])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads"), [(1, 2, 2), (1, 4, 2), (3, 6, 2)])
def test_one_launch_of_attention_serves_every_position(
    tokens: int,
    heads: int,
    kv_heads: int,
    window: int | None,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    poisoned_memory: None,
) -> None:
    """Same grid and constants, another `start` on the device; what is empty or out of the window holds NaN."""
    context, case = 200, {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": 32, "start": 0}
    inputs = ops.attention.make_inputs(generator, **case, window=window, room=context - tokens)
    recorded = set()
    for start in (0, 1, 16, 17, 65, context - tokens):
        filled = copy.deepcopy(inputs)
        filled["start"].fill_(start)
        for cache in (filled["keys"], filled["values"]):
            cache[:, start:] = NAN
            cache[:, : 0 if window is None else max(0, start - window + 1)] = NAN
        reference = copy.deepcopy(filled)
        expected = ops.attention.reference(**reference)
        with launches(ops.attention, monkeypatch, run=True) as seen:
            result = ops.attention.implementation("triton")(**filled)
        recorded.add(repr(seen))
        assert seen[0][1][2] > 1  # several splits: an early start leaves some of them without work
        assert relative_error(result, expected) <= ops.attention.tolerance, start
        for name in ("keys", "values"):
            torch.testing.assert_close(filled[name], reference[name], rtol=0, atol=0, equal_nan=True)
    assert len(recorded) == 1


def test_a_prompt_is_its_tokens_one_by_one(generator: torch.Generator) -> None:
    run = ops.attention.implementation("triton")
    case = {"tokens": 11, "heads": 4, "kv_heads": 2, "head_dim": 20, "start": 0, "window": 5}
    prompt = ops.attention.make_inputs(generator, **case)
    steps = copy.deepcopy(prompt)
    expected = run(**prompt)
    for token in range(11):
        one = {name: steps[name][token : token + 1] for name in ("query", "key", "value")}
        result = run(**{**steps, **one, "start": torch.tensor([token])})
        assert relative_error(result[0], expected[token]) <= ops.attention.tolerance
    assert torch.equal(steps["keys"], prompt["keys"])
    assert torch.equal(steps["values"], prompt["values"])


@pytest.mark.parametrize("name", ["keys", "values"])
def test_a_nan_that_is_seen_shows_in_its_head_alone(name: str, generator: torch.Generator) -> None:
    case = {"tokens": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "start": 70}
    inputs = ops.attention.make_inputs(generator, **case)
    inputs[name][1, 40, 3] = NAN
    result = ops.attention.implementation("triton")(**inputs)
    assert bool(result[0, :2].isfinite().all())
    assert bool(result[0, 2:].isnan().any(dim=-1).all())


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the host does not see the values that it launches kernels on."""
    for op in (ops.attention, ops.rope, ops.embed):
        monkeypatch.setattr(module_of(op), "check_inputs", lambda *_: None)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NaN is what is asked for
@pytest.mark.parametrize("start", [-1, 38, 2**40])
@pytest.mark.parametrize("tokens", [1, 12])
def test_attention_past_the_cache_is_nan_and_writes_nothing(
    start: int, tokens: int, unchecked: None, generator: torch.Generator
) -> None:
    case = {"tokens": tokens, "heads": 2, "kv_heads": 2, "head_dim": 16, "start": 0}
    inputs = ops.attention.make_inputs(generator, **case, room=38 - tokens)
    inputs["start"].fill_(start)
    before = copy.deepcopy(inputs)
    assert bool(ops.attention.implementation("triton")(**inputs).isnan().all())
    assert torch.equal(inputs["keys"], before["keys"])
    assert torch.equal(inputs["values"], before["values"])


@pytest.mark.parametrize("start", [-1, 9, 2**40])
def test_rope_past_its_table_is_nan(start: int, unchecked: None, generator: torch.Generator) -> None:
    case = {"tokens": 1, "heads": 2, "head_dim": 20, "dim": 6, "start": 8, "interleaved": True}
    inputs = ops.rope.make_inputs(generator, **case)
    inputs["start"].fill_(start)
    result = ops.rope.implementation("triton")(**inputs)
    assert bool(result[..., :6].isnan().all())
    assert torch.equal(result[..., 6:], inputs["x"][..., 6:])


@pytest.mark.parametrize("layout", ["blocks", "planes"])
def test_ids_that_name_no_row_give_nan(layout: str, unchecked: None, generator: torch.Generator) -> None:
    table = cases.random_blocks(generator, BY_NAME["Q4_K"], 3, 256)
    table = repack(table) if layout == "planes" else table
    ids = torch.tensor([2, -1, 3, 2**40, 0])
    result = ops.embed.implementation("triton")(ids, table)
    assert result.isnan().all(dim=1).tolist() == [False, True, True, True, False]
    expected = ops.embed.reference(ids[[0, 4]], table)
    assert relative_error(result[[0, 4]], expected) <= ops.embed.tolerance


@pytest.mark.parametrize("name", BY_NAME)
def test_rows_are_embedded_from_either_layout(name: str, generator: torch.Generator, poisoned_memory: None) -> None:
    table = cases.random_blocks(generator, BY_NAME[name], 5, 1280 if BY_NAME[name].block_size > 1 else 1103)
    ids = torch.tensor([4, 0, 4])
    expected = ops.embed.reference(ids, table, scale=1.5)
    for rows in (table, repack(table)):
        result = ops.embed.implementation("triton")(ids, rows, scale=1.5)
        assert relative_error(result, expected) <= ops.embed.tolerance, rows.layout


def test_tally_counts_in_place_and_on(generator: torch.Generator) -> None:
    inputs = ops.tally.make_inputs(generator, tokens=2, neurons=31, count=5)
    masked = ops.tally.make_inputs(generator, tokens=3, neurons=31, count=31, masked=True)
    totals = inputs["totals"]
    totals[0] = 2**40  # past 32 bits
    run = ops.tally.implementation("triton")
    assert run(**inputs) is totals
    run(**{**masked, "totals": totals})
    assert totals.tolist() == [2**40 + 10 + int(masked["mask"].sum()), 5]


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_at_the_extremes_is_torchs(activation: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 200.0, -200.0, 1e14, float("inf"), NAN]])
    expected = ops.glu.reference(gate, activation=activation)
    result = ops.glu.implementation("triton")(gate, activation=activation)
    torch.testing.assert_close(result, expected, rtol=2e-6, atol=1e-30, equal_nan=True)


def test_attention_wants_a_cache_that_it_can_write_to(generator: torch.Generator) -> None:
    inputs = ops.attention.make_inputs(generator, **ops.attention.cases[0])
    strided = torch.cat([inputs["keys"], inputs["keys"]], dim=2)[..., ::2]
    for wrong in (strided, inputs["keys"].half()):
        with pytest.raises(ValueError, match="contiguous float32"):
            ops.attention.implementation("triton")(**{**inputs, "keys": wrong})


@pytest.mark.parametrize("parts", [1, 16, 37])
def test_combine_adds_partials_residual_and_external(generator: torch.Generator, parts: int) -> None:
    from pinfer.kernels.combine import combine

    partial = cases.random_floats(generator, parts, 3, 50)
    residual, external = cases.random_floats(generator, 3, 50), cases.random_floats(generator, 3, 50)
    total = partial.double().sum(0)
    assert torch.allclose(combine(partial).double(), total, atol=1e-5)
    with_both = combine(partial, residual, external).double()
    assert torch.allclose(with_both, total + residual.double() + external.double(), atol=1e-5)
    with pytest.raises(ValueError, match="external is"):
        combine(partial, external=external[:2])


def test_replacing_weights_never_holds_two_models() -> None:
    import gc
    import weakref

    from pinfer.models import replace_weights

    holder = torch.nn.Module()
    for at in range(4):
        setattr(holder, f"w{at}", QuantTensor.from_dense(torch.zeros(2, 32)))
    holder.tied = holder.w0
    alive: list[int] = []
    seen = [weakref.ref(getattr(holder, f"w{at}").blocks) for at in range(4)]

    def change(weight: QuantTensor) -> QuantTensor:
        gc.collect()
        alive.append(sum(one() is not None for one in seen))
        return QuantTensor.from_dense(torch.ones(2, 32))

    replace_weights(holder, change)
    assert alive == [4, 3, 2, 1]
    assert holder.tied is holder.w0
