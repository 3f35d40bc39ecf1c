"""A model file as a Hugging Face folder: config.json, safetensors in shards with their index, tokenizer files."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pinfer.files import appearing_folder
from pinfer.formats.gguf_writer import Outgoing
from pinfer.formats.huggingface.config_json import Folder
from pinfer.formats.huggingface.names import HEAD, Change, Link, folder_names, folder_order, links
from pinfer.formats.huggingface.safetensors_file import NAMES, header_bytes
from pinfer.formats.huggingface.shards import INDEX, SINGLE
from pinfer.formats.huggingface.tokenizer import write_tokenizer
from pinfer.formats.model_file import FLOAT_DTYPES, ModelFile, TensorInfo
from pinfer.formats.recast import Dequantize, as_bytes, pieces
from pinfer.quant import F16, F32, QuantType

SHARD_BYTES = 5_000_000_000
SMALL_BYTES = 64 << 20  # a router or positions: read whole to see whether a narrower type holds them


def write_folder(
    file: ModelFile,
    path: Path,
    kind: QuantType | None,
    dequantize: Dequantize,
    *,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write a model as a folder that transformers loads; returns the bytes of its weights.

    kind: the type of its weights; None keeps those of floats and makes quantised ones F16. Vectors that GGUF widened
    to F32 are narrowed again where nothing is lost. The folder appears whole or not at all, in place of another one
    only where `replace` says so. FormatError for a model that config.json cannot describe, OSError where the disk has
    no room.
    """
    plan = Plan(file, kind, dequantize)
    tensors = list(plan.tensors())
    total = sum(tensor.nbytes for tensor in tensors)
    with appearing_folder(path, total, replace=replace) as folder:
        _write_json(folder / "config.json", plan.folder.config(FLOAT_DTYPES[plan.usual]))
        _write_json(folder / "generation_config.json", plan.folder.generation())
        _write_shards(folder, tensors, shard_bytes, progress)
        if "tokenizer.ggml.tokens" in file.metadata:
            write_tokenizer(folder, file.metadata)
    return total


def folder_bytes(file: ModelFile, kind: QuantType | None, dequantize: Dequantize) -> int:
    """What the weights of that folder would take."""
    return sum(tensor.nbytes for tensor in Plan(file, kind, dequantize).tensors())


class Plan:
    """Which tensors a folder has, and how each is made of GGUF's; `usual` is the type of most of its weights."""

    def __init__(self, file: ModelFile, kind: QuantType | None, dequantize: Dequantize) -> None:
        self._file, self._kind, self._dequantize = file, kind, dequantize
        self.folder = Folder(file)
        types = Counter[QuantType]()
        for info in file.tensors.values():
            if len(info.shape) > 1:
                types[info.type if info.type in FLOAT_DTYPES else F16] += math.prod(info.shape)
        self.usual = types.most_common(1)[0][0] if kind is None else kind

    def tensors(self) -> Iterator[Outgoing]:
        """In the order of the family's table; FormatError for one that the file lacks."""
        for link in links(self.folder.tensors, self.folder.dims):
            if link.folder == HEAD and self.folder.tied:
                continue
            infos = [self._file.info(name) for name in link.gguf]
            if link.change is Change.STACKED:
                yield from self._experts(link, infos[0])
            elif len(infos[0].shape) == 1 or (infos[0].nbytes <= SMALL_BYTES and self._is_widened(infos)):
                yield self._narrowed(link, infos)
            else:
                yield self._matrix(link, infos)

    def _is_widened(self, infos: list[TensorInfo]) -> bool:
        return len(infos) == 1 and infos[0].type is F32 and infos[0].name.endswith("ffn_gate_inp.weight")

    def _type(self, infos: list[TensorInfo]) -> QuantType:
        """Of a tensor of the folder: the parts' own, the widest where they differ."""
        if self._kind is not None:
            return self._kind
        types = {info.type if info.type in FLOAT_DTYPES else self.usual for info in infos}
        return types.pop() if len(types) == 1 else F32

    def _shape(self, infos: list[TensorInfo]) -> tuple[int, ...]:
        return (sum(info.shape[0] for info in infos), *infos[0].shape[1:])

    def _experts(self, link: Link, info: TensorInfo) -> Iterator[Outgoing]:
        kind, rows = self._type([info]), math.prod(info.shape[1:-1])
        for expert, name in enumerate(folder_names(link, self.folder.dims)):
            some = slice(expert * rows, (expert + 1) * rows)
            yield Outgoing(name, info.shape[1:], kind, self._pieces(info.name, kind, some))

    def _pieces(self, name: str, kind: QuantType, rows: slice = slice(None)) -> Callable[[], Iterator[torch.Tensor]]:
        return lambda: pieces(self._file, name, kind, self._dequantize, rows)

    def _narrowed(self, link: Link, infos: list[TensorInfo]) -> Outgoing:
        """A vector, or what else is small: in the usual type where that holds it."""
        values = torch.cat([self._small(info) for info in infos])
        if (order := folder_order(link, self.folder.dims)) is not None:
            values = values[order]
        if link.change is Change.PLUS_ONE:
            values = values - 1
        narrow = values.to(FLOAT_DTYPES[self.usual])
        kept = self._kind is not None or torch.equal(narrow.float(), values)
        kind = self.usual if kept else F32
        raw = as_bytes(values, kind, self._file, link.folder)
        return Outgoing(link.folder, tuple(values.shape), kind, lambda: [raw])

    def _small(self, info: TensorInfo) -> torch.Tensor:
        return self._file.vector(info.name) if len(info.shape) == 1 else self._dequantize(self._file.tensor(info.name))

    def _matrix(self, link: Link, infos: list[TensorInfo]) -> Outgoing:
        kind = self._type(infos)
        parts = [self._pieces(info.name, kind) for info in infos]

        def in_order() -> Iterator[torch.Tensor]:
            return (piece for part in parts for piece in part())

        def reordered() -> Iterator[torch.Tensor]:
            rows = torch.cat(list(in_order())).view(-1, kind.row_bytes(infos[0].columns))
            yield rows[folder_order(link, self.folder.dims)]

        same = folder_order(link, self.folder.dims) is None
        return Outgoing(link.folder, self._shape(infos), kind, in_order if same else reordered)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _write_shards(folder: Path, tensors: list[Outgoing], shard_bytes: int, progress: Callable[[int], None]) -> None:
    shards = _deal(tensors, shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, progress)
        where |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _deal(tensors: list[Outgoing], shard_bytes: int) -> list[list[Outgoing]]:
    """Tensors in their order, a new shard where the next would pass the limit; a larger tensor has one to itself."""
    shards: list[list[Outgoing]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: list[Outgoing], progress: Callable[[int], None]) -> None:
    # Widest types first, so that every tensor starts at a multiple of what its numbers take.
    tensors = sorted(tensors, key=lambda tensor: -tensor.type.block_bytes)
    entries = {tensor.name: (NAMES[tensor.type], tensor.shape, tensor.nbytes) for tensor in tensors}
    with path.open("wb") as file:
        file.write(header_bytes(entries, {"format": "pt"}))
        for tensor in tensors:
            for piece in tensor.pieces():
                file.write(piece.reshape(-1).numpy().data)
                progress(piece.nbytes)
