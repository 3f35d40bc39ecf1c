"""What can be timed: every implementation of a task with its inputs, its reference and its bytes.

A task is what is computed (an FFN, a matrix product); a candidate is one way to do it. Our ops, the
dense chains and the two published schemes all take this form, so that one loop checks and times them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from bench.baselines import deja_vu, dense, teal
from bench.gpu.trees import repacked
from pinfer.kernels import cases, ops
from pinfer.kernels.registry import Op
from pinfer.quant import BY_NAME

FFN = "ffn"
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
HALF_TOLERANCE = 0.02  # fp16 or bf16 results and sums; a wrong index or mask is off by far more
ACTIVATION = "silu"  # no activation is zero, so that every listed row is read to its end


def unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Candidate:
    """One implementation of a task.

    make_inputs: `(generator, **case) -> kwargs` for `reference`; `prepare` turns them into those of `run`.
    variants:    launch parameters to choose from by measuring, as further kwargs of `run`.
    repeatable:  whether two runs must agree bit by bit.
    dense:       whether it computes everything and so is a baseline for speed-ups of its task.
    needs:       ops whose failed check refuses its timing.
    compared:    what of a result is held against the reference's.
    """

    task: str
    provider: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    make_inputs: Callable[..., dict[str, Any]]
    bytes_moved: Callable[..., int]
    tolerance: float
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = unchanged
    variants: tuple[Mapping[str, Any], ...] = ({},)
    repeatable: bool = True
    dense: bool = False
    needs: tuple[str, ...] = ()
    compared: Callable[[Any], Any] = unchanged
    jit: bool = True  # whether Triton can compile it ahead

    @property
    def name(self) -> str:
        return f"{self.task}/{self.provider}"


def op_named(name: str) -> Op | None:
    """The op of the registry with a Triton implementation, or None where this tree has none."""
    return next((op for op in ops.OPS if op.name == name and op.triton is not None), None)


def of_op(op: Op, task: str | None = None) -> Candidate:
    """Our Triton implementation of an op, over repacked weights."""
    return Candidate(
        task=task or op.name,
        provider="pinfer",
        run=lambda **inputs: op.implementation("triton")(**inputs),
        reference=op.reference,
        make_inputs=op.make_inputs,
        bytes_moved=op.bytes_moved,
        tolerance=op.tolerance,
        prepare=repacked,
        needs=(op.name,),
    )


def _dense_ffn_inputs(
    generator: torch.Generator, *, type: str, tokens: int, neurons: int, width: int
) -> dict[str, Any]:
    kind = BY_NAME[type]
    return {
        "x": cases.random_floats(generator, tokens, width),
        "gate": cases.random_blocks(generator, kind, neurons, width),
        "up": cases.random_blocks(generator, kind, neurons, width),
        "down": cases.random_blocks(generator, kind, width, neurons),
    }


def _dense_ffn(backend: str) -> Callable[..., torch.Tensor]:
    def run(x: torch.Tensor, gate: Any, up: Any, down: Any) -> torch.Tensor:
        matmul, glu = (op.implementation(backend) for op in (ops.quant_matmul, ops.glu))
        return matmul(glu(matmul(x, gate), matmul(x, up), activation=ACTIVATION), down)

    return run


def _dense_ffn_bytes(x: torch.Tensor, gate: Any, up: Any, down: Any) -> int:
    return gate.nbytes + up.nbytes + down.nbytes + 8 * x.numel()


def _half_matmul_inputs(
    generator: torch.Generator, *, type: str, tokens: int, rows: int, columns: int
) -> dict[str, Any]:
    x = torch.randn(tokens, columns, generator=generator, device=generator.device)
    weight = torch.randn(rows, columns, generator=generator, device=generator.device) / columns**0.5
    return {"x": x.to(DTYPES[type]), "weight": weight.to(DTYPES[type])}


def _dense_half(provider: str, run: Callable[..., Any], **options: Any) -> Candidate:
    """A dense chain in fp16 or bf16, by the cell's type."""

    def make_inputs(generator: torch.Generator, *, type: str, **case: Any) -> dict[str, Any]:
        return dense.make_inputs(generator, dtype=DTYPES[type], **case)

    return Candidate(
        FFN, provider, run, dense.reference, make_inputs, dense.bytes_moved, HALF_TOLERANCE,
        repeatable=False, dense=True, jit=False, **options,
    )  # fmt: skip


def _scheme(provider: str, module: Any, run: Callable[..., Any]) -> Candidate:
    """A published scheme, in fp16; in the interpreter, whose atomics know no fp16, in fp32."""

    def make_inputs(generator: torch.Generator, **case: Any) -> dict[str, Any]:
        dtype = torch.float16 if generator.device.type == "cuda" else torch.float32
        return module.make_inputs(generator, dtype=dtype, **case)

    return Candidate(
        FFN, provider, run, module.reference, make_inputs, module.bytes_moved, HALF_TOLERANCE,
        variants=module.VARIANTS, repeatable=False,
    )  # fmt: skip


@cache
def candidates() -> dict[str, Candidate]:
    """Everything this tree can time, by name; ops without a Triton implementation are absent."""
    made = [
        _dense_half("cublas", dense.chain, variants=dense.VARIANTS),
        _dense_half("torch-compile", dense.compiled, prepare=dense.forgotten),
        _scheme("teal", teal, teal.teal_ffn),
        _scheme("deja-vu", deja_vu, deja_vu.deja_vu_ffn),
        Candidate(
            "predictor", "deja-vu", deja_vu.predict, deja_vu.predict_reference, deja_vu.predictor_inputs,
            deja_vu.predictor_bytes, HALF_TOLERANCE, repeatable=False, jit=False, compared=lambda best: best[0],
        ),
        Candidate(
            "quant_matmul", "cublas", linear, lambda x, weight: linear(x.float(), weight.float()).to(x.dtype),
            _half_matmul_inputs, lambda x, weight: x.element_size() * (weight.numel() + x.numel() + weight.shape[0]),
            HALF_TOLERANCE, repeatable=False, dense=True, jit=False,
        ),
    ]  # fmt: skip
    if op_named("quant_matmul"):
        made.append(
            Candidate(
                FFN, "pinfer-dense", _dense_ffn("triton"), _dense_ffn("reference"), _dense_ffn_inputs,
                _dense_ffn_bytes, 1e-5, prepare=repacked, dense=True, needs=("quant_matmul", "glu"),
            )
        )  # fmt: skip
    for op in ops.OPS:
        if op.triton is not None:
            made.append(of_op(op, FFN if op.name == "sparse_ffn" else None))
    return {candidate.name: candidate for candidate in made}


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight)
