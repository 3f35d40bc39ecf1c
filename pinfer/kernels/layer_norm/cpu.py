"""layer_norm on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import LayerNorm, floats, pointer, run
from pinfer.kernels.layer_norm.reference import check_inputs


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    check_inputs(x, weight, bias, residual)
    x, weight = floats(x), floats(weight)
    bias, residual = (None if one is None else floats(one) for one in (bias, residual))
    out = torch.empty(x.shape)
    columns = weight.numel()
    arguments = LayerNorm(
        pointer(x), pointer(weight), pointer(bias), pointer(residual), x.numel() // max(1, columns), columns, eps,
        pointer(out),
    )  # fmt: skip
    run(arguments, 2 * x.numel(), x, weight, bias, residual, out)
    return out
