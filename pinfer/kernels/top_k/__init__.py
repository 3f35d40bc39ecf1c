"""top_k: the best k of a row of scores, and whether all are finite."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.registry import Op
from pinfer.kernels.top_k.reference import Best
from pinfer.kernels.top_k.reference import top_k as reference


def _make_inputs(generator: torch.Generator, *, size: int, k: int, ties: bool = False) -> dict[str, Any]:
    scores = cases.random_floats(generator, size)
    return {"scores": scores.round() if ties else scores, "k": k}


def _bytes_moved(scores: torch.Tensor, k: int) -> int:
    return 4 * scores.numel() + 12 * k


OP = Op(
    name="top_k",
    reference=reference,
    # On a GPU torch's stable sort waits for nothing and runs once a token (an estimate: tens of µs for 262,144 scores).
    triton=None,
    cpu="pinfer.kernels.top_k.cpu:top_k",
    make_inputs=_make_inputs,
    cases=(
        {"size": 1, "k": 1},
        {"size": 431, "k": 1},
        {"size": 4000, "k": 40},
        {"size": 333, "k": 100, "ties": True},
        {"size": 300, "k": 300},
    ),
    bench_cases=({"size": 262144, "k": 1}, {"size": 262144, "k": 40}),
    bytes_moved=_bytes_moved,
    tolerance=0,
)

__all__ = ["OP", "Best"]
