"""What every kind of model file answers: its metadata and its tensors, in GGUF's names.

A GGUF file, a Hugging Face folder and a PowerInfer file are all read through `ModelFile`, so that nothing above knows
which of them a model came from, and writing one of them as GGUF is all there is to converting it.
"""

from __future__ import annotations

import mmap
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, overload

import torch

from pinfer.formats.errors import FormatError, shown
from pinfer.quant import BF16, F16, F32, QuantTensor, QuantType

FLOAT_DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}

MADE = -1  # the part of a tensor that no part holds, made whenever it is asked for

T = TypeVar("T")
D = TypeVar("D")
_REQUIRED: Any = object()


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` slowest first (`[rows, columns]`), `offset` from the start of the part it is in.

    One that a folder's tensors are rearranged for lies nowhere: its part is MADE, its offset 0.
    """

    name: str
    shape: tuple[int, ...]
    type: QuantType
    offset: int
    nbytes: int
    part: int = 0

    @property
    def columns(self) -> int:
        return self.shape[-1]


class Part:
    """One file on the disk, mapped read-only: `data` uint8 [bytes] is all of it. A model has one or several.

    `header_bytes` is where its weights begin, None where its tensors tell.
    """

    header_bytes: int | None = None

    def __init__(self, path: Path, file: mmap.mmap) -> None:
        self.path, self.data = path, _as_tensor(file)


class ModelFile(ABC):
    """An open model: `metadata` under GGUF's keys, `tensors` under GGUF's names, `parts` on the disk.

    The parts are mapped read-only; a page of weights is read when it is first used, and tensors
    handed out keep the mapping alive after `close`. They must not be written to.
    """

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], parts: Sequence[Part]
    ) -> None:
        self.path = path
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
        self.tensors: Mapping[str, TensorInfo] = tensors
        self._parts: tuple[Part, ...] | None = tuple(parts)

    @property
    @abstractmethod
    def format(self) -> str:
        """The kind of file, for people: "GGUF v3"."""

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; it stays mapped until the last tensor taken from it is gone."""
        self._parts = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """ValueError once the file is closed."""
        if self._parts is None:
            raise ValueError(f"{self.path} is closed")
        return self._parts

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
        """The matrix `name` `[rows, columns]` as a view of the file; a vector is a matrix of one row.

        A stack of matrices `[experts, rows, columns]` is one matrix, the rows of one expert after those of another.
        """
        info = self.info(name)
        if len(info.shape) > 3:
            raise self.error(f"tensor {shown(name)} has shape {list(info.shape)}, which is no matrix")
        blocks = self._bytes(info).view(-1, info.type.row_bytes(info.columns))
        return QuantTensor(blocks, info.type, info.columns)

    def expert(self, name: str, number: int) -> QuantTensor:
        """One matrix `[rows, columns]` of the stack `name`, as a view of the file."""
        info, stack = self.info(name), self.tensor(name)
        if len(info.shape) != 3 or not 0 <= number < info.shape[0]:
            raise self.error(f"tensor {shown(name)} {list(info.shape)} has no matrix {number}")
        return stack[number * info.shape[1] : (number + 1) * info.shape[1]]

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

    def raw(self, name: str) -> torch.Tensor:
        """All bytes of a tensor of any shape, uint8 [n], as they are to be written into a GGUF file."""
        return self._bytes(self.info(name))

    def _bytes(self, info: TensorInfo) -> torch.Tensor:
        return self.parts[info.part].data[info.offset : info.offset + info.nbytes]


def map_file(path: Path) -> mmap.mmap:
    """A file mapped read-only; FileNotFoundError, or FormatError for what is no file, or empty."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise FormatError(f"{path}: this is {kind}, not a file")
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
