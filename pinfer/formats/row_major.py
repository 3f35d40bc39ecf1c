"""A neuron-major file as other programs know its model: `down` as [D, N], and nothing that is not the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from pinfer.formats.huggingface.families import MODEL_TYPE
from pinfer.formats.model_file import FLOAT_DTYPES, MADE, ModelFile, TensorInfo
from pinfer.formats.powerinfer import EMBEDDED
from pinfer.quant import F16, QuantTensor

_TURNED, _PREDICTOR = ".ffn_down_t.weight", (".fc1.weight", ".fc2.weight")
_OWN_KEYS = ("powerinfer.", "pinfer.")


class RowMajor(ModelFile):
    """Shows another file so. Matrices that are turned are made when they are asked for: floats in their type, others
    as F16."""

    def __init__(self, file: ModelFile, dequantize: Callable[[QuantTensor], torch.Tensor]) -> None:
        tensors: dict[str, TensorInfo] = {}
        for name, info in file.tensors.items():
            if name.endswith(_TURNED):
                down = _turned(info)
                tensors[down.name] = down
            elif not name.endswith(_PREDICTOR) and not name.startswith(EMBEDDED):
                tensors[name] = info
        metadata: dict[str, Any] = {
            key: value for key, value in file.metadata.items() if key == MODEL_TYPE or not key.startswith(_OWN_KEYS)
        }
        super().__init__(file.path, metadata, tensors, file.parts)
        self._file, self._dequantize = file, dequantize

    @property
    def format(self) -> str:
        return self._file.format

    def _bytes(self, info: TensorInfo) -> torch.Tensor:
        if info.part != MADE:
            return super()._bytes(info)
        rows = self._file.tensor(info.name.replace(".ffn_down.weight", _TURNED))
        return self._dequantize(rows).T.to(FLOAT_DTYPES[info.type]).contiguous().view(torch.uint8).reshape(-1)


def _turned(info: TensorInfo) -> TensorInfo:
    kind = info.type if info.type in FLOAT_DTYPES else F16
    neurons, width = info.shape
    return dataclasses.replace(
        info,
        name=info.name.replace(_TURNED, ".ffn_down.weight"),
        shape=(width, neurons),
        type=kind,
        offset=0,
        nbytes=width * kind.row_bytes(neurons),
        part=MADE,
    )
