"""Where a model's weights come from, and the replacing of those it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from pinfer.quant import QuantTensor


class WeightSource(Protocol):
    """Weights under GGUF's tensor names: a GGUFFile, or anything that answers like one."""

    def has(self, name: str) -> bool: ...
    def tensor(self, name: str) -> QuantTensor: ...
    def vector(self, name: str) -> torch.Tensor: ...


def replace_weights(model: nn.Module, change: Callable[[QuantTensor], QuantTensor]) -> None:
    """Put `change(weight)` in place of every QuantTensor that the model's modules hold, predictors' included.

    They are found among a module's attributes and in the fields of dataclasses there. A matrix that
    is held twice (a tied head, a gate that the predictor reads too) is changed once and stays one.
    """
    changed: dict[int, tuple[QuantTensor, QuantTensor]] = {}  # the old one is kept, or its id might be another's

    def replacement(weight: QuantTensor) -> QuantTensor:
        if id(weight) not in changed:
            changed[id(weight)] = weight, change(weight)
        return changed[id(weight)][1]

    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, QuantTensor):
                setattr(module, name, replacement(value))
            elif weights := _weights_in(value):
                new = {field: replacement(weight) for field, weight in weights.items()}
                setattr(module, name, dataclasses.replace(value, **new))


def _weights_in(value: Any) -> dict[str, QuantTensor]:
    """The QuantTensors among a dataclass's fields; none of anything else."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: held for name, held in fields.items() if isinstance(held, QuantTensor)}
