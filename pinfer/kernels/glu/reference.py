"""The gate of an FFN: act(gate) · up (Shazeer 2020), dReLU's relu(gate) · relu(up), in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import hidden_of


def glu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    activation: str,
    magnitude: bool = False,
    shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """act(gate) · up, its up clamped for dReLU, or act(gate) without `up`.

    gate, up:  float32 [T, N].
    magnitude: |act(gate)| instead, what CATS ranks neurons by.
    shift:     float32 [N] or None: taken off act(gate) first.

    Returns float32 [T, N].
    """
    check_inputs(gate, up, magnitude, shift)
    hidden = hidden_of(activation, gate, up, shift)
    return hidden.abs() if magnitude else hidden


def check_inputs(gate: torch.Tensor, up: torch.Tensor | None, magnitude: bool, shift: torch.Tensor | None) -> None:
    """ValueError unless the inputs belong together; every implementation calls it."""
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up is {list(up.shape)}, expected gate's {list(gate.shape)}")
    if up is not None and magnitude:
        raise ValueError("a magnitude is of the activation alone: give no up")
    check_shift(shift, gate.shape[-1])


def check_shift(shift: torch.Tensor | None, neurons: int) -> None:
    """ValueError unless a shift has a float32 for each neuron."""
    if shift is not None and (shift.shape != (neurons,) or shift.dtype != torch.float32):
        raise ValueError(f"shift is {shift.dtype} {list(shift.shape)}, expected torch.float32 [{neurons}]")
