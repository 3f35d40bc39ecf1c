"""A Hugging Face folder as a model file: config.json, safetensors and tokenizer, shown in GGUF's terms.

Tensors that GGUF has as the folder does are views of the mapped files, also parts of fused ones. Those whose rows GGUF
has in another order, Gemma's norms, stacked experts and rope's factors are made where they are asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.huggingface.describe import Described, describe
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.huggingface.names import (
    HEAD,
    Change,
    Link,
    RowOrder,
    folder_names,
    is_ignored,
    links,
    misshapen,
    row_orders,
    text_name,
)
from pinfer.formats.huggingface.safetensors_file import TYPES, Stored
from pinfer.formats.huggingface.shards import open_shards
from pinfer.formats.huggingface.tokenizer import tokenizer_metadata
from pinfer.formats.model_file import FLOAT_DTYPES, MADE, ModelFile, Part, TensorInfo, map_file
from pinfer.formats.pages import release_bytes
from pinfer.formats.type_mix import FILE_TYPES
from pinfer.quant import F32, QuantTensor, QuantType

CONFIG = "config.json"
MAX_CONFIG_BYTES = 16 << 20
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_QUANTISED = {"F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "I8", "U8", "I32"}

Recipe = Callable[[], torch.Tensor]


class HFFolder(ModelFile):
    """An open folder (see `ModelFile`); `described` is what its config.json says."""

    def __init__(self, path: Path, described: Described, parts: list[Part], build: _Tensors) -> None:
        super().__init__(path, described.metadata, build.tensors, parts)
        self.described = described
        self._recipes, self._stacks = build.recipes, build.stacks

    @classmethod
    def open(cls, path: str | Path) -> HFFolder:
        """Read config.json, the tokenizer and the headers of all shards at `path` (the folder, or its config.json).

        Raises FileNotFoundError, and FormatError naming file and field for a folder that is not sound or not supported;
        reads no weights, and never unpickles anything.
        """
        folder = Path(path)
        if folder.name == CONFIG and not folder.is_dir():
            folder = folder.parent
        if not folder.name or folder.name == "..":
            folder = folder.resolve()  # kept files lie beside it under its name
        if not (folder / CONFIG).is_file():
            raise FormatError(f"{folder}: {_no_config(folder)}")
        described = describe(Node.read(folder / CONFIG, MAX_CONFIG_BYTES))
        shards = open_shards(folder)
        stored = {name: one for shard in shards for name, one in shard.tensors.items()}
        if described.with_images:
            stored = {text: one for name, one in stored.items() if (text := text_name(name)) is not None}
        parts: list[Part] = [*shards, Part(folder / CONFIG, map_file(folder / CONFIG))]
        build = _Tensors(parts, stored, described)
        described.metadata.update(_general(folder, build.tensors))
        if any((folder / name).is_file() for name in TOKENIZERS):
            described.metadata.update(tokenizer_metadata(folder, described.dims.letters["V"]))
        return cls(folder, described, parts, build)

    @property
    def format(self) -> str:
        n_shards = len(self.parts) - 1
        return f"Hugging Face folder ({self.described.family.model_type}, {n_shards} shard{'s' * (n_shards > 1)})"

    def expert(self, name: str, number: int) -> QuantTensor:
        """One matrix of a stack, as a view of the tensor that the folder has for that expert."""
        info = self.info(name)
        parts = self._stacks.get(name, ())
        if not 0 <= number < len(parts):
            raise self.error(f"tensor {shown(name)} {list(info.shape)} has no matrix {number}")
        _ = self.parts  # ValueError once the folder is closed
        return QuantTensor(parts[number]().view(info.shape[1], -1), info.type, info.columns)

    def _bytes(self, info: TensorInfo) -> torch.Tensor:
        recipe = self._recipes.get(info.name)
        if recipe is None:
            return super()._bytes(info)
        _ = self.parts  # ValueError once the folder is closed
        return recipe()


class _Tensors:
    """Finds every tensor of GGUF in the folder: `tensors` where it lies, `recipes` for those that are made."""

    def __init__(self, parts: list[Part], stored: dict[str, Stored], described: Described) -> None:
        self._parts, self._stored, self._dims = parts, stored, described.dims
        self.tensors: dict[str, TensorInfo] = {}
        self.recipes: dict[str, Recipe] = {}
        self.stacks: dict[str, list[Recipe]] = {}  # of the experts' matrices, each alone
        self._row_orders: dict[tuple[Change, str], list[RowOrder]] = {}
        known = self._known(described)
        for name, one in stored.items():
            if name not in known and not is_ignored(name):
                model_type = described.family.model_type
                raise self._error(one, f"is not supported for {model_type} (config.json's model_type)")
        for name, vector in described.vectors.items():
            self._make(name, tuple(vector.shape), F32, partial(vector.view, torch.uint8))

    def _known(self, described: Described) -> set[str]:
        """Place the tensors of all links; returns the names of the folder's."""
        if described.dims.n_layers > len(self._stored):
            raise FormatError(
                f"{self._parts[-1].path}: num_hidden_layers is {described.dims.n_layers}, but there are only "
                f"{len(self._stored)} tensors"
            )
        known: set[str] = set()
        for link in links(described.tensors, described.dims):
            wanted = folder_names(link, described.dims)
            known.update(wanted)
            if link.folder == HEAD and described.tied:
                continue  # what is there is the embedding once more
            self._place(link, [self._find(name, link) for name in wanted])
        return known

    def _error(self, one: Stored, problem: str) -> FormatError:
        return FormatError(f"{self._parts[one.part].path}: tensor {shown(one.name)} {problem}")

    def _find(self, name: str, link: Link) -> Stored:
        if name not in self._stored:
            raise FormatError(f"{self._parts[-1].path.parent}: tensor {shown(name)} is missing")
        one = self._stored[name]
        if one.dtype not in TYPES:
            what = "quantised weights are not" if one.dtype in _QUANTISED else f"only {', '.join(TYPES)} are"
            raise self._error(one, f"is {shown(one.dtype)}; {what} supported")
        expected = self._dims.shape(link.shape)
        if one.shape != expected or 0 in expected:
            raise FormatError(f"{self._parts[one.part].path}: {misshapen(name, one.shape, expected)}")
        return one

    def _place(self, link: Link, sources: list[Stored]) -> None:
        first = sources[0]
        kind = TYPES[first.dtype]
        if link.change is Change.STACKED:
            if odd := next((one for one in sources if one.dtype != first.dtype), None):
                raise self._error(odd, f"is {odd.dtype}, the first expert's is {first.dtype}")
            shape = (len(sources), *first.shape)
            self.stacks[link.gguf[0]] = [partial(self._aligned, one) for one in sources]
            self._make(link.gguf[0], shape, kind, lambda: self._made(torch.cat, sources))
        elif link.change is Change.PLUS_ONE:
            self._make(link.gguf[0], first.shape, F32, lambda: self._made(partial(_plus_one, kind), [first]))
        else:
            for name, order in zip(link.gguf, self._orders(link), strict=True):
                self._place_rows(name, first, order)

    def _orders(self, link: Link) -> list[RowOrder]:
        """The same for all layers, and kept once."""
        key = (link.change, link.shape)
        if key not in self._row_orders:
            self._row_orders[key] = row_orders(link, self._dims)
        return self._row_orders[key]

    def _place_rows(self, name: str, source: Stored, order: RowOrder) -> None:
        kind, row_bytes = TYPES[source.dtype], source.nbytes // source.shape[0]
        if isinstance(order, torch.Tensor):
            shape = (order.numel(), *source.shape[1:])
            self._make(name, shape, kind, lambda: self._made(partial(_reordered, row_bytes, order), [source]))
            return
        start, stop, _ = order.indices(source.shape[0])
        shape, nbytes = (stop - start, *source.shape[1:]), (stop - start) * row_bytes
        offset = source.offset + start * row_bytes
        self.tensors[name] = TensorInfo(name, shape, kind, offset, nbytes, source.part)
        if offset % kind.block_bytes:  # kernels read whole numbers where they start
            self._make(name, shape, kind, lambda: self._parts[source.part].data[offset : offset + nbytes].clone())

    def _make(self, name: str, shape: tuple[int, ...], kind: QuantType, recipe: Recipe) -> None:
        nbytes = math.prod(shape) * kind.block_bytes
        self.tensors[name] = TensorInfo(name, shape, kind, 0, nbytes, MADE)
        self.recipes[name] = recipe

    def _made(self, of: Callable[[list[torch.Tensor]], torch.Tensor], sources: list[Stored]) -> torch.Tensor:
        """What `of` makes of the bytes of tensors, whose pages are let go of."""
        raw = [self._raw(one) for one in sources]
        made = of(raw)
        for one in raw:
            release_bytes(one)
        return made

    def _aligned(self, one: Stored) -> torch.Tensor:
        """A view, or a copy where kernels could not read whole numbers from it."""
        raw = self._raw(one)
        return raw.clone() if one.offset % TYPES[one.dtype].block_bytes else raw

    def _raw(self, one: Stored) -> torch.Tensor:
        return self._parts[one.part].data[one.offset : one.offset + one.nbytes]


def _plus_one(kind: QuantType, raw: list[torch.Tensor]) -> torch.Tensor:
    return (raw[0].clone().view(FLOAT_DTYPES[kind]).float() + 1).view(torch.uint8)


def _reordered(row_bytes: int, order: torch.Tensor, raw: list[torch.Tensor]) -> torch.Tensor:
    return raw[0].view(-1, row_bytes)[order].view(-1)


def _general(folder: Path, tensors: dict[str, TensorInfo]) -> dict[str, Any]:
    """Name and type of the weights, as GGUF's converter states them."""
    types = Counter[str]()
    for info in tensors.values():
        if len(info.shape) > 1:
            types[str(info.type)] += info.nbytes
    return {
        "general.type": "model",
        "general.name": folder.name.encode(errors="replace").decode(),  # a path may hold what is no Unicode
        "general.file_type": FILE_TYPES[types.most_common(1)[0][0].lower()],
    }


def _no_config(folder: Path) -> str:
    if not folder.is_dir():
        return "this is no folder"
    if files := sorted(folder.glob("*.gguf")):
        return f"the folder has no {CONFIG}; name the file in it to read a GGUF, such as {files[0].name}"
    return f"the folder has no {CONFIG}, which a model saved by transformers has"
