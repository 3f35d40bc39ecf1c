"""Writes a model in another weight type: matrix after matrix, in pieces of rows, so that memory holds a few pieces.

Which matrix gets which type is llama.cpp's choice (`formats.type_mix`), how weights are rounded is ours
(`pinfer.quantize`). Every piece is read back and compared, so that the error of what was written is known.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from pinfer.formats import ModelFile
from pinfer.formats.gguf_writer import Outgoing, fuse, metadata_of, stored, write_gguf
from pinfer.formats.pages import is_mapped, release_pages
from pinfer.formats.type_mix import (
    FILE_TYPES,
    QUANTIZATION_VERSION,
    Facts,
    base_type,
    part_of,
    tensor_type,
    wanted_type,
)
from pinfer.kernels.ops import dequantize
from pinfer.quant import F32, QuantTensor, QuantType
from pinfer.quantize import quantize

PIECE_WEIGHTS = 1 << 21  # a thread's at a time: 8 MB of floats, and as much again of what is read back
AHEAD = 2  # pieces for each thread that are begun before the first is written

Fused = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Target:
    """What becomes of one tensor: its type now and then; `wanted` is another where rows of its length cannot have that."""

    name: str
    shape: tuple[int, ...]
    stored: QuantType
    type: QuantType
    wanted: QuantType

    @property
    def kind(self) -> str:
        """Which tensors it is summed up with."""
        return "norms and biases" if len(self.shape) < 2 else part_of(self.name)[0]

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.type.row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])

    @property
    def stored_bytes(self) -> int:
        return self.stored.row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])


@dataclass
class Total:
    """What tensors of one kind came to; errors are 0 for those that were copied."""

    types: Counter[str] = field(default_factory=Counter)
    weights: int = 0
    source_bytes: int = 0
    nbytes: int = 0
    squared_error: float = 0.0
    squared: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights

    @property
    def error(self) -> float:
        """RMS of the difference from the source over RMS of the weights."""
        return math.sqrt(self.squared_error / self.squared) if self.squared else 0.0

    def add(self, target: Target) -> None:
        self.types[target.type.name] += 1
        self.weights += target.weights
        self.source_bytes += target.stored_bytes
        self.nbytes += target.nbytes

    def __add__(self, other: Total) -> Total:
        return Total(
            self.types + other.types,
            self.weights + other.weights,
            self.source_bytes + other.source_bytes,
            self.nbytes + other.nbytes,
            self.squared_error + other.squared_error,
            self.squared + other.squared,
        )


def targets(file: ModelFile, type_name: str, fused: Fused | None = None) -> list[Target]:
    """What becomes of each tensor in a file of that type or mix ("q4_k_m").

    fused: tensors that the written file has as one (name: its parts), which then have one type. ValueError for an
    unknown type.
    """
    facts, found = Facts.of(file), []
    whole = {part: name for name, parts in (fused or {}).items() for part in parts}
    for name, info in file.tensors.items():
        called, now = whole.get(name, name), F32 if len(info.shape) == 1 else info.type
        kind = tensor_type(type_name, called, info.shape, now, facts)
        found.append(Target(name, info.shape, info.type, kind, wanted_type(type_name, called, info.shape, now, facts)))
    return found


def totals(chosen: Iterable[Target]) -> dict[str, Total]:
    """By kind, the largest first."""
    found: dict[str, Total] = {}
    for target in chosen:
        found.setdefault(target.kind, Total()).add(target)
    return dict(sorted(found.items(), key=lambda item: -item[1].nbytes))


def quantize_model(
    file: ModelFile,
    type_name: str,
    path: Path,
    *,
    fused: Fused | None = None,
    threads: int = 1,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Total]:
    """Write the model as a GGUF of that type or mix and return what each kind of tensor came to.

    progress: told of bytes written. ValueError, naming the tensor, for weights that the type cannot hold; OSError where
    the disk has no room, and nothing is left then.
    """
    base_type(type_name)
    chosen = targets(file, type_name, fused)
    found = totals(chosen)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # each worker computes alone
    try:
        with ThreadPoolExecutor(threads) as pool:
            work = _Work(file, pool, threads)
            outgoing = [work.outgoing(target, found[target.kind]) for target in chosen]
            write_gguf(path, _metadata(file, type_name), fuse(outgoing, fused or {}), progress=progress)
    finally:
        torch.set_num_threads(before)
    return found


def _metadata(file: ModelFile, type_name: str) -> dict[str, object]:
    stamp = {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": FILE_TYPES[type_name]}
    return metadata_of(file) | stamp


class _Piece(NamedTuple):
    blocks: torch.Tensor
    squared_error: float
    squared: float


class _Work:
    """The threads that pieces are handed to."""

    def __init__(self, file: ModelFile, pool: ThreadPoolExecutor, threads: int) -> None:
        self._file, self._pool, self._ahead = file, pool, AHEAD * threads

    def outgoing(self, target: Target, total: Total) -> Outgoing:
        """A tensor as it is to be written; `total` gains its error as it is."""
        if target.type is target.stored or len(target.shape) == 1:
            return stored(self._file, target.name)
        return Outgoing(target.name, target.shape, target.type, lambda: self._pieces(target, total))

    def _pieces(self, target: Target, total: Total) -> Iterator[torch.Tensor]:
        raw = self._file.raw(target.name)
        source = QuantTensor(raw.view(-1, target.stored.row_bytes(target.shape[-1])), target.stored, target.shape[-1])
        mapped = is_mapped(raw, self._file)
        step = max(1, PIECE_WEIGHTS // source.columns)
        rows = (source[start : start + step] for start in range(0, source.rows, step))
        begun: list[tuple[QuantTensor, Future[_Piece]]] = []
        while True:
            for part in islice(rows, self._ahead - len(begun)):
                begun.append((part, self._pool.submit(_requantized, part, target)))
            if not begun:
                return
            part, future = begun.pop(0)
            piece = future.result()
            total.squared_error += piece.squared_error
            total.squared += piece.squared
            yield piece.blocks
            if mapped:
                release_pages(part)


def _requantized(part: QuantTensor, target: Target) -> _Piece:
    with torch.inference_mode():
        values = dequantize(part)
        try:
            made = quantize(values, target.type)
        except ValueError as problem:
            raise ValueError(f"tensor {target.name}: {problem}") from problem
        difference = dequantize(made).sub_(values)
        return _Piece(made.blocks, float(difference.square_().sum()), float(values.square_().sum()))
