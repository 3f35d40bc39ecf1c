"""layer_norm: x less its mean over its deviation · weight, with an optional bias and residual added."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.layer_norm.reference import layer_norm as reference
from pinfer.kernels.registry import Op


def _make_inputs(
    generator: torch.Generator,
    *,
    tokens: int,
    width: int,
    heads: int | None = None,
    biased: bool = True,
    added: bool = False,
    mean: float = 1.0,
) -> dict[str, Any]:
    shape = (tokens, width) if heads is None else (tokens, heads, width)
    return {
        "x": cases.random_floats(generator, *shape) + mean,
        "weight": cases.random_floats(generator, width),
        "bias": cases.random_floats(generator, width) if biased else None,
        "eps": 1e-5,
        "residual": cases.random_floats(generator, *shape) if added else None,
    }


def _bytes_moved(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    **_: Any,
) -> int:
    return 4 * ((3 if residual is not None else 2) * x.numel() + (2 if bias is not None else 1) * weight.numel())


OP = Op(
    name="layer_norm",
    reference=reference,
    triton="pinfer.kernels.layer_norm.gpu:layer_norm",
    cpu="pinfer.kernels.layer_norm.cpu:layer_norm",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "width": 640},
        {"tokens": 3, "width": 123, "added": True},
        {"tokens": 3, "width": 123, "biased": False},
        {"tokens": 2, "width": 31, "heads": 5, "biased": False, "added": True},
        {"tokens": 2, "width": 5},
        {"tokens": 2, "width": 17_001, "added": True},
        {"tokens": 1, "width": 17_001, "biased": False},
    ),
    bench_cases=({"tokens": 1, "width": 4096},),
    bytes_moved=_bytes_moved,
    tolerance=1e-6,
)
