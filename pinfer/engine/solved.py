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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pinfer.engine.files import leftovers, write_atomically
from pinfer.engine.mapped import fingerprint
from pinfer.formats.gguf import GGUFFile

FORMAT = 1
MANIFEST, LOCK = "pinfer.json", ".lock"
ACTIVATIONS, PREDICTOR, PLAN = "activations.safetensors", "predictor.safetensors", "plan.json"
MAX_MANIFEST_BYTES = 16 * 2**20
HASHED_BYTES = 1 << 22  # at a time


@dataclass(frozen=True)
class ModelMark:
    """Which model a directory belongs to: its file's name and what tells its content from others."""

    file: str
    fingerprint: str

    @classmethod
    def of(cls, gguf: GGUFFile) -> ModelMark:
        """The mark of an open file; a copy elsewhere has the same fingerprint."""
        return cls(gguf.path.name, fingerprint(gguf, timed=False))


@dataclass(frozen=True)
class FileMark:
    """One file of the directory. `made_from` maps files that it was computed from to their SHA-256 then."""

    bytes: int
    sha256: str
    made_from: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage that was done: plain data that JSON can hold, and the names of the files it wrote."""

    settings: dict[str, Any]
    figures: dict[str, Any]
    files: tuple[str, ...]


@dataclass(frozen=True)
class _Manifest:
    model: ModelMark
    stages: dict[str, Stage] = field(default_factory=dict)
    files: dict[str, FileMark] = field(default_factory=dict)

    def without(self, name: str) -> _Manifest:
        """Less a file, the stages that wrote it, their other files and all that was made from these."""
        if name not in self.files:
            return self
        found = replace(self, files={key: mark for key, mark in self.files.items() if key != name})
        for stage, done in self.stages.items():
            if name in done.files:
                found = replace(found, stages={key: one for key, one in found.stages.items() if key != stage})
                for other in done.files:
                    found = found.without(other)
        for other, mark in self.files.items():
            if name in mark.made_from:
                found = found.without(other)
        return found

    def to_bytes(self) -> bytes:
        content = {"format": FORMAT, **asdict(self)}
        return (json.dumps(content | {"sha256": _digest_of(content)}, indent=1, allow_nan=False) + "\n").encode()


class Solved:
    """A solved directory. `open` reads one that is there, `open_or_create` is for writing into it."""

    def __init__(self, path: Path, manifest: _Manifest) -> None:
        self.path, self._manifest = path, manifest

    @classmethod
    def open(cls, path: str | Path, gguf: GGUFFile | None = None) -> Solved:
        """The directory at `path`, every file of it checked, as made for the model `gguf` (None: whichever).

        ValueError, naming the file and what does not match: a directory or a file that is missing or
        damaged, another model, a newer format.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"{path}: there is no such directory")
        if not path.is_dir():
            raise ValueError(f"{path}: not a directory, as a solved one is")
        manifest = _read_manifest(path / MANIFEST)
        if gguf is not None:
            _check_model(path / MANIFEST, manifest.model, ModelMark.of(gguf))
        for name, mark in manifest.files.items():
            _check_file(path / name, mark)
        return cls(path, manifest)

    @classmethod
    def open_or_create(cls, path: str | Path, gguf: GGUFFile) -> Solved:
        """`open`, or a new directory where there is none or an empty one.

        ValueError as `open`, and where other files lie; PermissionError or another OSError where nothing
        can be written.
        """
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path}: not a directory, and one is to be written there")
        try:
            return cls._begin(path, gguf)
        except OSError as problem:
            if problem.errno == errno.EROFS:
                raise PermissionError(problem.errno, "the file system is read-only", str(path)) from problem
            raise

    @classmethod
    def _begin(cls, path: Path, gguf: GGUFFile) -> Solved:
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).exists():
            return cls.open(path, gguf)
        if others := sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")):
            raise ValueError(f"{path}: it has no {MANIFEST} but other files ({others[0]}): name an empty directory")
        solved = cls(path, _Manifest(ModelMark.of(gguf)))
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

    def read(self, name: str) -> bytes:
        """The content of a file, checked. ValueError if the directory does not have it or it is damaged."""
        mark = self._mark(name)
        content = _read(self.path / name)
        _check_content(self.path / name, mark, len(content), hashlib.sha256(content).hexdigest())
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
        _check_name(self.path, name)
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

    def _replace(self, manifest: _Manifest) -> None:
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


def _read_manifest(path: Path) -> _Manifest:
    if not path.exists():
        raise ValueError(f"{path}: missing: {path.parent} is no solved directory, or was never begun")
    content = _read(path, MAX_MANIFEST_BYTES)
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise TypeError("it is no JSON object")
        version = values["format"]
        if not isinstance(version, int) or isinstance(version, bool):
            raise TypeError(f"format is {version!r}")
    except KeyError as problem:
        raise ValueError(f"{path}: {problem} is missing") from problem
    except (ValueError, TypeError, RecursionError) as problem:
        raise ValueError(f"{path}: damaged: {problem}") from problem
    if version > FORMAT:
        raise ValueError(f"{path}: format version {version}, made by a newer pinfer: this one reads up to {FORMAT}")
    if version < 1:
        raise ValueError(f"{path}: format version {version} does not exist")
    if values.pop("sha256", None) != _digest_of(values):
        raise ValueError(f"{path}: damaged: its SHA-256 does not match")
    try:
        stages = {
            name: Stage(dict(one["settings"]), dict(one["figures"]), tuple(one["files"]))
            for name, one in values["stages"].items()
        }
        files = {name: FileMark(**mark) for name, mark in values["files"].items()}
        manifest = _Manifest(ModelMark(**values["model"]), stages, files)
        _check_types(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ValueError(f"{path}: not the content of a {MANIFEST}: {problem}") from problem
    for name in manifest.files:
        _check_name(path.parent, name)
    return manifest


def _check_types(manifest: _Manifest) -> None:
    """TypeError for marks that are not what they should be: a digest that matches does not make them so."""
    for mark in manifest.files.values():
        if type(mark.bytes) is not int or not isinstance(mark.sha256, str) or not isinstance(mark.made_from, dict):
            raise TypeError("a file's mark has values of a wrong type")
    if not isinstance(manifest.model.file, str) or not isinstance(manifest.model.fingerprint, str):
        raise TypeError("the model's mark has values of a wrong type")


def _check_model(path: Path, found: ModelMark, expected: ModelMark) -> None:
    if found.fingerprint != expected.fingerprint:
        raise ValueError(
            f"{path}: made for another model, {found.file} (fingerprint {found.fingerprint}), "
            f"not for {expected.file} ({expected.fingerprint})"
        )


def _check_file(path: Path, mark: FileMark) -> None:
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {MANIFEST} names it")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED_BYTES):
            digest.update(piece)
        _check_content(path, mark, file.tell(), digest.hexdigest())


def _check_content(path: Path, mark: FileMark, n_bytes: int, digest: str) -> None:
    if n_bytes != mark.bytes:
        what = "truncated" if n_bytes < mark.bytes else "longer than it was"
        raise ValueError(f"{path}: {what}: {n_bytes} bytes, {MANIFEST} says {mark.bytes}")
    if digest != mark.sha256:
        raise ValueError(f"{path}: damaged: its SHA-256 is {digest[:12]}…, {MANIFEST} says {mark.sha256[:12]}…")


def _check_name(folder: Path, name: str) -> None:
    """No path, nothing hidden and not the manifest itself: a directory from elsewhere must not lead out of itself."""
    if not name or Path(name).name != name or name.startswith(".") or "\0" in name or name == MANIFEST:
        raise ValueError(f"{folder}: {name!r} is no name for a file of a solved directory")


def _read(path: Path, most_bytes: int | None = None) -> bytes:
    """A file's bytes; ValueError where it cannot be read or has more than `most_bytes`."""
    try:
        if most_bytes is not None and path.stat().st_size > most_bytes:
            raise ValueError(f"{path}: more than {most_bytes} bytes")
        return path.read_bytes()
    except OSError as problem:
        raise ValueError(f"{path}: {problem.strerror}") from problem


def _digest_of(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys and its white space."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back; ValueError for what it cannot hold (NaN included)."""
    try:
        return json.loads(json.dumps(dict(values), allow_nan=False))
    except TypeError as problem:
        raise ValueError(f"settings and figures must be plain data: {problem}") from problem


def _contiguous(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
