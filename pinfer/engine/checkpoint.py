"""Where a long run over a model stands, kept on the way, so that an interrupted one goes on from there.

A folder of safetensors files and of `checkpoint.json`, written after them, which names each with its
SHA-256 and holds plain data beside, and a SHA-256 of itself. What it does not name, or what does not
match, is not read. A file has a name of its own for every content: none that is named is ever written to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pinfer.engine.watcher import Watcher
from pinfer.files import leftovers, write_atomically

FORMAT = 2
STATE = "checkpoint.json"


@dataclass(frozen=True)
class Kept:
    """A checkpoint's tensors, by the name of their file without its suffix, and its plain data."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]
    data: Mapping[str, Any]

    def sequence(self, name: str) -> list[torch.Tensor]:
        """A list of tensors that was saved through `numbered`."""
        named = self.tensors[name]
        return [named[str(number)] for number in range(len(named))]


def numbered(tensors: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A list of tensors as named ones."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


class Checkpoint:
    """A checkpoint in a folder of its own. `key` is plain data that a run must share to go on from it."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self.folder, self._key = folder, key
        self._sums: dict[str, str] = {}

    def load(self) -> Kept | None:
        """What is kept; None without a checkpoint. ValueError says why it is of no use."""
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_bytes())
            if state.pop("sha256") != _digest(state):
                raise ValueError(f"{STATE} is damaged")
            if state["key"] != self._key or state["format"] != FORMAT:
                raise ValueError("it is of other settings, another text or another model")
            sums = dict(state["files"])
            tensors = {name: self._read(name, digest) for name, digest in sums.items()}
            data = dict(state["data"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as problem:
            raise ValueError(f"{self.folder}: {problem}") from problem
        self._sums = sums
        return Kept(tensors, data)

    def resume(self, watcher: Watcher) -> Kept | None:
        """`load`, where one that is of no use is removed with a note."""
        self.clean()
        try:
            kept = self.load()
        except ValueError as problem:
            watcher.note(f"starting anew: {problem}")
            kept = None
        if kept is None:
            self.remove()
        else:
            self._drop_unnamed()  # a killed writer's
        return kept

    def save(
        self, new: Mapping[str, Mapping[str, torch.Tensor]], data: Mapping[str, Any], drop: Collection[str] = ()
    ) -> None:
        """Keep more tensors under new names, this plain data from now on, and no longer those to drop."""
        sums = dict(self._sums)
        for name, tensors in new.items():
            assert name not in self._sums
            content = save_safetensors({key: tensor.contiguous() for key, tensor in tensors.items()})
            write_atomically(self.folder / _file(name), content)
            sums[name] = hashlib.sha256(content).hexdigest()
        self._sums = {name: digest for name, digest in sums.items() if name not in drop}
        state = {"format": FORMAT, "key": self._key, "files": self._sums, "data": data}
        write_atomically(self.folder / STATE, json.dumps(state | {"sha256": _digest(state)}, indent=1).encode())
        self._drop_unnamed()

    def _drop_unnamed(self) -> None:
        """Remove tensors that the state does not name: those that were dropped, or never got into it."""
        named = {_file(name) for name in self._sums}
        for path in self.folder.glob(_file("*")):
            if path.name not in named:
                path.unlink()

    def clean(self) -> None:
        """Remove what a killed writer left half written."""
        for path in leftovers(self.folder):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the checkpoint, its state first: what is left of the folder is then none."""
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._sums = {}

    def _read(self, name: str, digest: str) -> dict[str, torch.Tensor]:
        content = (self.folder / _file(name)).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{_file(name)} is damaged")
        return load_safetensors(content)


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _file(name: str) -> str:
    return f"{name}.safetensors"
