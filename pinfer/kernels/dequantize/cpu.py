"""dequantize on the CPU core."""

from __future__ import annotations

import ctypes

import torch

from pinfer.kernels.cpp.binding import matrix, pointer, threads
from pinfer.kernels.cpp.build import load_core
from pinfer.quant import QuantTensor


def dequantize(weight: QuantTensor) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.float32)
    load_core().pinfer_dequantize(ctypes.byref(matrix(weight)), pointer(out), threads(out.numel()))
    return out
