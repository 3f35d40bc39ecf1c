"""Every op of the registry, every implementation, every case: against the op's fp32 reference."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import pytest
import torch

import pinfer.kernels
from pinfer.config import Activation
from pinfer.kernels import cases, ops
from pinfer.kernels.activation import ACTIVATIONS, CLAMPS_UP, ZERO_BELOW_ZERO
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.cpp.binding import ACTIVATION_CODES
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.planes import repack
from pinfer.kernels.registry import BackendUnavailable, Op, use_backend
from pinfer.kernels.select_active import Active
from pinfer.quant import BY_NAME, QUANT_TYPES, QuantTensor

IMPLEMENTATIONS = ("cpu", "triton")


def error_of(op: Op, result: Any, expected: Any) -> float:
    """Relative RMS error; for a compaction, 0 or infinity."""
    if expected is None:
        return 0.0 if result is None else float("inf")
    if isinstance(expected, Active):
        count = int(expected.count)
        same = int(result.count) == count and torch.equal(result.indices[:count], expected.indices[:count])
        return 0.0 if same else float("inf")
    if isinstance(expected, tuple):
        return max(error_of(op, one, other) for one, other in zip(result, expected, strict=True))
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    if not expected.numel():
        return 0.0
    scale = expected.double().square().mean().sqrt()
    error = (result.double() - expected.double()).square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def agrees(op: Op, backend: str, inputs: dict[str, Any]) -> bool:
    """Whether a backend is within the op's tolerance; NaN never is."""
    # Each gets its own copy: some ops write to their inputs.
    result = op.implementation(backend)(**copy.deepcopy(inputs))
    return error_of(op, result, op.reference(**copy.deepcopy(inputs))) <= op.tolerance


def all_cases() -> list[Any]:
    return [
        pytest.param(op, case, backend, id=f"{op.name}-{'-'.join(f'{k}={v}' for k, v in case.items())}-{backend}")
        for op in ops.OPS
        for case in op.cases
        for backend in implementations_of(op)
    ]


def implementations_of(op: Op) -> list[str]:
    """Those of its own; a row without one for a device runs the reference there."""
    return [backend for backend in IMPLEMENTATIONS if getattr(op, backend) is not None]


@pytest.mark.parametrize(("op", "case", "backend"), all_cases())
def test_implementation_agrees_with_reference(
    op: Op, case: dict[str, Any], backend: str, generator: torch.Generator, poisoned_memory: None
) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    inputs = op.make_inputs(generator, **case)
    assert agrees(op, backend, inputs)


@pytest.mark.parametrize(("op", "backend"), [(op, name) for op in ops.OPS for name in implementations_of(op)])
def test_results_repeat_bitwise(op: Op, backend: str, generator: torch.Generator) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    inputs = op.make_inputs(generator, **op.cases[0])
    run = op.implementation(backend)
    first, second = run(**copy.deepcopy(inputs)), run(**copy.deepcopy(inputs))
    if isinstance(first, (Active, tuple)):
        assert error_of(op, first, second) == 0
    else:
        assert torch.equal(first, second)


THREADED: list[tuple[Op, dict[str, Any]]] = [
    (ops.sparse_ffn, {"type": "Q8_0", "tokens": 2, "neurons": 431, "width": 4352, "density": 0.3}),
    (ops.sparse_ffn, {"type": "Q4_K", "tokens": 1, "neurons": 431, "width": 4352, "density": 0.3, "int8": True}),
    (ops.quant_matmul, {"type": "Q4_0", "tokens": 1, "rows": 531, "columns": 2080, "int8": True}),
    (ops.quant_matmul, {"type": "Q6_K", "tokens": 21, "rows": 531, "columns": 2048, "int8": True}),
    (ops.input_sparse_matmul, {"type": "Q8_0", "tokens": 1, "inputs": 431, "outputs": 4352, "density": 0.5}),
    (ops.attention, {"tokens": 1, "heads": 8, "kv_heads": 2, "head_dim": 128, "start": 900}),
]


@pytest.mark.parametrize(("op", "case"), THREADED, ids=lambda value: getattr(value, "name", None))
def test_cpu_results_do_not_depend_on_the_number_of_threads(
    op: Op, case: dict[str, Any], generator: torch.Generator
) -> None:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    inputs = op.make_inputs(generator, **case)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(op.implementation("cpu")(**copy.deepcopy(inputs)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("shape", [(36,), (0,), (1, 37)], ids=str)
def test_a_threshold_is_one_or_one_a_row(backend: str, shape: tuple[int, ...], generator: torch.Generator) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    inputs = ops.threshold_matmul.make_inputs(generator, type="F32", tokens=1, rows=37, columns=32)
    with pytest.raises(ValueError, match=r"expected \[1\] or \[37\]"):
        ops.threshold_matmul.implementation(backend)(**{**inputs, "threshold": torch.zeros(shape)})


def test_an_activation_has_one_name_everywhere() -> None:
    assert tuple(ACTIVATIONS) == get_args(Activation)
    assert set(ACTIVATIONS) == set(ACTIVATION_CODES) >= {*ZERO_BELOW_ZERO, *CLAMPS_UP}


def test_every_folder_with_a_reference_is_a_registered_op() -> None:
    folders = {path.parent.name for path in Path(pinfer.kernels.__file__).parent.glob("*/reference.py")}
    assert folders == {op.name for op in ops.OPS}


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("field", ["reference", "make_inputs", "bytes_moved", "cases", "bench_cases"])
def test_a_row_that_lacks_a_part_cannot_be_made(op: Op, field: str) -> None:
    missing: Any = () if field.endswith("cases") else None
    with pytest.raises(TypeError, match=op.name):
        dataclasses.replace(op, **{field: missing})


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_a_row_without_an_implementation_cannot_be_made(op: Op) -> None:
    with pytest.raises(TypeError, match=op.name):
        dataclasses.replace(op, triton=None, cpu=None)
    with pytest.raises(TypeError, match=op.name):
        dataclasses.replace(op, cpu="a module without a function")


def test_a_loose_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match="tests nothing"):
        dataclasses.replace(ops.quant_matmul, tolerance=0.5)


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_a_wrong_kernel_is_caught(op: Op, generator: torch.Generator) -> None:
    """The check itself: an implementation that is a little wrong must not agree."""

    def spoiled(result: Any) -> Any:
        if isinstance(result, Active):
            return Active(result.indices, result.count + 1)
        if isinstance(result, tuple):
            return (spoiled(result[0]), *result[1:])
        return result * (1 + 10 * op.tolerance) if op.tolerance else result + 1

    def slightly_wrong(**inputs: Any) -> Any:
        return spoiled(op.reference(**inputs))

    inputs = op.make_inputs(generator, **op.cases[0])
    broken = dataclasses.replace(op)
    broken.__dict__["_triton"] = slightly_wrong
    assert not agrees(broken, "triton", inputs)


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_dequantize_reference_equals_gguf_package(kind: Any) -> None:
    """Block by block over random bytes, NaN and infinite scales included."""
    rng = np.random.default_rng(kind.ggml_id)
    raw = rng.integers(0, 256, (50, 3 * kind.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind.ggml_id))
    ours = dequantize(QuantTensor(torch.from_numpy(raw), kind, 3 * kind.block_size))
    np.testing.assert_array_equal(ours.numpy(), expected.reshape(ours.shape))


@pytest.mark.parametrize("op", ops.OPS, ids=lambda op: op.name)
def test_bytes_moved_is_positive(op: Op, generator: torch.Generator) -> None:
    assert op.bytes_moved(**op.make_inputs(generator, **op.cases[0])) > 0


WRONG_INPUTS: list[tuple[Op, dict[str, Any]]] = [
    (ops.quant_matmul, {"x": torch.zeros(1, 8)}),
    (ops.quant_matmul, {"x": torch.zeros(96)}),
    (ops.select_active, {"threshold": torch.zeros(3)}),
    (ops.select_active, {"scores": torch.zeros(5)}),
    (ops.sparse_ffn, {"x": torch.zeros(1, 8)}),
    (ops.sparse_ffn, {"gate_values": torch.zeros(1, 3)}),
    (ops.sparse_ffn, {"mask": torch.zeros(1, 3, dtype=torch.bool)}),
    (ops.sparse_ffn, {"mask": torch.zeros(1, 23, dtype=torch.uint8)}),
    (ops.sparse_ffn, {"down": QuantTensor.from_dense(torch.zeros(5, 123))}),
    (ops.sparse_ffn, {"up": QuantTensor.from_dense(torch.zeros(23, 5))}),
    (ops.sparse_ffn, {"activation": "swish"}),
    (ops.sparse_ffn, {"active": Active(torch.arange(50, dtype=torch.int32), torch.full((1,), 50, dtype=torch.int32))}),
    (ops.sparse_ffn, {"gate_bias": torch.zeros(3)}),
    (ops.sparse_ffn, {"cutoff": 0.1}),
    (ops.glu, {"gate_bias": torch.zeros(3)}),
    (ops.glu, {"activation": "relu", "cutoff": -1.0}),
    (ops.threshold_matmul, {"gate_bias": torch.zeros(37, dtype=torch.float64)}),
    (ops.threshold_matmul, {"magnitude_of": "silu", "cutoff": 0.1}),
    (ops.quant_matmul, {"bias": torch.zeros(3)}),
    (ops.layer_norm, {"bias": torch.zeros(3)}),
    (ops.layer_norm, {"x": torch.zeros(1, 8)}),
    (ops.softcap, {"cap": 0.0}),
    (ops.attention, {"softcap": -1.0}),
    (ops.tally, {"totals": torch.zeros(4, dtype=torch.int64)[::2]}),
    (ops.tally_kept, {"x": torch.zeros(5)}),
    (ops.tally_kept, {"threshold": torch.zeros(2)}),
    (ops.tally_kept, {"totals": torch.zeros(2, dtype=torch.int32)}),
    (ops.embed, {"ids": torch.tensor([99])}),
    (ops.rope, {"start": torch.tensor([5])}),
    (ops.attention, {"start": torch.tensor([9])}),
    (ops.top_k, {"k": 0}),
    (ops.sparse_ffn, {"active": Active(torch.zeros(23, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))}),
]


@pytest.mark.parametrize("backend", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize(("op", "wrong"), WRONG_INPUTS, ids=lambda value: getattr(value, "name", None))
def test_inputs_that_do_not_belong_together_are_refused(
    op: Op, wrong: dict[str, Any], backend: str, generator: torch.Generator
) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    inputs = op.make_inputs(generator, **op.cases[0]) | wrong
    with pytest.raises(ValueError, match=r"expected|must be|none of|rows|pass the table|do not fit|no meaning"):
        op.implementation(backend)(**inputs)


@pytest.mark.parametrize("backend", ["reference", *IMPLEMENTATIONS])
def test_a_nan_score_is_active_and_nothing_scores_nothing(backend: str) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    select = ops.select_active.implementation(backend)
    active = select(torch.tensor([[0.0, float("nan"), 2.0]]), torch.tensor([1.0]))
    assert active.indices[: int(active.count)].tolist() == [1, 2]
    assert int(select(torch.zeros(1, 0), torch.zeros(1)).count) == 0


@pytest.mark.parametrize("peak", [0.0, 1e-40, 1e-36, 2e-36, 1.0, 9e29, 2e30, 2e38, float("inf"), float("nan")])
def test_int8_rounding_is_the_references_at_the_extremes(peak: float) -> None:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    x = torch.linspace(-1, 1, 64)[None].double().mul(peak).float()
    weight = QuantTensor(torch.zeros(1, 68, dtype=torch.uint8), BY_NAME["Q8_0"], 64)
    weight.blocks[:, 1::34], weight.blocks[:, 2] = 0x3C, 1  # scale 1; one weight is 1, the others 0
    expected = ops.quant_matmul.reference(x, weight, int8=True)
    torch.testing.assert_close(ops.quant_matmul.implementation("cpu")(x, weight, int8=True), expected, equal_nan=True)


@pytest.mark.parametrize(("indices", "count"), [([0] * 23, 24), ([0] * 23, -1), ([23] * 23, 1), ([-1] * 23, 1)])
def test_the_core_refuses_a_list_of_neurons_that_are_not_there(
    indices: list[int], count: int, generator: torch.Generator
) -> None:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    inputs = ops.sparse_ffn.make_inputs(generator, type="Q8_0", tokens=1, neurons=23, width=64, density=0.5)
    wrong = Active(torch.tensor(indices, dtype=torch.int32), torch.tensor([count], dtype=torch.int32))
    with pytest.raises(ValueError, match="active list"):
        ops.sparse_ffn.implementation("cpu")(**{**inputs, "active": wrong})


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 70, 99])
def test_top_k_shows_scores_that_are_not_finite(backend: str, bad: float, at: int) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    scores = torch.randn(100)
    scores[at] = bad
    assert bool(ops.top_k.implementation(backend)(scores, 3).values.isnan().all())


def test_many_tokens_go_through_gemm_in_chunks(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    for module in ("quant_matmul", "sparse_ffn"):
        monkeypatch.setattr(f"pinfer.kernels.{module}.cpu.GEMM_CHUNK_WEIGHTS", 4 * 96)
    matmul = ops.quant_matmul.make_inputs(generator, type="Q8_0", tokens=20, rows=37, columns=96)
    assert agrees(ops.quant_matmul, "cpu", matmul)
    case = {"type": "Q8_0", "tokens": 20, "neurons": 37, "width": 96, "density": 0.3, "masked": True}
    for with_gate_values in (False, True):
        inputs = ops.sparse_ffn.make_inputs(generator, **case, with_gate_values=with_gate_values)
        assert agrees(ops.sparse_ffn, "cpu", inputs)


def test_strided_rows_are_read_in_place(generator: torch.Generator) -> None:
    """A view of every other row, as shards of one matrix are, needs no copy."""
    inputs = ops.quant_matmul.make_inputs(generator, type="Q4_K", tokens=1, rows=10, columns=256)
    every_other = inputs["weight"][::2]
    assert not every_other.blocks.is_contiguous()
    for backend in ("cpu", "triton"):
        if backend == "cpu" and core_problem():
            continue
        assert agrees(ops.quant_matmul, backend, {**inputs, "weight": every_other})


@pytest.mark.parametrize("name", ["F16", "Q8_0"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_matrices_of_an_ffn_may_be_strided_each_in_its_own_way(
    generator: torch.Generator, name: str, tokens: int
) -> None:
    case = {"type": name, "tokens": tokens, "neurons": 24, "width": 64, "density": 0.5}
    inputs = ops.sparse_ffn.make_inputs(generator, **case)
    gates = repack(cases.random_blocks(generator, BY_NAME[name], 48, 64))
    spread = {**inputs, "gate": gates[::2], "up": repack(inputs["up"]), "down": repack(inputs["down"])}
    assert spread["gate"].blocks.stride(0) == 2 * spread["up"].blocks.stride(0)
    assert agrees(ops.sparse_ffn, "triton", spread)


@pytest.mark.parametrize("name", BY_NAME)
def test_no_rows_in_planes_are_no_rows(name: str, generator: torch.Generator) -> None:
    weight = repack(cases.random_blocks(generator, BY_NAME[name], 4, 256))
    assert dequantize(weight[:0]).shape == (0, 256)


def test_forced_backend_is_used_and_restored(generator: torch.Generator) -> None:
    inputs = ops.select_active.make_inputs(generator, tokens=1, neurons=8, density=0.5)
    with use_backend("reference"):
        assert int(ops.select_active(**inputs).indices[-1]) == -1  # the reference's filler
    with pytest.raises(ValueError, match="opencl"), use_backend("opencl"):
        pass


def test_an_implementation_that_cannot_load_says_so() -> None:
    broken = dataclasses.replace(ops.dequantize, triton="pinfer.kernels.no_such_module:dequantize")
    with pytest.raises(BackendUnavailable, match="no_such_module"):
        broken.implementation("triton")


@pytest.mark.parametrize("window", [None, 4])
def test_capped_attention_by_hand(window: int | None, generator: torch.Generator) -> None:
    """One token and head at a time in float64, which the reference's grouped products do not do."""
    shape = {"tokens": 5, "heads": 4, "kv_heads": 2, "head_dim": 16, "start": 6, "softcap": 0.5, "window": window}
    inputs = ops.attention.make_inputs(generator, **shape)
    keys, values = (inputs[name].double().clone() for name in ("keys", "values"))
    keys[:, 6:11], values[:, 6:11] = (inputs[name].double().transpose(0, 1) for name in ("key", "value"))
    result = ops.attention.reference(**inputs)
    for token in range(5):
        seen = slice(0 if window is None else 7 + token - window, 7 + token)
        for head in range(4):
            scores = keys[head // 2, seen] @ inputs["query"][token, head].double() * inputs["scale"]
            expected = (0.5 * torch.tanh(scores / 0.5)).softmax(0) @ values[head // 2, seen]
            torch.testing.assert_close(result[token, head].double(), expected, rtol=1e-5, atol=1e-6)
