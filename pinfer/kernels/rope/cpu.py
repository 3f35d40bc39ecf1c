"""rope on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import Rope, floats, pointer, run
from pinfer.kernels.rope.reference import check_inputs


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    check_inputs(x, cos, sin, start)
    x, cos, sin = floats(x), floats(cos), floats(sin)
    tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape)
    arguments = Rope(
        pointer(x), pointer(cos), pointer(sin), pointer(start), tokens, heads, head_dim, 2 * cos.shape[1],
        interleaved, pointer(out),
    )  # fmt: skip
    run(arguments, x.numel(), x, cos, sin, start, out)
    return out
