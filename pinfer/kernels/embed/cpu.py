"""embed on the CPU core."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import Embed, contiguous, matrix, pointer, run
from pinfer.kernels.embed.reference import check_inputs
from pinfer.quant import QuantTensor


def embed(ids: torch.Tensor, table: QuantTensor, *, scale: float = 1.0) -> torch.Tensor:
    check_inputs(ids, table)
    ids = contiguous(ids)
    out = torch.empty(len(ids), table.columns)
    run(Embed(matrix(table), pointer(ids), len(ids), scale, pointer(out)), out.numel(), ids, table.blocks, out)
    return out
