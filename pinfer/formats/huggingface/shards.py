"""The safetensors files of a folder: one, or several that an index lists."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.huggingface.safetensors_file import Shard

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20
MAX_SHARDS = 4096
MAX_NAME_BYTES = 255  # a longer one is no file name, and asking for it is an OSError


def open_shards(folder: Path) -> list[Shard]:
    """All shards of a folder, mapped.

    FormatError naming the file and field for a folder without safetensors, an index that names files outside of it,
    shards that are missing, and tensors that are not where the index says.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return [Shard(folder / SINGLE, 0)]
        raise FormatError(f"{folder}: {_without(folder)}")
    where = _listed(index)
    names = sorted(set(where.values()))
    if not 1 <= len(names) <= MAX_SHARDS:
        raise FormatError(f"{index}: weight_map names {len(names)} files; 1 to {MAX_SHARDS} are supported")
    for name in names:
        if not (folder / name).is_file():
            raise FormatError(f"{index}: weight_map names {shown(name)}, which is missing from the folder")
    shards = [Shard(folder / name, number) for number, name in enumerate(names)]
    _check(index, where, {shard.path.name: shard for shard in shards})
    return shards


def _listed(index: Path) -> dict[str, str]:
    """Tensor name to file name, each of a file in the folder itself."""
    where = {}
    for tensor, node in Node.read(index, MAX_INDEX_BYTES).at("weight_map").fields():
        name = node.as_(str)
        if name is None or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name} or name in ("", ".."):
            raise node.fault(f"is {shown(str(name))}, not the name of a file in the folder")
        if not name.endswith(".safetensors"):
            raise node.fault(f"is {shown(name)}; only safetensors files are read")
        if len(name.encode()) > MAX_NAME_BYTES:
            raise node.fault(f"is {shown(name)} of {len(name.encode())} bytes; names have at most {MAX_NAME_BYTES}")
        where[tensor] = name
    return where


def _check(index: Path, where: dict[str, str], shards: dict[str, Shard]) -> None:
    for tensor, name in where.items():
        if tensor not in shards[name].tensors:
            raise FormatError(f"{index}: weight_map places {shown(tensor)} in {name}, which does not hold it")
    for name, shard in shards.items():
        for tensor in shard.tensors:
            if where.get(tensor) != name:
                raise FormatError(f"{shard.path}: holds {shown(tensor)}, which {index.name} does not place there")


def _without(folder: Path) -> str:
    """What to say of a folder that holds no safetensors."""
    pickled = sorted(folder.glob("pytorch_model*.bin")) + sorted(folder.glob("*.pth"))
    if pickled:
        return (
            f"the weights are pickled ({pickled[0].name}), which is not read as it could run code; "
            "save the model as safetensors"
        )
    if (folder / SINGLE).is_symlink() and not (folder / SINGLE).exists():
        return f"{SINGLE} is a link to {shown(os.readlink(folder / SINGLE))}, which is missing"
    if loose := sorted(path for path in folder.glob("*.safetensors") if path.name != SINGLE):
        return f"there is {loose[0].name}, but neither {SINGLE} nor {INDEX}"
    return f"there is neither {SINGLE} nor {INDEX}"
