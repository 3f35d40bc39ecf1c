"""Where a model's weights come from, and the replacing of those it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from pinfer.quant import QuantTensor

Holder = tuple[nn.Module, str, str | None]  # module, attribute, field of the dataclass there


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
    for holders in _holders(model):  # one weight after the other, so that no second model is ever in memory
        _replace_one(holders, change)


def _holders(model: nn.Module) -> list[list[Holder]]:
    """Per weight, the places that hold it."""
    places: dict[int, list[Holder]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            held = {None: value} if isinstance(value, QuantTensor) else _weights_in(value)
            for field, weight in held.items():
                places.setdefault(id(weight), []).append((module, name, field))
    return list(places.values())


def _replace_one(holders: list[Holder], change: Callable[[QuantTensor], QuantTensor]) -> None:
    """Change the one weight that modules hold under a name, or in a field of the dataclass under it."""
    module, name, field = holders[0]
    changed = change(getattr(module, name) if field is None else getattr(getattr(module, name), field))
    for module, name, field in holders:
        value = getattr(module, name)
        setattr(module, name, changed if field is None else dataclasses.replace(value, **{field: changed}))


def _weights_in(value: Any) -> dict[str, QuantTensor]:
    """The QuantTensors among a dataclass's fields; none of anything else."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: held for name, held in fields.items() if isinstance(held, QuantTensor)}
