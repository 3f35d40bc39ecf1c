"""Where a profile stands, kept after every layer, so that an interrupted one goes on from there.

A folder of `layer-NNN.safetensors` (that layer's statistics), `residuals-NNN.safetensors` (what the
layer after it reads) and `checkpoint.json`, written after both, with the SHA-256 of each file. What it
does not name, or what does not match, is not read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pinfer.files import leftovers, write_atomically
from pinfer.placement.statistics import LayerStatistics, from_tensors, to_tensors

FORMAT = 1
FOLDER, STATE = "profile-checkpoint", "checkpoint.json"


class Checkpoint:
    """The checkpoint in a solved directory's folder. `key` is plain data that a run must share to go on from it."""

    def __init__(self, directory: Path, key: dict[str, Any]) -> None:
        self.folder, self._key = directory / FOLDER, key
        self._sums: list[str] = []  # of layers done
        self._residuals: str | None = None

    def load(self) -> tuple[list[LayerStatistics], list[torch.Tensor]] | None:
        """The layers done and the residuals after them; None without a checkpoint. ValueError says why it is of no use."""
        path = self.folder / STATE
        if not path.exists():
            return None
        try:
            state = json.loads(path.read_bytes())
            if state["key"] != self._key or state["format"] != FORMAT:
                raise ValueError("it is of other settings, another text or another model")
            sums = list(state["layers"])
            layers = [from_tensors(self._read(_layer(number), digest), 1)[0] for number, digest in enumerate(sums)]
            named = self._read(_residuals(len(sums) - 1), state["residuals"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as problem:
            raise ValueError(f"{self.folder}: {problem}") from problem
        self._sums, self._residuals = sums, state["residuals"]
        return layers, [named[str(number)] for number in range(len(named))]

    def save(self, layer: LayerStatistics, residuals: list[torch.Tensor]) -> None:
        """Keep one more layer, and what the next one reads."""
        number = len(self._sums)
        digest = self._write(_layer(number), to_tensors((layer,)))
        after = self._write(_residuals(number), {str(i): residual for i, residual in enumerate(residuals)})
        self._sums.append(digest)
        self._residuals = after
        state = {"format": FORMAT, "key": self._key, "layers": self._sums, "residuals": after}
        write_atomically(self.folder / STATE, json.dumps(state, indent=1).encode())
        for path in self.folder.glob("residuals-*.safetensors"):
            if path.name != _residuals(number):
                path.unlink()

    def clean(self) -> None:
        """Remove what a killed writer left half written."""
        for path in leftovers(self.folder):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the checkpoint, its state first: what is left of the folder is then none."""
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self._sums, self._residuals = [], None

    def _write(self, name: str, tensors: dict[str, torch.Tensor]) -> str:
        content = save_safetensors(tensors)
        write_atomically(self.folder / name, content)
        return hashlib.sha256(content).hexdigest()

    def _read(self, name: str, digest: str) -> dict[str, torch.Tensor]:
        content = (self.folder / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{name} is damaged")
        return load_safetensors(content)


def _layer(number: int) -> str:
    return f"layer-{number:03}.safetensors"


def _residuals(number: int) -> str:
    return f"residuals-{number:03}.safetensors"
