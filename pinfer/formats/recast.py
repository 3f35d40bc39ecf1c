"""A model file's weights in another float type, piece by piece, as a writer asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pinfer.formats.gguf_writer import PIECE_BYTES, Outgoing
from pinfer.formats.model_file import FLOAT_DTYPES, ModelFile
from pinfer.formats.pages import is_mapped, release_bytes
from pinfer.quant import F32, QuantTensor, QuantType

Dequantize = Callable[[QuantTensor], torch.Tensor]  # [rows, columns] of any type as float32


def recast(file: ModelFile, name: str, kind: QuantType, dequantize: Dequantize) -> Outgoing:
    """A tensor of any shape as floats of type `kind`.

    ValueError, once its pieces are asked for, where a weight is finite and would not be in that type.
    """
    return Outgoing(name, file.info(name).shape, kind, lambda: pieces(file, name, kind, dequantize))


def pieces(
    file: ModelFile, name: str, kind: QuantType, dequantize: Dequantize, rows: slice = slice(None)
) -> Iterator[torch.Tensor]:
    """The bytes of some rows of a tensor (of a stack: rows of all its matrices, counted through) as floats of `kind`."""
    weight = file.tensor(name)
    mapped = is_mapped(weight.blocks, file)
    start, stop, _ = rows.indices(weight.rows)
    each = max(1, PIECE_BYTES // (F32.row_bytes(weight.columns)))
    for first in range(start, stop, each):
        part = weight[first : min(first + each, stop)]
        yield as_bytes(dequantize(part) if part.type is not kind else part.blocks, kind, file, name)
        if mapped:
            release_bytes(part.blocks)


def as_bytes(values: torch.Tensor, kind: QuantType, file: ModelFile, name: str) -> torch.Tensor:
    """float32 values as the bytes of `kind`; bytes stay as they are."""
    if values.dtype == torch.uint8:
        return values.reshape(-1)
    narrow, limit = values.to(FLOAT_DTYPES[kind]), torch.finfo(FLOAT_DTYPES[kind]).max
    low, high = torch.aminmax(values)
    within = bool(-limit <= low) and bool(high <= limit)  # False for a weight that is not finite to begin with
    if not within and bool((~narrow.isfinite() & values.isfinite()).any()):
        raise ValueError(
            f"{file.path}: tensor {name!r} holds {values.abs().max():.3g}, which {kind} cannot; take bf16 or f32"
        )
    return narrow.reshape(-1).view(torch.uint8)
