"""rms_norm: x / rms(x) · weight, with an optional residual added."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.registry import Op
from pinfer.kernels.rms_norm.reference import rms_norm as reference


def _make_inputs(
    generator: torch.Generator, *, tokens: int, width: int, heads: int | None = None, added: bool = False
) -> dict[str, Any]:
    shape = (tokens, width) if heads is None else (tokens, heads, width)
    return {
        "x": cases.random_floats(generator, *shape),
        "weight": cases.random_floats(generator, width),
        "eps": 1e-5,
        "residual": cases.random_floats(generator, *shape) if added else None,
    }


def _bytes_moved(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, **_: Any) -> int:
    return 4 * ((3 if residual is not None else 2) * x.numel() + weight.numel())


OP = Op(
    name="rms_norm",
    reference=reference,
    triton="pinfer.kernels.rms_norm.gpu:rms_norm",
    cpu="pinfer.kernels.rms_norm.cpu:rms_norm",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "width": 640},
        {"tokens": 3, "width": 123, "added": True},
        {"tokens": 2, "width": 31, "heads": 5},
        {"tokens": 1, "width": 1},
        {"tokens": 2, "width": 17_001, "added": True},
        {"tokens": 1, "width": 17_001},
    ),
    bench_cases=({"tokens": 1, "width": 4096},),
    bytes_moved=_bytes_moved,
    tolerance=1e-6,
)
