"""The recorded decode step: equal to the plain forward pass, and unrecorded where it could not be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pinfer import sparsify
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.step import DecodeStep
from pinfer.kernels import cases, ops
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.cpp.program import record
from pinfer.kernels.registry import use_int8
from pinfer.quant import BY_NAME
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

pytestmark = [
    pytest.mark.skipif(core_problem() is not None, reason=f"no CPU core: {core_problem()}"),
    pytest.mark.usefixtures("quick_fits"),
]
TOKENS = [3, 9, 4, 11, 7, 2, 9, 9]
RUNS = [
    {"method": "dense"},
    {"method": "exact", "activation": "relu"},
    {"method": "gate_threshold", "sparsity": 0.4},
    {"method": "exact", "activation": "relu", "cold_fraction": 0.5},
    {"method": "exact", "activation": "drelu"},
    {"method": "low_rank", "activation": "relu", "predictor_rank": 32},
    {"method": "low_rank", "sparsity": 0.4, "predictor_rank": 32},
    {"method": "sign_bits", "activation": "relu"},
    {"method": "shift_threshold", "sparsity": 0.4},
    {"method": "shift_threshold", "sparsity": 0.4, "cold_fraction": 0.5},
    {"method": "input_threshold", "sparsity": 0.4},
]


def engine_for(path: Path, precision: str = "int8", **run: object) -> Engine:
    return load_engine(RunConfig(model=str(path), precision=precision, **run))  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_recorded_steps_equal_plain_ones_bit_for_bit(
    tmp_path: Path, family: str, precision: str, run: dict[str, object], threads: int
) -> None:
    write = write_tiny_llama if family == "llama" else write_tiny_gemma3
    engine = engine_for(write(tmp_path / "m.gguf"), precision, threads=threads, **run)
    with engine.computing():
        plain_cache, cache = engine.model.new_cache(), engine.model.new_cache()
        step = DecodeStep(engine.model, cache)
        for token in TOKENS:
            plain = engine.model(torch.tensor([token]), plain_cache)
            assert torch.equal(step(token), plain)
            assert cache.length == plain_cache.length
    assert step.recorded
    assert step.reason is None


@pytest.mark.parametrize("run", [RUNS[1], RUNS[-1]], ids=str)
def test_activity_is_counted_by_recorded_steps(tmp_path: Path, run: dict[str, object]) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), **run)
    counts = []
    for recorded in (False, True):
        sparsify.reset_activity(engine.model)
        cache = engine.model.new_cache()
        step = DecodeStep(engine.model, cache)
        with engine.computing():
            for token in TOKENS:
                if recorded:
                    step(token)
                else:
                    engine.model(torch.tensor([token]), cache)
        counts.append([(layer.active, layer.tokens) for layer in sparsify.layer_densities(engine.model)])
    assert counts[0] == counts[1]
    assert counts[0][0][1] == len(TOKENS)


def step_that_follows_the_model(engine: Engine) -> DecodeStep:
    """After TOKENS, each of which gave the plain model's logits bit for bit."""
    with engine.computing():
        plain_cache, cache = engine.model.new_cache(), engine.model.new_cache()
        step = DecodeStep(engine.model, cache)
        for token in TOKENS:
            assert torch.equal(step(token), engine.model(torch.tensor([token]), plain_cache))
    return step


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def swallowed(x: torch.Tensor) -> torch.Tensor:
    try:
        return x * 2
    except RuntimeError:
        return x


@pytest.mark.parametrize(
    "outside",
    [
        lambda x: x * 1.0001,
        lambda x: x + torch.ones(1),
        lambda x: x.clone().mul_(2),
        lambda x: torch.nn.functional.silu(x),
        lambda x: x[torch.tensor([0])],
        lambda x: x[:, torch.arange(x.shape[1] - 1, -1, -1)],
        lambda x: x[[0]],
        lambda x: swallowed(x),
        lambda x: x.view(1, -1, 2).transpose(1, 2).reshape(1, -1),
        torch.jit.script(doubled),
        lambda x: x.float().contiguous() @ torch.eye(x.shape[1]),
        lambda x: x * float(x.sum() > 0),
    ],
)
def test_torch_arithmetic_between_ops_leaves_the_step_unrecorded_and_right(tmp_path: Path, outside: object) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), method="exact", activation="relu")
    inner = engine.model.blocks[1].ffn

    class Edited(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
            return outside(inner(x, residual))  # type: ignore[operator]

    engine.model.blocks[1].ffn = Edited()
    step = step_that_follows_the_model(engine)
    assert not step.recorded
    assert step.reason is not None
    assert sparsify.layer_densities(engine.model)[0].tokens == 2 * len(TOKENS), "the attempt to record counts nothing"


def test_what_an_op_has_to_copy_leaves_the_step_unrecorded(tmp_path: Path) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), method="dense")
    inner = engine.model.blocks[1].ffn

    class Interleaved(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
            halves = inner(x, residual).view(1, -1, 2).transpose(1, 2)  # a view that is not contiguous
            return ops.add(halves, halves).view(1, -1)

    engine.model.blocks[1].ffn = Interleaved()
    step = step_that_follows_the_model(engine)
    assert not step.recorded
    assert "copy" in str(step.reason)


def test_a_model_with_hooks_is_not_recorded_and_its_hooks_see_every_token(tmp_path: Path) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), method="dense")
    seen: list[torch.Tensor] = []
    engine.model.blocks[0].ffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with engine.computing():
        step = DecodeStep(engine.model, engine.model.new_cache())
        for token in TOKENS:
            step(token)
    assert len(seen) == len(TOKENS)
    assert "hooks" in str(step.reason)


def test_a_module_that_branches_on_values_says_so_and_is_not_recorded(tmp_path: Path) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), method="dense")
    inner = engine.model.blocks[1].ffn

    class Branching(torch.nn.Module):
        data_dependent = True

        def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
            y = inner(x, residual)
            return y if float(x[0, 0]) > 0 else ops.add(y, y)

    engine.model.blocks[1].ffn = Branching()
    step = step_that_follows_the_model(engine)
    assert not step.recorded
    assert "by values" in str(step.reason)


def test_ops_of_other_families_are_recorded() -> None:
    x = torch.randn(1, 64)
    weight, bias = torch.randn(64), torch.randn(64)
    matrix = cases.random_blocks(torch.Generator().manual_seed(1), BY_NAME["Q8_0"], 64, 64)

    def compute() -> torch.Tensor:
        normed = ops.layer_norm(x, weight, bias, eps=1e-5, residual=x)
        return ops.softcap(ops.quant_matmul(normed, matrix, bias), 0.5)

    with record(1) as program:
        out = compute()
    assert len(program) == 3
    x.copy_(torch.randn(1, 64))
    program.run()
    assert torch.equal(out, compute())


def test_other_conditions_record_anew(tmp_path: Path) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), "float32", method="dense")
    plain_cache, cache = engine.model.new_cache(), engine.model.new_cache()
    step = DecodeStep(engine.model, cache)
    for i, token in enumerate(TOKENS):
        with engine.computing(), use_int8(i >= 4):
            assert torch.equal(step(token), engine.model(torch.tensor([token]), plain_cache))
    assert step.recorded


def test_another_backend_is_not_recorded(tmp_path: Path) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), method="dense", backend="reference")
    with engine.computing():
        step = DecodeStep(engine.model, engine.model.new_cache())
        step(1)
        step(2)
    assert not step.recorded
    assert "did not run on the core" in str(step.reason)


def test_a_step_past_the_cache_or_the_vocabulary_is_refused(tmp_path: Path) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), method="dense", context=4)
    with engine.computing():
        step = DecodeStep(engine.model, engine.model.new_cache())
        for bad in (-1, engine.model.embedding.rows):
            with pytest.raises(ValueError, match="vocabulary"):
                step(bad)
        for token in range(4):
            step(token)
        with pytest.raises(ValueError, match="do not fit the context of 4"):
            step(1)


def test_without_recording_a_models_python_runs_at_every_token(tmp_path: Path) -> None:
    engine = engine_for(write_tiny_llama(tmp_path / "m.gguf"), method="dense")
    inner, seen = engine.model.blocks[0].ffn, []

    class Watched(torch.nn.Module):
        def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
            seen.append(1)
            return inner(x, residual)

    engine.model.blocks[0].ffn = Watched()
    with engine.computing():
        step = DecodeStep(engine.model, engine.model.new_cache(), record=False)
        for token in TOKENS:
            step(token)
    assert len(seen) == len(TOKENS)
    assert "switched off" in str(step.reason)
