"""tally_kept on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import TallyKept, floats, pointer, run
from pinfer.kernels.tally_kept.reference import check_inputs


def tally_kept(x: torch.Tensor, threshold: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    check_inputs(x, threshold, totals)
    x, threshold = floats(x), floats(threshold)
    run(TallyKept(pointer(x), *x.shape, pointer(threshold), pointer(totals)), 1, x, threshold, totals)
    return totals
