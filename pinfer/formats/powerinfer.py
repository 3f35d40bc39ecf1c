"""PowerInfer's GGUF, and what is read from it: neuron-major `down`, predictors, and the split over two devices.

A model is GGUF v3 under the magic PWRI, or GGUF in later files. Per layer it has `ffn_down_t.weight` [N, D] in the place
of `ffn_down.weight` [D, N], row i being neuron i's output, and a predictor: `fc1.weight` [R, D] and `fc2.weight` [N, R],
R by layer. Neuron i is computed where fc2_i · relu(fc1 · residual) reaches `powerinfer.sparse_threshold`.

The split (`<model>.generated.gpuidx`) holds per layer `gpu_idx` I32 [N] of 0 and 1, 1 being on the GPU, and `gpu_bucket`,
their numbers in ascending order. Its I32 is type 18, which today's GGUF reads as IQ3_XXS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.gguf_header import MAGIC, POWERINFER_MAGIC, Header, TensorEntry, read_header
from pinfer.formats.model_file import ModelFile, TensorInfo, map_file
from pinfer.quant import QuantTensor

THRESHOLD = "powerinfer.sparse_threshold"
BUNDLE_FORMAT = "pinfer.format"
EMBEDDED = "pinfer."  # how names of tensors begin that are no part of the model itself
INDEX_ARCHITECTURE = "generic.gpu_index"
_I32, _I32_BYTES, _ALIGNMENT = 18, 4, 32
# What its runtime computes for an architecture, whose files have no key for it.
_ACTIVATIONS = {"llama": "relu", "falcon": "relu", "opt": "relu", "bamboo": "drelu"}


class NeuronMajorFile(ModelFile):
    """A GGUF file that has neuron-major `down`: PowerInfer's, or a bundle of ours, which states its activation."""

    def __init__(self, file: GGUFFile) -> None:
        activation = _ACTIVATIONS.get(file.architecture)
        stated: dict[str, Any] = {}
        if activation is not None and BUNDLE_FORMAT not in file.metadata:
            stated[f"{file.architecture}.hidden_activation"] = activation
        tensors = {_canonical(name): _renamed(info) for name, info in file.tensors.items()}
        super().__init__(file.path, stated | dict(file.metadata), tensors, file.parts)
        self._file = file

    @property
    def format(self) -> str:
        kind = "pinfer bundle" if BUNDLE_FORMAT in self.metadata else "PowerInfer GGUF"
        return f"{kind} v{self._file.version}"


def is_neuron_major(file: ModelFile) -> bool:
    """Whether a file's layers have neuron-major `down`, or predictors that need it: all of them should then."""
    return THRESHOLD in file.metadata or file.has(down_rows(0)) or file.has("blk.0.fc1.weight")


def down_rows(layer: int) -> str:
    return f"blk.{layer}.ffn_down_t.weight"


def expect_neuron_major(file: ModelFile, expected: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What a neuron-major file needs in place of the tensors that a model needs: `down` turned, and a predictor in every
    layer if there is one in any. FormatError for a predictor's first matrix that is no matrix."""
    found: dict[str, tuple[int, ...]] = {}
    predicted = any(name.startswith("blk.") and is_predictor(name) for name in file.tensors)
    for name, shape in expected.items():
        if not name.endswith("ffn_down.weight"):
            found[name] = shape
            continue
        prefix, (width, neurons) = name.removesuffix("ffn_down.weight"), shape
        found[f"{prefix}ffn_down_t.weight"] = (neurons, width)
        if predicted:
            rank = file.info(f"{prefix}fc1.weight").shape[0]
            found |= {f"{prefix}fc1.weight": (rank, width), f"{prefix}fc2.weight": (neurons, rank)}
    return found


def is_predictor(name: str) -> bool:
    """Whether a tensor of that name is no part of the model itself, but of what names its neurons."""
    return name.startswith(EMBEDDED) or name.endswith((".fc1.weight", ".fc2.weight"))


class Factors(NamedTuple):
    """One layer's predictor: first QuantTensor [R, D], second QuantTensor [N, R]."""

    first: QuantTensor
    second: QuantTensor


def has_factors(file: ModelFile) -> bool:
    """Whether the file has predictors of PowerInfer's form."""
    return file.has("blk.0.fc1.weight")


def factors(file: ModelFile, layer: int) -> Factors:
    return Factors(file.tensor(f"blk.{layer}.fc1.weight"), file.tensor(f"blk.{layer}.fc2.weight"))


def sparse_threshold(file: ModelFile) -> float:
    """What a predictor's output must reach. FormatError unless it is a finite number."""
    value = file.get(THRESHOLD, float, 0.0)
    if not np.isfinite(value):
        raise file.error(f"metadata key {shown(THRESHOLD)} must be finite, not {value}")
    return value


def _canonical(name: str) -> str:
    """The bias of `down` is that of y, whichever way the matrix lies."""
    return name.replace("ffn_down_t.bias", "ffn_down.bias")


def _renamed(info: TensorInfo) -> TensorInfo:
    return dataclasses.replace(info, name=_canonical(info.name))


# The split over GPU and CPU.


def is_gpu_index(path: Path) -> bool:
    """Whether a file is PowerInfer's split, by its name."""
    return path.suffix == ".gpuidx"


def read_gpu_index(path: Path, neurons: Sequence[int] | None = None) -> list[torch.Tensor]:
    """The neurons on the GPU, bool [N] a layer, of a split for a model with so many `neurons` a layer (None: any).

    FileNotFoundError, and FormatError, naming the tensor, for a file that is cut short, is made for another model, or
    contradicts itself.
    """
    file = map_file(path)
    header = read_header(file, path, (MAGIC, POWERINFER_MAGIC))
    architecture, n_layers = (
        header.metadata.get(key) for key in ("general.architecture", f"{INDEX_ARCHITECTURE}.block_count")
    )
    if architecture != INDEX_ARCHITECTURE or type(n_layers) is not int:
        raise FormatError(f"{path}: no split over two devices: its architecture is {shown(str(architecture))}")
    if neurons is not None and len(neurons) != n_layers:
        raise FormatError(f"{path}: a split of {n_layers} layers, for a model of {len(neurons)}")
    entries = {entry.name: entry for entry in header.entries}
    layers = []
    for layer in range(n_layers):
        mask, bucket = (
            _integers(path, file, header, entries, f"blk.{layer}.{part}") for part in ("gpu_idx", "gpu_bucket")
        )
        layers.append(_hot(path, layer, mask, bucket, len(mask) if neurons is None else neurons[layer]))
    return layers


def _integers(path: Path, file: Any, header: Header, entries: dict[str, TensorEntry], name: str) -> np.ndarray:
    """An I32 vector of the split, under its own type number."""
    if name not in entries:
        if name.endswith("gpu_bucket"):  # of a layer without any
            return np.empty(0, np.int32)
        raise FormatError(f"{path}: tensor {shown(name)} is missing")
    entry = entries[name]
    if entry.type_id != _I32 or len(entry.dimensions) != 1:
        raise FormatError(f"{path}: tensor {shown(name)} is type {entry.type_id} {list(entry.dimensions)}, "
                          f"expected a vector of type {_I32} (PowerInfer's I32)")  # fmt: skip
    start = -(-header.end // _ALIGNMENT) * _ALIGNMENT + entry.offset
    end = start + _I32_BYTES * entry.dimensions[0]
    if end > len(file):
        raise FormatError(f"{path}: tensor {shown(name)} ends at byte {end}, the file at byte {len(file)}")
    return np.frombuffer(file[start:end], dtype="<i4")


def _hot(path: Path, layer: int, mask: np.ndarray, bucket: np.ndarray, n_neurons: int) -> torch.Tensor:
    name = f"{path}: blk.{layer}"
    if len(mask) != n_neurons:
        raise FormatError(f"{name}.gpu_idx has {len(mask)} neurons, the model {n_neurons}")
    if not np.isin(mask, (0, 1)).all():
        raise FormatError(f"{name}.gpu_idx holds other values than 0 and 1")
    if (np.diff(bucket) <= 0).any():
        raise FormatError(f"{name}.gpu_bucket is not in ascending order")
    # A layer without neurons on the GPU has a bucket of one that stands for none.
    named = mask.nonzero()[0]
    if not np.array_equal(bucket, named) and (len(named) or len(bucket) > 1):
        raise FormatError(f"{name}.gpu_bucket names {len(bucket)} neurons that are not the {len(named)} of gpu_idx")
    return torch.from_numpy(mask.astype(bool))
