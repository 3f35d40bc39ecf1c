"""tally on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import Tally, contiguous, pointer, run
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.tally.reference import check_inputs


def tally(active: Active, totals: torch.Tensor, *, tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    check_inputs(totals, tokens, mask)
    mask = None if mask is None else contiguous(mask)
    neurons = 0 if mask is None else mask.shape[1]
    run(Tally(pointer(active.count), pointer(mask), tokens, neurons, pointer(totals)), 1, active, mask, totals)
    return totals
