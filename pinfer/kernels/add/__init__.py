"""add: the sum of two activations of one shape."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.add.reference import add as reference
from pinfer.kernels.registry import Op


def _make_inputs(generator: torch.Generator, *, tokens: int, width: int) -> dict[str, Any]:
    return {name: cases.random_floats(generator, tokens, width) for name in ("a", "b")}


def _bytes_moved(a: torch.Tensor, b: torch.Tensor) -> int:
    return 4 * 3 * a.numel()


OP = Op(
    name="add",
    reference=reference,
    triton=None,  # torch's is one launch, which is all there is to win
    cpu="pinfer.kernels.add.cpu:add",
    make_inputs=_make_inputs,
    cases=({"tokens": 1, "width": 123}, {"tokens": 7, "width": 4096}),
    bench_cases=({"tokens": 1, "width": 4096},),
    bytes_moved=_bytes_moved,
    tolerance=1e-7,
)
