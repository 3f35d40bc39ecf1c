"""softcap: cap · tanh(x / cap), for the logits of Gemma 2."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.registry import Op
from pinfer.kernels.softcap.reference import softcap as reference


def _make_inputs(
    generator: torch.Generator, *, tokens: int, width: int, cap: float, size: float = 1.0
) -> dict[str, Any]:
    return {"x": size * cases.random_floats(generator, tokens, width), "cap": cap}


def _bytes_moved(x: torch.Tensor, cap: float) -> int:
    return 4 * 2 * x.numel()


OP = Op(
    name="softcap",
    reference=reference,
    triton="pinfer.kernels.softcap.gpu:softcap",
    cpu="pinfer.kernels.softcap.cpu:softcap",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "width": 123, "cap": 30.0},
        {"tokens": 1, "width": 123, "cap": 30.0, "size": 20.0},
        {"tokens": 3, "width": 4111, "cap": 0.7},
        {"tokens": 2, "width": 37, "cap": 1.0, "size": 1e-4},
        {"tokens": 2, "width": 37, "cap": 1e-3, "size": 1e4},
    ),
    bench_cases=({"tokens": 1, "width": 256_000, "cap": 30.0},),
    bytes_moved=_bytes_moved,
    tolerance=1e-6,
)
