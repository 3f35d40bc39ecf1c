"""dequantize on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import Dequantize, matrix, pointer, run
from pinfer.quant import QuantTensor


def dequantize(weight: QuantTensor) -> torch.Tensor:
    out = torch.empty(weight.rows, weight.columns)
    run(Dequantize(matrix(weight), pointer(out)), out.numel(), weight.blocks, out)
    return out
