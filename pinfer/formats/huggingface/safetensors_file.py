"""safetensors files: the header read within limits, so that tensors are found in the mapped file without a copy.

Layout: u64 length of the header, the header as JSON (name -> dtype, shape, and the two ends of its bytes, counted from
behind the header; `__metadata__` holds strings), then the tensors.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.formats.errors import POINTER, FormatError, is_pointer, shown
from pinfer.formats.model_file import Part, map_file
from pinfer.quant import BF16, F16, F32, QuantType

MAX_HEADER_BYTES = 32 << 20  # a third of the library's limit: as JSON it takes some ten times as much memory
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
TYPES: dict[str, QuantType] = {"F32": F32, "F16": F16, "BF16": BF16}
NAMES = {kind: name for name, kind in TYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a file states it; `offset` from the start of the file, `part` its place in the model."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int


class Shard(Part):
    """One mapped safetensors file: what its header says lies in it, and where."""

    def __init__(self, path: Path, number: int) -> None:
        """FileNotFoundError, and FormatError naming the tensor for a file that is not sound."""
        super().__init__(path, map_file(path))
        self.tensors = {stored.name: stored for stored in self._read(number)}

    def _read(self, number: int) -> list[Stored]:
        size = self.data.numel()
        if is_pointer(self.data[:64].numpy().tobytes()):
            raise FormatError(f"{self.path}: {POINTER}")
        length = int.from_bytes(self.data[:8].numpy().tobytes(), "little") if size >= 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise FormatError(
                f"{self.path}: a header of {length} bytes is announced; a safetensors file of {size} bytes "
                f"has 2 to {max(2, min(size - 8, MAX_HEADER_BYTES))}"
            )
        self.header_bytes = 8 + length
        header = self._parse(self.data[8 : 8 + length].numpy().tobytes())
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise FormatError(
                f"{self.path}: the header names {len(header)} tensors; at most {MAX_TENSORS} are supported"
            )
        found = [self._entry(name, fields, 8 + length, number) for name, fields in header.items()]
        end = 8 + length
        for stored in sorted(found, key=lambda one: (one.offset, one.nbytes)):
            if stored.offset < end:
                raise FormatError(f"{self.path}: tensor {shown(stored.name)} overlaps another at byte {stored.offset}")
            end = stored.offset + stored.nbytes
        return found

    def _parse(self, raw: bytes) -> dict[str, Any]:
        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=self._unique)
        except FormatError:
            raise
        except (ValueError, RecursionError) as problem:
            raise FormatError(f"{self.path}: the header is not JSON: {shown(str(problem))}") from None
        if not isinstance(header, dict):
            raise FormatError(f"{self.path}: the header is no object but {type(header).__name__}")
        return header

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, value in pairs:
            if name in fields:
                raise FormatError(f"{self.path}: the header names {shown(name)} twice")
            fields[name] = value
        return fields

    def _entry(self, name: str, fields: Any, start: int, number: int) -> Stored:
        where = f"{self.path}: tensor {shown(name)}"
        if not isinstance(fields, dict):
            raise FormatError(f"{where}: its entry is no object")
        dtype: Any = fields.get("dtype")
        shape: Any = fields.get("shape")
        ends: Any = fields.get("data_offsets")
        if not isinstance(dtype, str):
            raise FormatError(f"{where}: dtype is {shown(repr(dtype))}, not a name")
        if not (_counts(shape) and len(shape) <= MAX_DIMENSIONS):
            raise FormatError(f"{where}: shape is {shown(repr(shape))}, not a list of up to {MAX_DIMENSIONS} sizes")
        if not (_counts(ends) and len(ends) == 2 and ends[0] <= ends[1]):
            raise FormatError(f"{where}: data_offsets is {shown(repr(ends))}, not two byte positions in order")
        if start + ends[1] > self.data.numel():
            raise FormatError(
                f"{where}: data_offsets end at {ends[1]}, past the file's {self.data.numel() - start} bytes of data"
            )
        expected = math.prod(shape) * TYPES[dtype].block_bytes if dtype in TYPES else ends[1] - ends[0]
        if ends[1] - ends[0] != expected:
            raise FormatError(f"{where}: {dtype} {shape} takes {expected} bytes, its data_offsets {ends} say otherwise")
        return Stored(name, dtype, tuple(shape), start + ends[0], expected, number)


def _counts(values: Any) -> bool:
    """Whether a value is a list of whole numbers that are not negative and that 64 bits hold."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...], int]], metadata: dict[str, str]) -> bytes:
    """The head of a file that holds tensors (dtype, shape, bytes) one behind the other, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
