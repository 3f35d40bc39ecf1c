"""GGUF files: open one by its header, and view its weights in the mapped file without copying them."""

from __future__ import annotations

import itertools
import mmap
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, overload

import torch

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.gguf_header import Header, TensorEntry, read_header
from pinfer.quant import BF16, BY_ID, F16, F32, QUANT_TYPES, QuantTensor, QuantType

MIN_ALIGNMENT = 8
MAX_ALIGNMENT = 1 << 20
FLOAT_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}

# Types of ggml that nothing here computes on, named so that the message can say what a file holds.
UNSUPPORTED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

T = TypeVar("T")
D = TypeVar("D")
_REQUIRED: Any = object()


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` slowest first (`[rows, columns]`), `offset` from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: QuantType
    offset: int
    nbytes: int

    @property
    def columns(self) -> int:
        return self.shape[-1]


class GGUFFile:
    """An open GGUF file: its metadata, and views of its tensors.

    The file is mapped read-only; a page of weights is read when it is first used, and tensors
    handed out keep the mapping alive after `close`. They must not be written to.
    """

    def __init__(self, path: Path, header: Header, tensors: dict[str, TensorInfo], data: torch.Tensor) -> None:
        self.path = path
        self.version = header.version
        self.metadata: Mapping[str, Any] = MappingProxyType(header.metadata)
        self.tensors = tensors
        self._data: torch.Tensor | None = data

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read the header of `path` and check where every tensor lies, reading no weights.

        Raises FileNotFoundError, and FormatError for a file that is not sound GGUF v2 or v3, holds
        a tensor type that cannot be computed, or is one part of a split model.
        """
        path = Path(path)
        file = _map(path)
        header = read_header(file, path)
        parts = header.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise FormatError(f"{path}: split.count is {parts}; split GGUF is not supported yet, merge the parts first")
        return cls(path, header, _layout(path, header, len(file)), _as_tensor(file))

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; it stays mapped until the last tensor taken from it is gone."""
        self._data = None

    def error(self, problem: str) -> FormatError:
        """The error to raise for a `problem` with this file."""
        return FormatError(f"{self.path}: {problem}")

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def architecture(self) -> str:
        return self.get("general.architecture", str)

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: D) -> T | D: ...
    def get(self, key: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The metadata value of `key`, which must be a `kind`; `default` if the key is missing.

        Integers pass as `float`, booleans do not pass as `int`. Raises FormatError naming the key.
        """
        if key not in self.metadata:
            if default is _REQUIRED:
                raise self.error(f"metadata key {shown(key)} is missing")
            return default
        value = self.metadata[key]
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise self.error(f"metadata key {shown(key)} must be {kind.__name__}, not {type(value).__name__}")
        return value

    @overload
    def get_list(self, key: str, kind: type[T]) -> list[T]: ...
    @overload
    def get_list(self, key: str, kind: type[T], default: D) -> list[T] | D: ...
    def get_list(self, key: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The list at `key`, all of whose items must be of `kind`; otherwise as `get`."""
        if key not in self.metadata and default is not _REQUIRED:
            return default
        values = self.get(key, list)
        for value in values:
            if type(value) is not kind:
                raise self.error(f"metadata key {shown(key)} must hold {kind.__name__}, not {type(value).__name__}")
        return values

    def has(self, name: str) -> bool:
        return name in self.tensors

    def info(self, name: str) -> TensorInfo:
        """Where tensor `name` lies; FormatError if the file has none."""
        if name not in self.tensors:
            raise self.error(f"tensor {shown(name)} is missing")
        return self.tensors[name]

    def tensor(self, name: str) -> QuantTensor:
        """The matrix `name` `[rows, columns]` as a view of the file; a vector is a matrix of one row."""
        info = self.info(name)
        if len(info.shape) > 2:
            raise self.error(f"tensor {shown(name)} has shape {list(info.shape)}, which is no matrix")
        blocks = self._bytes(info).view(-1, info.type.row_bytes(info.columns))
        return QuantTensor(blocks, info.type, info.columns)

    def vector(self, name: str) -> torch.Tensor:
        """The vector `name` as a float32 copy `[n]`; FormatError unless it is F32, F16 or BF16 and finite."""
        info = self.info(name)
        dtype = FLOAT_DTYPES.get(info.type)
        if dtype is None or len(info.shape) != 1:
            raise self.error(f"tensor {shown(name)} is {info.type} {list(info.shape)}, not a vector of floats")
        values = self._bytes(info).clone().view(dtype).float()
        if not bool(values.isfinite().all()):
            raise self.error(f"tensor {shown(name)} holds values that are not finite")
        return values

    def _bytes(self, info: TensorInfo) -> torch.Tensor:
        if self._data is None:
            raise ValueError(f"{self.path} is closed")
        return self._data[info.offset : info.offset + info.nbytes]


def _map(path: Path) -> mmap.mmap:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise FormatError(f"{path}: this is {kind}, not a GGUF file")
    if not status.st_size:
        raise FormatError(f"{path}: the file is empty")
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _as_tensor(file: mmap.mmap) -> torch.Tensor:
    """All bytes of the mapping as a uint8 tensor that owns it.

    A copy-on-write mapping would be writable and spare the filter, but the kernel counts all of it
    against memory: a 40 GB file could not be opened on a machine with 32 GB.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(file, dtype=torch.uint8)


def _layout(path: Path, header: Header, file_bytes: int) -> dict[str, TensorInfo]:
    """Place every tensor in the file, checking alignment, bounds and that none overlap."""
    alignment = _alignment(path, header.metadata)
    data_start = -(-header.end // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for entry in header.entries:
        if entry.offset % alignment:
            raise FormatError(f"{path}: tensor {shown(entry.name)}: offset {entry.offset} is not {alignment}-aligned")
        info = _place(path, entry, data_start)
        if info.offset + info.nbytes > file_bytes:
            raise FormatError(
                f"{path}: tensor {shown(info.name)}: its {info.nbytes} bytes at byte {info.offset} "
                f"pass the file's end at byte {file_bytes}"
            )
        tensors[info.name] = info
    for one, two in itertools.pairwise(sorted(tensors.values(), key=lambda info: info.offset)):
        if one.offset + one.nbytes > two.offset:
            raise FormatError(f"{path}: tensors {shown(one.name)} and {shown(two.name)} overlap at byte {two.offset}")
    return tensors


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is int and MIN_ALIGNMENT <= value <= MAX_ALIGNMENT and value & (value - 1) == 0:
        return value
    limits = f"a power of two from {MIN_ALIGNMENT} to {MAX_ALIGNMENT}"
    found = value if type(value) is int else f"of type {type(value).__name__}"
    raise FormatError(f"{path}: metadata key 'general.alignment' must be {limits}, not {found}")


def _place(path: Path, entry: TensorEntry, data_start: int) -> TensorInfo:
    shape = entry.dimensions[::-1]
    kind = BY_ID.get(entry.type_id)
    if kind is None:
        known = UNSUPPORTED_TYPES.get(entry.type_id, "unknown")
        supported = ", ".join(str(one) for one in QUANT_TYPES)
        raise FormatError(
            f"{path}: tensor {shown(entry.name)}: type {entry.type_id} ({known}) is not supported; {supported} are"
        )
    try:
        nbytes = kind.row_bytes(shape[-1])
    except ValueError as error:
        raise FormatError(f"{path}: tensor {shown(entry.name)}: {error}") from None
    for size in shape[:-1]:
        nbytes *= size
    return TensorInfo(entry.name, shape, kind, data_start + entry.offset, nbytes)
