"""rms_norm on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import RMSNorm, floats, pointer, run
from pinfer.kernels.rms_norm.reference import check_inputs


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    check_inputs(x, weight, residual)
    x, weight = floats(x), floats(weight)
    residual = None if residual is None else floats(residual)
    out = torch.empty(x.shape)
    columns = weight.numel()
    rows = x.numel() // max(1, columns)
    arguments = RMSNorm(pointer(x), pointer(weight), pointer(residual), rows, columns, eps, pointer(out))
    run(arguments, x.numel(), x, weight, residual, out)
    return out
