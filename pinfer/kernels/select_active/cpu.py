"""select_active on the CPU core: one pass without branches."""

from __future__ import annotations

import ctypes

import torch

from pinfer.kernels.cpp.binding import floats, pointer
from pinfer.kernels.cpp.build import load_core
from pinfer.kernels.select_active.reference import Active


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    tokens, neurons = scores.shape
    if threshold.numel() not in (1, neurons):
        raise ValueError(f"threshold has {threshold.numel()} entries, expected 1 or {neurons}")
    scores, threshold = floats(scores), floats(threshold)
    indices = torch.empty(neurons, dtype=torch.int32)
    count = load_core().pinfer_select_active(
        pointer(scores), ctypes.c_int64(tokens), ctypes.c_int64(neurons),
        pointer(threshold), ctypes.c_int64(int(threshold.numel() > 1)), pointer(indices),
    )  # fmt: skip
    return Active(indices, torch.tensor([count], dtype=torch.int32))
