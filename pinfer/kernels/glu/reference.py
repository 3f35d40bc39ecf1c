"""The gate of an FFN: act(gate) · up (Shazeer 2020), dReLU's relu(gate) · relu(up), in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import activate, hidden_of


def glu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, activation: str, magnitude: bool = False
) -> torch.Tensor:
    """act(gate) · up, its up clamped for dReLU, or act(gate) without `up`; with `magnitude`, |act(gate)|, what CATS ranks neurons by.

    gate, up: float32 [T, N]. Returns float32 [T, N].
    """
    check_inputs(gate, up, magnitude)
    return activate(activation, gate).abs() if magnitude else hidden_of(activation, gate, up)


def check_inputs(gate: torch.Tensor, up: torch.Tensor | None, magnitude: bool) -> None:
    """ValueError unless the inputs belong together; every implementation calls it."""
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up is {list(up.shape)}, expected gate's {list(gate.shape)}")
    if up is not None and magnitude:
        raise ValueError("a magnitude is of the activation alone: give no up")
