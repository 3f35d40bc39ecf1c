"""The gate of an FFN: act(gate) · up (Shazeer 2020), dReLU's relu(gate) · relu(up), in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import hidden_of
from pinfer.kernels.quant_matmul.reference import check_per_row


def glu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    activation: str,
    magnitude: bool = False,
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> torch.Tensor:
    """act(gate) · up, its up clamped for dReLU, or act(gate) without `up`.

    gate, up:  float32 [T, N].
    magnitude: |act(gate)| instead, what CATS ranks neurons by.
    shift:     float32 [N] or None: taken off act(gate) first.
    gate_bias: float32 [N] or None: added to gate before the activation, where the product has not brought it.
    cutoff:    of FATReLU, for relu alone (see `activation`).

    Returns float32 [T, N].
    """
    check_inputs(gate, up, magnitude, shift, gate_bias)
    gate = gate if gate_bias is None else gate + gate_bias
    hidden = hidden_of(activation, gate, up, shift, cutoff)
    return hidden.abs() if magnitude else hidden


def check_inputs(
    gate: torch.Tensor,
    up: torch.Tensor | None,
    magnitude: bool,
    shift: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
) -> None:
    """ValueError unless the inputs belong together; every implementation calls it."""
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"up is {list(up.shape)}, expected gate's {list(gate.shape)}")
    if up is not None and magnitude:
        raise ValueError("a magnitude is of the activation alone: give no up")
    check_per_row("shift", shift, gate.shape[-1])
    check_per_row("gate_bias", gate_bias, gate.shape[-1])
