"""softcap on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import Softcap, floats, pointer, run
from pinfer.kernels.softcap.reference import check_cap

MULTIPLICATIONS_EACH = 16  # an exponential and two divisions cost about as much


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    check_cap(cap)
    x = floats(x)
    out = torch.empty(x.shape)
    run(Softcap(pointer(x), x.numel(), cap, pointer(out)), MULTIPLICATIONS_EACH * x.numel(), x, out)
    return out
