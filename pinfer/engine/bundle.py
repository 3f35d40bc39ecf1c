"""Writes a model bundled: neurons by rows, the hot ones first, with predictors, densities and statistics in one file.

It is GGUF with PowerInfer's names where there are such: `ffn_down_t.weight` [N, D], and `fc1`, `fc2` with
`powerinfer.sparse_threshold` where the predictors are of its form. What PowerInfer has no names for begins with
`pinfer.` (`engine.embedded`). Row i of gate, up and down_t, bias i and predictor row i are one neuron's, neurons being
numbered by how often they fired; `pinfer.neurons.N` has the number that each had before. llama.cpp does not read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pinfer.config import ModelConfig
from pinfer.engine.embedded import CONTENTS, contents_of, outgoing_of
from pinfer.engine.fitting import STAGE
from pinfer.engine.solved import ACTIVATIONS, PREDICTOR, Solved
from pinfer.formats import ModelFile
from pinfer.formats.gguf_writer import Outgoing, metadata_of, stored, write_gguf
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.pages import is_mapped, release_pages
from pinfer.formats.powerinfer import BUNDLE_FORMAT
from pinfer.kernels.ops import dequantize
from pinfer.kernels.transpose import transpose_weights, transposed_type
from pinfer.placement.statistics import from_tensors, hottest_first, to_tensors
from pinfer.predictors.stored import Packed, renumbered
from pinfer.quant import F32, QuantTensor, QuantType
from pinfer.quantize import quantize

FORMAT = 1
DOWN_ERROR = "pinfer.down_error"
PIECE_NEURONS = 2048  # that down is requantised by: a multiple of every block


@dataclass
class Bundle:
    """What was written: bytes of the file, of `down`, and its relative RMS error from the source's, a layer each."""

    nbytes: int = 0
    down_bytes: int = 0
    down_errors: list[float] = field(default_factory=list)

    @property
    def down_error(self) -> float:
        """The mean over layers."""
        return sum(self.down_errors) / len(self.down_errors) if self.down_errors else 0.0


def write_bundle(
    file: ModelFile,
    path: Path,
    solved: Solved | None = None,
    *,
    down_type: QuantType | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Bundle:
    """Write a model, and what a solved directory of it has, as one bundled file; memory holds one layer's `down`.

    down_type: of the rows of `down`; None keeps floats and neuron-major rows as they are and makes Q8_0 of other types, as
    a sparse run does at its start. ValueError for a model with experts, one that is bundled already, and rows that do
    not fit the type; OSError where the disk has no room, and nothing is left then.
    """
    config = model_config(file)
    check_tensors(file, config)
    config.without_experts("a bundled file")
    if BUNDLE_FORMAT in file.metadata:
        raise ValueError(f"{file.path} is a bundled model already")
    if down_type is not None:
        down_type.row_bytes(config.d_model)
    found = Bundle()
    orders = _orders(solved, config)
    writer = _Writer(file, config, orders, down_type, found)
    metadata = metadata_of(file) | {
        f"{file.architecture}.hidden_activation": config.activation,
        BUNDLE_FORMAT: FORMAT,
    }
    tensors = [writer.outgoing(name) for name in file.tensors]
    if solved is not None:
        held, layers = _carried(solved, orders, config)
        metadata[CONTENTS] = contents_of(solved, held)
        for part, named in held.items():
            tensors += outgoing_of(part, named, layers if part == PREDICTOR else None)
    tensors += [_numbers(f"pinfer.neurons.{layer}", order) for layer, order in enumerate(orders)]
    found.nbytes = write_gguf(path, metadata, tensors, progress=progress)
    return found


def _orders(solved: Solved | None, config: ModelConfig) -> list[torch.Tensor]:
    """Per layer, the neurons' numbers int64 [N], hot ones first; as they were where nobody counted."""
    if solved is None or not solved.has(ACTIVATIONS):
        return [torch.arange(config.d_ffn)] * config.n_layers
    return [hottest_first(layer.fired) for layer in from_tensors(solved.read_tensors(ACTIVATIONS), config.n_layers)]


def _carried(
    solved: Solved, orders: list[torch.Tensor], config: ModelConfig
) -> tuple[dict[str, dict[str, torch.Tensor]], list[dict[str, Any]]]:
    """A directory's tensors by file, for neurons in those orders, and what it says of its predictors."""
    held: dict[str, dict[str, torch.Tensor]] = {}
    layers: list[dict[str, Any]] = []
    if solved.has(PREDICTOR):
        packed = Packed(solved.read_tensors(PREDICTOR), solved.stages[STAGE].figures["layers"])
        held[PREDICTOR], layers = renumbered(packed, orders)
    if solved.has(ACTIVATIONS):
        statistics = from_tensors(solved.read_tensors(ACTIVATIONS), config.n_layers)
        sorted_ones = tuple(one.renumbered(order) for one, order in zip(statistics, orders, strict=True))
        held[ACTIVATIONS] = to_tensors(sorted_ones)
    return held, layers


class _Writer:
    """How each tensor of the model is to be written."""

    def __init__(
        self,
        file: ModelFile,
        config: ModelConfig,
        orders: list[torch.Tensor],
        down_type: QuantType | None,
        found: Bundle,
    ) -> None:
        self._file, self._config, self._orders, self._found = file, config, orders, found
        self._down_type = down_type

    def outgoing(self, name: str) -> Outgoing:
        parts = name.split(".")
        if parts[0] != "blk":
            return stored(self._file, name)
        order, info = self._orders[int(parts[1])], self._file.info(name)
        if parts[2] in ("ffn_down", "ffn_down_t") and parts[3] == "weight":
            return self._down(int(parts[1]), name)
        if parts[2] not in ("ffn_gate", "ffn_up", "fc2"):
            return stored(self._file, name)
        if len(info.shape) == 1:
            return Outgoing(name, info.shape, F32, lambda: [self._file.vector(name)[order].view(torch.uint8)])
        return Outgoing(name, info.shape, info.type, lambda: self._rows(self._file.tensor(name), order))

    def _rows(self, weight: QuantTensor, order: torch.Tensor) -> Iterator[torch.Tensor]:
        for start in range(0, len(order), PIECE_NEURONS):
            yield weight.blocks[order[start : start + PIECE_NEURONS]]
        self._release(weight)

    def _down(self, layer: int, name: str) -> Outgoing:
        source = self._file.info(name).type
        n, d = self._config.d_ffn, self._config.d_model
        as_it_is = source if name.endswith("ffn_down_t.weight") else transposed_type(source, d)
        kind = self._down_type or as_it_is

        def pieces() -> Iterator[torch.Tensor]:
            weight = self._file.tensor(name)
            if name.endswith("ffn_down_t.weight"):
                rows, error = (weight, 0.0) if kind is source else _requantized_rows(weight, kind)
            elif kind is as_it_is:  # exact where it can be
                rows, error = transpose_weights(weight)
            else:
                rows, error = _turned(weight, kind)
            self._found.down_errors.append(error)
            self._found.down_bytes += rows.nbytes
            yield from self._rows(rows, self._orders[layer])
            self._release(weight)

        return Outgoing(f"blk.{layer}.ffn_down_t.weight", (n, d), kind, pieces)

    def _release(self, weight: QuantTensor) -> None:
        if is_mapped(weight.blocks, self._file):
            release_pages(weight)


def _turned(weight: QuantTensor, kind: QuantType) -> tuple[QuantTensor, float]:
    """Rows [N, D] of that type from `down` [D, N], some neurons at a time, and their relative RMS error."""
    block = weight.type.block_size
    step = max(block, PIECE_NEURONS // block * block)

    def columns() -> Iterator[torch.Tensor]:
        for start in range(0, weight.columns, step):
            end = min(weight.columns, start + step)
            held = weight.blocks[:, weight.type.row_bytes(start) : weight.type.row_bytes(end)]
            yield dequantize(QuantTensor(held, weight.type, end - start)).T.contiguous()

    return _quantized(columns(), kind, weight.rows)


def _requantized_rows(weight: QuantTensor, kind: QuantType) -> tuple[QuantTensor, float]:
    pieces = (dequantize(weight[start : start + PIECE_NEURONS]) for start in range(0, weight.rows, PIECE_NEURONS))
    return _quantized(pieces, kind, weight.columns)


def _quantized(pieces: Iterator[torch.Tensor], kind: QuantType, columns: int) -> tuple[QuantTensor, float]:
    made, squared_error, squared = [], 0.0, 0.0
    for values in pieces:
        made.append(quantize(values, kind))
        squared_error += float((dequantize(made[-1]) - values).double().square().sum())
        squared += float(values.double().square().sum())
    blocks = torch.cat([one.blocks for one in made])
    return QuantTensor(blocks, kind, columns), math.sqrt(squared_error / squared) if squared else 0.0


def _numbers(name: str, values: torch.Tensor) -> Outgoing:
    """Whole numbers below 2^31 as the bytes of int32, under the type F32."""
    held = values.to(torch.int32).view(torch.uint8)
    return Outgoing(name, (len(values),), F32, lambda: [held])
