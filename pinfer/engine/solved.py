"""The solved directory: what was found out about one model once, in files that are checked before they are believed.

`pinfer.json` names the format version, the model, the stages done (their settings, the figures they
reached and the files they wrote) and the size and SHA-256 of every such file; it is written last. A
file that it names is taken out of it before it is overwritten, so that a directory is sound whenever
the writer stops. Files that it does not name (reports) are no part of it. Plain JSON and safetensors.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pinfer.engine.manifest import (
    MANIFEST,
    FileMark,
    Manifest,
    ModelMark,
    Stage,
    check_content,
    check_file,
    check_model,
    check_name,
    read_bytes,
    read_manifest,
)
from pinfer.files import leftovers, write_atomically
from pinfer.formats import ModelFile

LOCK = ".lock"
ACTIVATIONS, PREDICTOR = "activations.safetensors", "predictor.safetensors"
CALIBRATION, PLAN = "calibration.json", "plan.json"


class Solved:
    """A solved directory. `open` reads one that is there, `open_or_create` is for writing into it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self._manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path, file: ModelFile | None = None) -> Solved:
        """The directory at `path`, every file of it checked, as made for the model `file` (None: whichever).

        ValueError, naming the file and what does not match: a directory or a file that is missing or
        damaged, another model, a newer format.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"{path}: there is no such directory")
        if not path.is_dir():
            raise ValueError(f"{path}: not a directory, as a solved one is")
        manifest = read_manifest(path / MANIFEST)
        if file is not None:
            check_model(path / MANIFEST, manifest.model, ModelMark.of(file))
        for name, mark in manifest.files.items():
            check_file(path / name, mark)
        return cls(path, manifest)

    @classmethod
    def open_or_create(cls, path: str | Path, file: ModelFile) -> Solved:
        """`open`, or a new directory where there is none or an empty one.

        ValueError as `open`, and where other files lie; PermissionError or another OSError where nothing
        can be written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: not a directory, and one is to be written there")
        try:
            return cls._begin(path, file)
        except OSError as problem:
            if problem.errno == errno.EROFS:
                raise PermissionError(problem.errno, "the file system is read-only", str(path)) from problem
            raise

    @classmethod
    def _begin(cls, path: Path, file: ModelFile) -> Solved:
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).exists():
            return cls.open(path, file)
        if others := sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")):
            raise ValueError(f"{path}: it has no {MANIFEST} but other files ({others[0]}): name an empty directory")
        solved = cls(path, Manifest(ModelMark.of(file)))
        solved._write_manifest()
        return solved

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only one to write; what a killed writer left behind goes. ValueError while another writes."""
        with (self.path / LOCK).open("ab") as file:  # the system lets go of the lock of a killed process
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as problem:
                raise ValueError(f"{self.path}: another pinfer is writing into it") from problem
            for old in leftovers(self.path):
                old.unlink(missing_ok=True)
            self._manifest = read_manifest(self.path / MANIFEST)  # another may have written since it was read
            yield

    @property
    def model(self) -> ModelMark:
        return self._manifest.model

    @property
    def stages(self) -> Mapping[str, Stage]:
        """The stages done, by name."""
        return self._manifest.stages

    def has(self, name: str) -> bool:
        return name in self._manifest.files

    def sha256(self, name: str) -> str:
        """The digest of a file. ValueError if the directory does not have it."""
        return self._mark(name).sha256

    def read(self, name: str) -> bytes:
        """The content of a file, checked. ValueError if the directory does not have it or it is damaged."""
        mark = self._mark(name)
        content = read_bytes(self.path / name)
        check_content(self.path / name, mark, len(content), hashlib.sha256(content).hexdigest())
        return content

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file; ValueError as `read`, and if it is none."""
        try:
            return load_safetensors(self.read(name))
        except SafetensorError as problem:
            raise ValueError(f"{self.path / name}: not safetensors: {problem}") from problem

    def read_json(self, name: str) -> Any:
        """The value of a JSON file; ValueError as `read`, and if it is none."""
        try:
            return json.loads(self.read(name))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as problem:
            raise ValueError(f"{self.path / name}: not JSON: {problem}") from problem

    def write(
        self,
        name: str,
        content: bytes | Mapping[str, torch.Tensor],
        *,
        stage: str,
        settings: Mapping[str, Any],
        figures: Mapping[str, Any],
        made_from: Sequence[str] = (),
    ) -> None:
        """Write one file (tensors become safetensors) and note the stage as done with it.

        settings, figures: plain data for JSON. made_from: files of the directory that this one was
        computed from; when one of them is written anew this one is dropped. A stage that writes
        several files gives the same settings each time. ValueError for a name that is no plain file
        name, and for settings that JSON cannot hold.
        """
        check_name(self.path, name)
        data = content if isinstance(content, bytes) else save_safetensors(_contiguous(content))
        sources = {source: self._mark(source).sha256 for source in made_from}
        mark = FileMark(len(data), hashlib.sha256(data).hexdigest(), sources)
        before = self._manifest.stages.get(stage)
        done = Stage(_plain(settings), _plain(figures), (name,))
        if before == done and self._manifest.files.get(name) == mark:
            return  # what was made from it stays
        dropped = self._manifest.without(name)
        if before is not None and before.settings == done.settings and name not in before.files:
            done = replace(done, files=(*before.files, name), figures=before.figures | done.figures)
        elif before is not None:
            for old in before.files:
                dropped = dropped.without(old)
        self._replace(dropped)
        write_atomically(self.path / name, data)
        files = {**dropped.files, name: mark}
        self._replace(replace(dropped, stages={**dropped.stages, stage: done}, files=files))

    def _replace(self, manifest: Manifest) -> None:
        """Write a manifest that differs; files that it no longer names are removed after it."""
        if manifest == self._manifest:
            return
        gone = self._manifest.files.keys() - manifest.files.keys()
        self._manifest = manifest
        self._write_manifest()
        for name in gone:
            (self.path / name).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        write_atomically(self.path / MANIFEST, self._manifest.to_bytes())

    def _mark(self, name: str) -> FileMark:
        if name not in self._manifest.files:
            raise ValueError(f"{self.path}: it has no {name}; stages done: {', '.join(self.stages) or 'none'}")
        return self._manifest.files[name]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back; ValueError for what it cannot hold (NaN included)."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except TypeError as problem:
        raise ValueError(f"settings and figures must be plain data: {problem}") from problem


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
