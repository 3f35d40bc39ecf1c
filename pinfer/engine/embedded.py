"""What a bundled model carries of a solved directory: its predictors, densities and statistics, in the model's own file.

The metadata key `pinfer.contents` is JSON: the stages done, the calibration, and for every tensor `pinfer.<part>.<name>`
its type and shape. Matrices are GGUF tensors of their weight type, whose mapped blocks predictors compute on; anything
else (thresholds, sign bits, statistics) lies as raw bytes under the type F32. All of it is numbered as the file's neurons are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from pinfer.engine.manifest import FileMark, Manifest, ModelMark, Stage
from pinfer.engine.solved import ACTIVATIONS, CALIBRATION, PREDICTOR, Solved
from pinfer.formats import ModelFile
from pinfer.formats.gguf_writer import Outgoing
from pinfer.quant import BY_NAME, F32, QuantType

CONTENTS = "pinfer.contents"
PARTS = {
    PREDICTOR: "predictor",
    ACTIVATIONS: "activations",
}  # files of a solved directory, and what their tensors are called
_DTYPES = {str(one).removeprefix("torch."): one for one in
           (torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64)}  # fmt: skip
Tensors = Mapping[str, torch.Tensor]


class EmbeddedSolved(Solved):
    """The solved directory that a bundled file stands for; to be read, not written into."""

    def __init__(self, file: ModelFile, contents: Mapping[str, Any]) -> None:
        stages = {
            name: Stage(dict(one["settings"]), dict(one["figures"]), tuple(one["files"]))
            for name, one in contents["stages"].items()
        }
        names = [*contents["tensors"], *([CALIBRATION] if contents["calibration"] is not None else [])]
        manifest = Manifest(ModelMark(file.path.name, ""), stages, {name: FileMark(0, "") for name in names})
        super().__init__(file.path, manifest)
        self._file, self._contents = file, contents

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """As of a directory. ValueError if the file does not have them, or not as it says."""
        self._mark(name)
        found = {}
        for tensor, (dtype, shape) in self._contents["tensors"][name].items():
            raw = self._file.raw(embedded_name(name, tensor))
            if dtype != "uint8":  # views would be read-only, and of a file that may go
                raw = raw.clone()
            try:
                found[tensor] = raw.view(_DTYPES[dtype]).view(shape)
            except (KeyError, RuntimeError) as problem:
                raise self._file.error(f"{embedded_name(name, tensor)} is not {dtype} {shape}: {problem}") from problem
        return found

    def read_json(self, name: str) -> Any:
        self._mark(name)
        return self._contents["calibration"]


def embedded_solved(file: ModelFile) -> EmbeddedSolved | None:
    """What a file carries of a solved directory, if anything. FormatError for contents that are damaged."""
    text = file.get(CONTENTS, str, None)
    if text is None:
        return None
    try:
        return EmbeddedSolved(file, json.loads(text))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise file.error(f"metadata key {CONTENTS!r} is not what a bundle has: {problem}") from problem


def embedded_name(part: str, tensor: str) -> str:
    """A tensor's name in the file: "pinfer.predictor.blk.3.second"."""
    return f"pinfer.{PARTS[part]}.{tensor}"


def contents_of(solved: Solved, tensors: Mapping[str, Tensors]) -> str:
    """The JSON of `pinfer.contents`: a directory's stages, without those whose files are not carried (plans)."""
    carried = {*tensors, *([CALIBRATION] if solved.has(CALIBRATION) else [])}
    stages = {
        name: {"settings": one.settings, "figures": one.figures, "files": list(one.files)}
        for name, one in solved.stages.items()
        if {*one.files} <= carried
    }
    described = {
        part: {name: (str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in held.items()}
        for part, held in tensors.items()
    }
    calibration = solved.read_json(CALIBRATION) if solved.has(CALIBRATION) else None
    return json.dumps({"stages": stages, "tensors": described, "calibration": calibration}, allow_nan=False)


def outgoing_of(part: str, tensors: Tensors, layers: list[dict[str, Any]] | None) -> list[Outgoing]:
    """Tensors of a part as they are to be written; `layers` is what `pack` says of predictors, their types among it."""
    found = []
    for name, one in tensors.items():
        kind, shape = _stored_as(name, one, layers)
        found.append(Outgoing(embedded_name(part, name), shape, kind, partial(_bytes, one)))
    return found


def _stored_as(name: str, one: torch.Tensor, layers: list[dict[str, Any]] | None) -> tuple[QuantType, tuple[int, ...]]:
    """A matrix of blocks under its type, anything else as so many numbers of four bytes."""
    _, layer, short = name.split(".")
    rest = {} if layers is None else layers[int(layer)]
    if f"{short}_type" in rest:
        return BY_NAME[rest[f"{short}_type"]], (one.shape[0], int(rest[f"{short}_columns"]))
    return F32, (one.nbytes // F32.block_bytes,)


def _bytes(one: torch.Tensor) -> list[torch.Tensor]:
    return [one.contiguous().reshape(-1).view(torch.uint8)]
