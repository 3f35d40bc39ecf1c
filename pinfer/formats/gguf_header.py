"""The header of a GGUF file: magic, version, metadata and tensor entries, read within fixed bounds.

Layout (ggml/docs/gguf.md): magic, u32 version, u64 tensor count, u64 key count; then per key its
name, a u32 value type and the value; then per tensor its name, u32 dimension count, u64
dimensions (fastest first), u32 type and u64 offset. Strings and arrays carry a u64 length. Every
length is compared with the bytes that are left before anything is allocated for it.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.formats.errors import POINTER, FormatError, is_pointer, shown

# The largest header seen, Gemma 4's vocabulary, takes 16 MB with 1.3 million array items.
MAX_HEADER_BYTES = 64 << 20
MAX_ARRAY_ITEMS = 1_500_000
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_KEY_BYTES = (1 << 16) - 1
MAX_NAME_BYTES = 64
MAX_NESTING = 4
RELEASED_BYTES = 1 << 20  # at a time
MAX_DIMENSIONS = 4

_U8, _U32, _U64 = (struct.Struct(code) for code in ("<B", "<I", "<Q"))
_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
_SMALLEST = {code: struct.calcsize(f"<{letter}") for code, letter in _SCALARS.items()} | {_STRING: 8, _ARRAY: 12}
_NESTED_COST = 16  # an inner array takes about as long to read as 16 strings
_MIN_KEY_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

MAGIC, POWERINFER_MAGIC = b"GGUF", b"PWRI"  # the second with the same layout

_OTHER_MAGICS = {
    b"lmgg": "this is the GGML format of before GGUF; convert the model again",
    b"fmgg": "this is the GGMF format of before GGUF; convert the model again",
    b"tjgg": "this is the GGJT format of before GGUF; convert the model again",
    b"PK\x03\x04": "this is a zip archive (perhaps a PyTorch checkpoint), not GGUF",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as the header states it: dimensions fastest first, offset from the data section."""

    name: str
    dimensions: tuple[int, ...]
    type_id: int
    offset: int


@dataclass(frozen=True)
class Header:
    """A whole header; `end` is the first byte behind it."""

    version: int
    metadata: dict[str, Any]
    entries: tuple[TensorEntry, ...]
    end: int


class _Cursor:
    """A position in the mapped file that never passes its end, nor the header's size limit."""

    def __init__(self, file: mmap.mmap, path: Path) -> None:
        self.file = file
        self.path = path
        self.end = min(len(file), MAX_HEADER_BYTES)
        self.pos = 0
        self.where = "the header"
        self.items_left = MAX_ARRAY_ITEMS

    @property
    def left(self) -> int:
        return self.end - self.pos

    def release(self) -> None:
        """Let go of the pages that were read: of a large vocabulary 10 MB, which nothing reads again."""
        if hasattr(mmap, "MADV_DONTNEED") and self.pos:
            self.file.madvise(mmap.MADV_DONTNEED, 0, self.pos)

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self.path}: {self.where}: {problem}")

    def require(self, n_bytes: int) -> None:
        if n_bytes <= self.left:
            return
        if self.end < len(self.file):
            raise self.error(f"the header exceeds {MAX_HEADER_BYTES >> 20} MiB at byte {self.pos}")
        raise self.error(f"{n_bytes} bytes expected at byte {self.pos}, but the file ends at byte {self.end}")

    def number(self, layout: struct.Struct) -> Any:
        self.require(layout.size)
        (value,) = layout.unpack_from(self.file, self.pos)
        self.pos += layout.size
        return value

    def numbers(self, letter: str, count: int) -> list[Any]:
        layout = struct.Struct(f"<{count}{letter}")
        self.require(layout.size)
        values = layout.unpack_from(self.file, self.pos)
        self.pos += layout.size
        return list(values)

    def count(self, what: str, item_bytes: int, most: int) -> int:
        """A u64 count of items of at least `item_bytes` each, so that all can still be in the file."""
        at = self.pos
        count = self.number(_U64)
        if count > most:
            raise self.error(f"{what} {count} at byte {at} is too large (limit {most}, {self.left} bytes left)")
        if count * item_bytes > self.left:
            raise self.error(
                f"{what} {count} at byte {at} is too large for the {self.left} bytes left: the file is cut short or damaged"
            )
        return count

    def string(self, what: str, most: int = MAX_HEADER_BYTES) -> str:
        start = self.pos
        length = self.count(f"length of {what}", 1, most)
        raw = self.file[self.pos : self.pos + length]
        self.pos += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} at byte {start} is not UTF-8: {shown(raw)}") from None

    def strings(self, count: int) -> list[str]:
        """`count` strings in a row; written out because a vocabulary holds 262144 of them."""
        file, end, pos, length_at = self.file, self.end, self.pos, _U64.unpack_from
        values: list[str] = []
        try:
            for _ in range(count):
                start = pos + 8
                if start > end:
                    break
                (length,) = length_at(file, pos)
                if length > end - start:
                    break
                values.append(file[start : start + length].decode())
                pos = start + length
        except UnicodeDecodeError:
            raise self.error(f"item {len(values)} at byte {pos} is not UTF-8") from None
        self.pos = pos
        if len(values) < count:
            self.string(f"item {len(values)}")  # raises, naming the item
        return values


def read_header(file: mmap.mmap, path: Path, magics: tuple[bytes, ...] = (MAGIC,)) -> Header:
    """Read the header of a mapped file, touching nothing behind it.

    Metadata values are Python scalars, `str`, and (nested) lists of these. Raises FormatError for
    anything that is not a well-formed little-endian GGUF v2 or v3 header under one of the `magics`.
    """
    cursor = _Cursor(file, path)
    version = _version(cursor, magics)
    n_tensors = cursor.count("tensor count", _MIN_TENSOR_BYTES, MAX_TENSORS)
    n_keys = cursor.count("metadata key count", _MIN_KEY_BYTES, MAX_KEYS)
    metadata = _metadata(cursor, n_keys)
    entries = _entries(cursor, n_tensors)
    cursor.release()
    return Header(version, metadata, entries, cursor.pos)


def _version(cursor: _Cursor, magics: tuple[bytes, ...]) -> int:
    cursor.require(4)
    magic = cursor.file[:4]
    if magic not in magics:
        if is_pointer(cursor.file[:64]):
            raise FormatError(f"{cursor.path}: {POINTER}")
        raise cursor.error(_OTHER_MAGICS.get(magic, f"the file starts with {magic!r}, not with b'GGUF'"))
    cursor.pos = 4
    version = cursor.number(_U32)
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        raise cursor.error("big-endian GGUF is not supported; convert it with gguf-convert-endian")
    raise cursor.error(f"GGUF version {version} at byte 4 is not supported; 2 and 3 are")


def _metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    released = cursor.pos
    for index in range(n_keys):
        cursor.where = f"metadata key {index} of {n_keys}"
        key = cursor.string("its name", MAX_KEY_BYTES)
        cursor.where = f"metadata key {shown(key)}"
        if not key or key in metadata:
            raise cursor.error("it occurs twice" if key else f"key {index} has an empty name")
        metadata[key] = _value(cursor, cursor.number(_U32))
        if cursor.pos - released > RELEASED_BYTES:
            cursor.release()
            released = cursor.pos
    return metadata


def _value(cursor: _Cursor, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string("its value")
    if kind == _ARRAY:
        return _array(cursor, MAX_NESTING)
    return _scalars(cursor, kind, 1)[0]


def _scalars(cursor: _Cursor, kind: int, count: int) -> list[Any]:
    start = cursor.pos
    values = cursor.numbers(_letter(cursor, kind), count)
    if kind != _BOOL:
        return values
    if count and max(values) > 1:
        raise cursor.error(f"the booleans at byte {start} hold {max(values)}, which is neither 0 nor 1")
    return [bool(value) for value in values]


def _letter(cursor: _Cursor, kind: int) -> str:
    if kind not in _SCALARS:
        raise cursor.error(f"unknown value type {kind} at byte {cursor.pos - 4}")
    return _SCALARS[kind]


def _array(cursor: _Cursor, nesting_left: int) -> list[Any]:
    if not nesting_left:
        raise cursor.error(f"arrays nested more than {MAX_NESTING} deep at byte {cursor.pos}")
    kind = cursor.number(_U32)
    if kind not in _SMALLEST:
        raise cursor.error(f"unknown value type {kind} of array items at byte {cursor.pos - 4}")
    cost = _NESTED_COST if kind == _ARRAY else 1
    count = cursor.count("array length", _SMALLEST[kind], cursor.items_left // cost)
    cursor.items_left -= count * cost
    if kind == _STRING:
        return cursor.strings(count)
    if kind == _ARRAY:
        return [_array(cursor, nesting_left - 1) for _ in range(count)]
    return _scalars(cursor, kind, count)


def _entries(cursor: _Cursor, n_tensors: int) -> tuple[TensorEntry, ...]:
    entries: dict[str, TensorEntry] = {}
    for index in range(n_tensors):
        cursor.where = f"tensor {index} of {n_tensors}"
        name = cursor.string("its name", MAX_NAME_BYTES)
        cursor.where = f"tensor {shown(name)}"
        if not name or name in entries:
            raise cursor.error("it occurs twice" if name else f"tensor {index} has an empty name")
        dimensions = _dimensions(cursor)
        entries[name] = TensorEntry(name, dimensions, cursor.number(_U32), cursor.number(_U64))
    return tuple(entries.values())


def _dimensions(cursor: _Cursor) -> tuple[int, ...]:
    at = cursor.pos
    count = cursor.number(_U32)
    if not 1 <= count <= MAX_DIMENSIONS:
        raise cursor.error(f"{count} dimensions at byte {at}; 1 to {MAX_DIMENSIONS} are allowed")
    dimensions = tuple(cursor.numbers("Q", count))
    if 0 in dimensions:
        raise cursor.error(f"dimensions {list(dimensions)} at byte {at} hold a zero")
    return dimensions
