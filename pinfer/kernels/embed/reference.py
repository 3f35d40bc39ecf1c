"""Token embedding: the rows that token ids name, unpacked and scaled, in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.dequantize.reference import dequantize
from pinfer.quant import QuantTensor


def embed(ids: torch.Tensor, table: QuantTensor, *, scale: float = 1.0) -> torch.Tensor:
    """ids: int64 [T] within the table's rows; table: QuantTensor [V, D]. Returns float32 [T, D]."""
    check_inputs(ids, table)
    return dequantize(table[ids]) * scale


def check_inputs(ids: torch.Tensor, table: QuantTensor) -> None:
    """ValueError unless ids is int64 [T] and every one names a row; every implementation calls it.

    Only ids in CPU memory are looked at: a GPU's would have to be waited for.
    """
    if ids.dim() != 1 or ids.dtype != torch.int64:
        raise ValueError(f"ids are {ids.dtype} {list(ids.shape)}, expected torch.int64 [T]")
    if ids.device.type != "cpu":
        return
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < table.rows):
        raise ValueError(f"token ids lie in [{int(ids.min())}, {int(ids.max())}], the table has {table.rows} rows")
