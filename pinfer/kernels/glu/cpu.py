"""glu on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import check_activation
from pinfer.kernels.cpp.binding import ACTIVATION_CODES, GLU, floats, pointer, run
from pinfer.kernels.glu.reference import check_inputs

MULTIPLICATIONS_EACH = 16  # an exponential and a division cost about as much


def glu(
    gate: torch.Tensor, up: torch.Tensor | None = None, *, activation: str, magnitude: bool = False
) -> torch.Tensor:
    check_inputs(gate, up, magnitude)
    check_activation(activation)
    gate, up = floats(gate), None if up is None else floats(up)
    out = torch.empty(gate.shape)
    arguments = GLU(pointer(gate), pointer(up), gate.numel(), ACTIVATION_CODES[activation], magnitude, pointer(out))
    run(arguments, MULTIPLICATIONS_EACH * gate.numel(), gate, up, out)
    return out
