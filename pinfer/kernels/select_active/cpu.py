"""select_active on the CPU core: one pass without branches."""

from __future__ import annotations

import ctypes

import torch

from pinfer.kernels.cpp.binding import floats, pointer
from pinfer.kernels.cpp.build import load_core
from pinfer.kernels.select_active.reference import Active, check_inputs


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    check_inputs(scores, threshold)
    tokens, neurons = scores.shape
    scores, threshold = floats(scores), floats(threshold)
    indices = torch.empty(neurons, dtype=torch.int32)
    count = load_core().pinfer_select_active(
        pointer(scores), ctypes.c_int64(tokens), ctypes.c_int64(neurons),
        pointer(threshold), ctypes.c_int64(int(threshold.numel() > 1)), pointer(indices),
    )  # fmt: skip
    return Active(indices, torch.tensor([count], dtype=torch.int32))
