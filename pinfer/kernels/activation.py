"""The activations of FFNs, in torch; the kernels spell the same formulas in their languages.

An FFN's hidden value is act(gate) · up. dReLU (Bamboo, TurboSparse; Song et al. 2024) clamps the up
product as well, relu(gate) · relu(up): a neuron counts only where both are positive. Without an up
it is ReLU. FATReLU (ProSparse, Song et al. 2024) is ReLU with a `cutoff`: a gate that does not exceed
it gives zero, and one that does stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda g: F.relu(g).square(),
    "drelu": F.relu,
    "gelu": F.gelu,
}
# Exactly zero for every negative gate: such a neuron can be skipped without loss.
ZERO_BELOW_ZERO = ("relu", "relu2", "drelu")
CLAMPS_UP = ("drelu",)
HAS_CUTOFF = ("relu",)


def check_activation(kind: str, cutoff: float = 0.0) -> None:
    """ValueError unless `kind` names an activation that can have this cutoff; every implementation calls it."""
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation {kind!r} is none of {', '.join(ACTIVATIONS)}")
    if not 0 <= cutoff < math.inf:
        raise ValueError(f"cutoff {cutoff} must be a finite number of at least 0")
    if cutoff and kind not in HAS_CUTOFF:
        raise ValueError(f"cutoff {cutoff} has no meaning for activation {kind}: it applies to {', '.join(HAS_CUTOFF)}")


def activate(kind: str, gate: torch.Tensor, cutoff: float = 0.0) -> torch.Tensor:
    """Apply a named activation; ValueError for an unknown name, and for a cutoff that it cannot have."""
    check_activation(kind, cutoff)
    if cutoff:
        return torch.where(gate <= cutoff, 0.0, gate)  # NaN stays NaN
    return ACTIVATIONS[kind](gate)


def hidden_of(
    kind: str,
    gate: torch.Tensor,
    up: torch.Tensor | None,
    shift: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> torch.Tensor:
    """The hidden values of gate and up products [T, N]; act(gate) without `up`. ValueError as `activate`.

    `shift` [N] is taken off the activation: (act(gate) - shift) · up.
    """
    hidden = activate(kind, gate, cutoff)
    if shift is not None:
        hidden = hidden - shift
    if up is None:
        return hidden
    return hidden * (F.relu(up) if kind in CLAMPS_UP else up)
