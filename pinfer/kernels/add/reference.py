"""Sum of two activations, in plain torch: an op, so that a recorded program holds it."""

from __future__ import annotations

import torch


def add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a, b: float32 of one shape. Returns float32 as they are; ValueError if the shapes differ."""
    check_inputs(a, b)
    return a + b


def check_inputs(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"cannot add {list(b.shape)} to {list(a.shape)}: the shapes differ")
