"""Writes GGUF v3: the header in one piece, then tensor after tensor in pieces, so that no model is ever in memory.

The file appears whole or not at all (`files.appearing`). Metadata are plain Python values, as every `ModelFile` has
them; the value type that GGUF wants beside each is llama.cpp's for the keys in the tables below, and otherwise follows
from the value: bool, string, f32 (f64 where f32 cannot hold it), u32 (i32 below zero, 64 bits where 32 are too few);
whole numbers in lists are i32. So a file that was read is written with the types it had, as far as readers care.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pinfer.files import appearing
from pinfer.formats.model_file import ModelFile
from pinfer.formats.pages import is_mapped, release_bytes
from pinfer.quant import BF16, F16, F32, QuantType

VERSION, ALIGNMENT = 3, 32
PIECE_BYTES = 16 << 20
MAX_NAME_BYTES, MAX_DIMENSIONS = 63, 4  # llama.cpp's, a name ending in a zero byte

U8, U16, U32, I32, FLOAT32, BOOL, STRING, ARRAY, U64, I64, F64 = 0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12
_CODES = {U8: "B", U16: "H", U32: "I", I32: "i", FLOAT32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
_RANGES = {U32: (0, 2**32), I32: (-(2**31), 2**31), U64: (0, 2**64), I64: (-(2**63), 2**63)}
_FLOAT32_MAX = float(torch.finfo(torch.float32).max)

# Keys whose type does not follow from their value: whole names, and endings of an architecture's keys.
_KEY_TYPES = {
    "split.no": U16,
    "split.count": U16,
    "split.tensors.count": I32,
    "split.vram_capacity": U64,
    "general.parameter_count": U64,
    "tokenizer.ggml.precompiled_charsmap": U8,
    "tokenizer.ggml.scores": FLOAT32,
    "tokenizer.ggml.token_type": I32,
    "powerinfer.sparse_threshold": FLOAT32,
}
# A converter that reads 10000 where it may also read 10000.5 must not change the type of the key.
_FLOAT_ENDINGS = (
    "_epsilon",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.local.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_log_multiplier",
    "softcapping",
    "_scale",
    ".scale",
    "clamp_kqv",
    "max_alibi_bias",
)
# What an empty list holds, which no value tells.
_STRING_LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "general.tags", "general.languages")


@dataclass(frozen=True)
class Outgoing:
    """A tensor to be written: `shape` slowest first, and `pieces`, which gives its bytes in order (uint8 tensors)."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return self.type.row_bytes(self.shape[-1]) * math.prod(self.shape[:-1])


def write_gguf(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Outgoing],
    *,
    progress: Callable[[int], None] = lambda _: None,
    magic: bytes = b"GGUF",
) -> int:
    """Write a model; returns the bytes of the file.

    progress: told of bytes as they are written. ValueError, naming the key or tensor, for what GGUF cannot hold and
    for pieces that are not as long as their tensor; OSError where the disk has no room, and nothing is left then.
    """
    path = Path(path)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    header = header_bytes(metadata, tensors, magic=magic)
    total = len(header) + sum(_padded(tensor.nbytes, alignment) for tensor in tensors)
    with appearing(path, total) as file:
        file.write(header)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                file.write(piece.reshape(-1).numpy().data)
                written += piece.nbytes
                progress(piece.nbytes)
            if written != tensor.nbytes:
                raise ValueError(f"tensor {tensor.name!r}: {written} bytes where {tensor.nbytes} are announced")
            file.write(bytes(_padded(written, alignment) - written))
    return total


def header_bytes(metadata: Mapping[str, Any], tensors: Sequence[Outgoing], *, magic: bytes = b"GGUF") -> bytes:
    """All that comes before the weights, up to and with the padding. ValueError as `write_gguf`."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    parts = [magic, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += [_string(key), _keyed(key, value)]
        except ValueError as problem:
            raise ValueError(f"metadata key {key!r}: {problem}") from problem
    offset, seen = 0, set[str]()
    for tensor in tensors:
        _check_tensor(tensor, seen)
        seen.add(tensor.name)
        dimensions = tensor.shape[::-1]
        parts += [_string(tensor.name), struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)]
        parts.append(struct.pack("<IQ", tensor.type.ggml_id, offset))
        offset += _padded(tensor.nbytes, alignment)
    header = b"".join(parts)
    return header + bytes(_padded(len(header), alignment) - len(header))


def _check_tensor(tensor: Outgoing, seen: set[str]) -> None:
    if not 0 < len(tensor.name.encode()) <= MAX_NAME_BYTES or tensor.name in seen:
        raise ValueError(f"tensor {tensor.name!r}: a name must be new and have 1 to {MAX_NAME_BYTES} bytes")
    if not 1 <= len(tensor.shape) <= MAX_DIMENSIONS or 0 in tensor.shape:
        raise ValueError(
            f"tensor {tensor.name!r}: shape {list(tensor.shape)} is not 1 to {MAX_DIMENSIONS} sizes above 0"
        )
    try:
        tensor.type.row_bytes(tensor.shape[-1])
    except ValueError as problem:
        raise ValueError(f"tensor {tensor.name!r}: {problem}") from problem


def _padded(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def _string(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def _keyed(key: str, value: Any) -> bytes:
    """Value type and value of a key."""
    if isinstance(value, (list, tuple)):
        return struct.pack("<I", ARRAY) + _array(key, value)
    kind = _kind(key, [value], U32)
    return struct.pack("<I", kind) + _items(kind, [value])


def _array(key: str, values: Sequence[Any]) -> bytes:
    if any(isinstance(value, (list, tuple)) for value in values):
        return struct.pack("<IQ", ARRAY, len(values)) + b"".join(_array(key, value) for value in values)
    kind = _kind(key, values, I32)
    return struct.pack("<IQ", kind, len(values)) + _items(kind, values)


def _items(kind: int, values: Sequence[Any]) -> bytes:
    if kind == STRING:
        return b"".join(map(_string, values))
    try:
        return struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
    except struct.error as problem:
        raise ValueError(str(problem)) from problem


def _kind(key: str, values: Sequence[Any], whole: int) -> int:
    """The value type of a key's value, or of a list's items; `whole` is that of whole numbers that fit it."""
    types = {type(value) for value in values}
    if not types:
        return STRING if key in _STRING_LISTS else _KEY_TYPES.get(key, whole)
    if types == {str}:
        return STRING
    if types == {bool}:
        return BOOL
    if not types <= {int, float}:
        raise ValueError(f"GGUF has no values of type {' and '.join(sorted(one.__name__ for one in types))}")
    if key in _KEY_TYPES:
        return _KEY_TYPES[key]
    if float in types or key.endswith(_FLOAT_ENDINGS):
        return FLOAT32 if all(abs(value) <= _FLOAT32_MAX or not math.isfinite(value) for value in values) else F64
    for kind in (whole, U32, I32, U64, I64):
        low, end = _RANGES[kind]
        if all(low <= value < end for value in values):
            return kind
    raise ValueError("its whole numbers need more than 64 bits")


# What a model file is written as.


def metadata_of(file: ModelFile) -> dict[str, Any]:
    """A file's metadata as they are to be written into one file: without what tells its parts, and where they lie."""
    return {
        key: value
        for key, value in file.metadata.items()
        if not key.startswith("split.") and key != "general.alignment"
    }


def stored(file: ModelFile, name: str) -> Outgoing:
    """A tensor as the file has it; a vector as F32, as llama.cpp wants norms and biases."""
    info = file.info(name)
    if len(info.shape) == 1 and info.type in (F16, BF16):
        return Outgoing(name, info.shape, F32, lambda: [file.vector(name).view(torch.uint8)])
    return Outgoing(name, info.shape, info.type, lambda: _pieces(file, name))


def stacked(name: str, parts: Sequence[Outgoing]) -> Outgoing:
    """One tensor of the rows of several, as files store fused matrices. ValueError unless types and columns agree."""
    first = parts[0]
    if any((part.type, part.shape[1:]) != (first.type, first.shape[1:]) for part in parts):
        found = ", ".join(f"{part.name} {part.type} {list(part.shape)}" for part in parts)
        raise ValueError(f"{name} cannot be one tensor of {found}: types or columns differ")
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return Outgoing(name, shape, first.type, lambda: (piece for part in parts for piece in part.pieces()))


def fuse(tensors: Iterable[Outgoing], fused: Mapping[str, Sequence[str]]) -> list[Outgoing]:
    """Tensors with those that `fused` names (name: its parts, in order) joined, each where its first part was.

    A fused tensor none of whose parts are there is left out; ValueError where some are.
    """
    named = {tensor.name: tensor for tensor in tensors}
    for name, parts in fused.items():
        there = [part for part in parts if part in named]
        if there and len(there) < len(parts):
            raise ValueError(f"{name} is made of {', '.join(parts)}, of which only {', '.join(there)} are there")
        if there:
            named[parts[0]] = stacked(name, [named[part] for part in parts])
            for part in parts[1:]:
                del named[part]
    return list(named.values())


def _pieces(file: ModelFile, name: str) -> Iterator[torch.Tensor]:
    """A tensor's bytes, by pieces whose pages are let go of once they are written."""
    blocks = file.raw(name)
    mapped = is_mapped(blocks, file)
    for start in range(0, blocks.numel(), PIECE_BYTES):
        piece = blocks[start : start + PIECE_BYTES]
        yield piece
        if mapped:
            release_bytes(piece)
