"""The activations of FFN gates, in torch; the kernels spell the same formulas in their languages."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
}


def activate(kind: str, gate: torch.Tensor) -> torch.Tensor:
    """Apply a named activation; ValueError for an unknown name."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation {kind!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[kind](gate)
