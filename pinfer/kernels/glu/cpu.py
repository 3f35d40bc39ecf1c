"""glu on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import check_activation
from pinfer.kernels.cpp.binding import ACTIVATION_CODES, GLU, floats, pointer, run
from pinfer.kernels.glu.reference import check_inputs

MULTIPLICATIONS_EACH = 16  # an exponential and a division cost about as much


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
    check_inputs(gate, up, magnitude, shift, gate_bias)
    check_activation(activation, cutoff)
    gate = floats(gate)
    up, shift, gate_bias = (None if one is None else floats(one) for one in (up, shift, gate_bias))
    out = torch.empty(gate.shape)
    arguments = GLU(
        pointer(gate), pointer(up), pointer(shift), pointer(gate_bias), gate.numel(), gate.shape[-1],
        ACTIVATION_CODES[activation], magnitude, cutoff, pointer(out),
    )  # fmt: skip
    run(arguments, MULTIPLICATIONS_EACH * gate.numel(), gate, up, shift, gate_bias, out)
    return out
