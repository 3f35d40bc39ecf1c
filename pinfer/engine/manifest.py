"""`pinfer.json` of a solved directory: what it holds, and the checks before any of it is believed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pinfer.engine.mapped import fingerprint
from pinfer.formats import ModelFile

FORMAT = 1
MANIFEST = "pinfer.json"
MAX_MANIFEST_BYTES = 16 * 2**20
HASHED_BYTES = 1 << 22  # at a time


@dataclass(frozen=True)
class ModelMark:
    """Which model a directory belongs to: its file's name and what tells its content from others."""

    file: str
    fingerprint: str

    @classmethod
    def of(cls, file: ModelFile) -> ModelMark:
        """The mark of an open file; a copy elsewhere has the same fingerprint."""
        return cls(file.path.name, fingerprint(file, timed=False))


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
class Manifest:
    """All that `pinfer.json` says, but for its format version and its own SHA-256."""

    model: ModelMark
    stages: dict[str, Stage] = field(default_factory=dict)
    files: dict[str, FileMark] = field(default_factory=dict)

    def without(self, name: str) -> Manifest:
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


def read_manifest(path: Path) -> Manifest:
    """The manifest at `path`; ValueError for one that is missing, damaged, of a newer format or no manifest."""
    if not path.exists():
        raise ValueError(f"{path}: missing: {path.parent} is no solved directory, or was never begun")
    content = read_bytes(path, MAX_MANIFEST_BYTES)
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
        manifest = Manifest(ModelMark(**values["model"]), stages, files)
        _check_types(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ValueError(f"{path}: not the content of a {MANIFEST}: {problem}") from problem
    for name in manifest.files:
        check_name(path.parent, name)
    return manifest


def _check_types(manifest: Manifest) -> None:
    """TypeError for marks that are not what they should be: a digest that matches does not make them so."""
    for mark in manifest.files.values():
        if type(mark.bytes) is not int or not isinstance(mark.sha256, str) or not isinstance(mark.made_from, dict):
            raise TypeError("a file's mark has values of a wrong type")
    if not isinstance(manifest.model.file, str) or not isinstance(manifest.model.fingerprint, str):
        raise TypeError("the model's mark has values of a wrong type")


def check_model(path: Path, found: ModelMark, expected: ModelMark) -> None:
    """ValueError unless a manifest's model is the one expected."""
    if found.fingerprint != expected.fingerprint:
        raise ValueError(
            f"{path}: made for another model, {found.file} (fingerprint {found.fingerprint}), "
            f"not for {expected.file} ({expected.fingerprint})"
        )


def check_file(path: Path, mark: FileMark) -> None:
    """ValueError unless the file is there and what its mark says; it is read in pieces."""
    if not path.is_file():
        raise ValueError(f"{path}: missing, though {MANIFEST} names it")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASHED_BYTES):
            digest.update(piece)
        check_content(path, mark, file.tell(), digest.hexdigest())


def check_content(path: Path, mark: FileMark, n_bytes: int, digest: str) -> None:
    """ValueError unless size and SHA-256 are those of the mark."""
    if n_bytes != mark.bytes:
        what = "truncated" if n_bytes < mark.bytes else "longer than it was"
        raise ValueError(f"{path}: {what}: {n_bytes} bytes, {MANIFEST} says {mark.bytes}")
    if digest != mark.sha256:
        raise ValueError(f"{path}: damaged: its SHA-256 is {digest[:12]}…, {MANIFEST} says {mark.sha256[:12]}…")


def check_name(folder: Path, name: str) -> None:
    """No path, nothing hidden and not the manifest itself: a directory from elsewhere must not lead out of itself."""
    if not name or Path(name).name != name or name.startswith(".") or "\0" in name or name == MANIFEST:
        raise ValueError(f"{folder}: {name!r} is no name for a file of a solved directory")


def read_bytes(path: Path, most_bytes: int | None = None) -> bytes:
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
