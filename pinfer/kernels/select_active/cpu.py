"""select_active on the CPU core: one pass without branches."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import SelectActive, floats, pointer, run
from pinfer.kernels.select_active.reference import Active, check_inputs


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    check_inputs(scores, threshold)
    tokens, neurons = scores.shape
    scores, threshold = floats(scores), floats(threshold)
    active = Active(torch.empty(neurons, dtype=torch.int32), torch.empty(1, dtype=torch.int32))
    arguments = SelectActive(
        pointer(scores), tokens, neurons, pointer(threshold), int(threshold.numel() > 1),
        pointer(active.indices), pointer(active.count),
    )  # fmt: skip
    run(arguments, 1, scores, threshold, active)
    return active
