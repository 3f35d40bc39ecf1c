"""rope: rotates heads by their positions' angles."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.registry import Op
from pinfer.kernels.rope.reference import rope as reference


def _make_inputs(
    generator: torch.Generator, *, tokens: int, heads: int, head_dim: int, dim: int, start: int, interleaved: bool
) -> dict[str, Any]:
    angles = cases.random_floats(generator, start + tokens, dim // 2)
    return {
        "x": cases.random_floats(generator, tokens, heads, head_dim),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "start": torch.tensor([start], device=generator.device),
        "interleaved": interleaved,
    }


def _bytes_moved(x: torch.Tensor, cos: torch.Tensor, **_: Any) -> int:
    return 4 * (2 * x.numel() + 2 * x.shape[0] * cos.shape[1])


OP = Op(
    name="rope",
    reference=reference,
    triton="pinfer.kernels.rope.gpu:rope",
    cpu="pinfer.kernels.rope.cpu:rope",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "heads": 4, "head_dim": 64, "dim": 64, "start": 0, "interleaved": True},
        {"tokens": 5, "heads": 3, "head_dim": 32, "dim": 32, "start": 7, "interleaved": False},
        {"tokens": 2, "heads": 1, "head_dim": 20, "dim": 6, "start": 3, "interleaved": False},
        {"tokens": 2, "heads": 2, "head_dim": 20, "dim": 6, "start": 3, "interleaved": True},
        {"tokens": 1, "heads": 9, "head_dim": 256, "dim": 256, "start": 2, "interleaved": False},
        *(
            {"tokens": tokens, "heads": 3, "head_dim": 80, "dim": 32, "start": 5, "interleaved": interleaved}
            for tokens in (1, 7)
            for interleaved in (False, True)
        ),
    ),
    bench_cases=({"tokens": 1, "heads": 32, "head_dim": 128, "dim": 128, "start": 9, "interleaved": True},),
    bytes_moved=_bytes_moved,
    tolerance=1e-6,
)
