"""GGUF files: open one by its header, and view its weights in the mapped file without copying them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.fused import split_fused
from pinfer.formats.gguf_header import MAGIC, MAX_TENSORS, POWERINFER_MAGIC, Header, TensorEntry, read_header
from pinfer.formats.model_file import ModelFile, Part, TensorInfo, map_file
from pinfer.quant import BY_ID, QUANT_TYPES

MIN_ALIGNMENT = 8
MAX_ALIGNMENT = 1 << 20
MAX_PARTS = 1024

# Types of ggml that nothing here computes on, named so that the message can say what a file holds.
UNSUPPORTED_TYPES = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M",
    31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


class GGUFFile(ModelFile):
    """An open GGUF file, or all files of a split one (see `ModelFile`)."""

    def __init__(self, path: Path, header: Header, tensors: Mapping[str, TensorInfo], parts: Sequence[Part]) -> None:
        super().__init__(path, header.metadata, tensors, parts)
        self.version = header.version

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Read the header of `path`, and of all parts where it is one of a split model (`.path` is the first then), and
        check where every tensor lies, reading no weights.

        Raises FileNotFoundError, and FormatError for a file that is not sound GGUF v2 or v3, holds
        a tensor type that cannot be computed, or is one of parts that do not belong together.
        """
        path = Path(path)
        file = map_file(path)
        header = read_header(file, path, (MAGIC, POWERINFER_MAGIC))
        if header.metadata.get("split.count", 0) not in (0, 1):
            first, parts, found = _open_split(path, header)
        else:
            first, parts, found = header, [Part(path, file)], _layout(path, header, len(file))
        return cls(parts[0].path, first, split_fused(first.metadata, found), parts)

    @property
    def format(self) -> str:
        return f"GGUF v{self.version}"


def _open_split(path: Path, header: Header) -> tuple[Header, list[Part], dict[str, TensorInfo]]:
    """The first part's header, which has the metadata, all parts, and where all tensors lie."""
    count, expected = _split_key(path, header, "split.count"), _split_key(path, header, "split.tensors.count")
    headers, parts = [], []
    tensors: dict[str, TensorInfo] = {}
    for number, one in enumerate(_part_paths(path, _split_key(path, header, "split.no"), count)):
        try:
            file = map_file(one)
        except FileNotFoundError:
            raise FormatError(f"{path}: part {number + 1} of {count} is missing: {one.name}") from None
        headers.append(read_header(file, one))
        stated = {"split.no": number, "split.count": count, "split.tensors.count": expected}
        for key, value in stated.items():
            if (found := _split_key(one, headers[-1], key)) != value:
                raise FormatError(f"{one}: {key} is {found}, not {value}: it is no part of the model of {path.name}")
        for name, info in _layout(one, headers[-1], len(file)).items():
            if name in tensors:
                raise FormatError(f"{one}: tensor {shown(name)} is in part {tensors[name].part + 1} as well")
            tensors[name] = dataclasses.replace(info, part=number)
        parts.append(Part(one, file))
    if len(tensors) != expected:
        raise FormatError(f"{path}: the parts hold {len(tensors)} tensors, split.tensors.count is {expected}")
    return headers[0], parts, tensors


def _split_key(path: Path, header: Header, key: str) -> int:
    value = header.metadata.get(key)
    if type(value) is not int or not 0 <= value <= MAX_TENSORS:
        what = "missing" if value is None else shown(str(value))
        raise FormatError(f"{path}: metadata key {key!r} is {what}; it must be a count")
    return value


def _part_paths(path: Path, number: int, count: int) -> list[Path]:
    """All parts of the split model that `path` is part `number` of, counted from 0."""
    if not 1 <= count <= MAX_PARTS:
        raise FormatError(f"{path}: split.count is {count}; 1 to {MAX_PARTS} are supported")
    ending = f"-{number + 1:05d}-of-{count:05d}.gguf"
    if not path.name.endswith(ending) or path.name == ending:
        raise FormatError(f"{path}: a part of a split model; its name must end in {ending}, for the others to be found")
    prefix = path.name.removesuffix(ending)
    return [path.with_name(f"{prefix}-{one + 1:05d}-of-{count:05d}.gguf") for one in range(count)]


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
