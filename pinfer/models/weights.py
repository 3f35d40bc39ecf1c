"""Where a model's weights come from, and the replacing of those it holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from pinfer.ffn import Activity
from pinfer.quant import QuantTensor

Field = str | int | None  # of a dataclass, or a place in a tuple
Holder = tuple[nn.Module, str, Field]  # module, attribute, and where in it
WeightChange = Callable[[QuantTensor], QuantTensor]


class WeightSource(Protocol):
    """Weights under GGUF's tensor names: a GGUFFile, or anything that answers like one."""

    def has(self, name: str) -> bool: ...
    def tensor(self, name: str) -> QuantTensor: ...
    def vector(self, name: str) -> torch.Tensor: ...
    def expert(self, name: str, number: int) -> QuantTensor: ...


def replace_weights(model: nn.Module, change: WeightChange) -> None:
    """Put `change(weight)` in place of every QuantTensor that the model's modules hold, predictors' included.

    They are found among a module's attributes and in the fields of dataclasses there. A matrix that
    is held twice (a tied head, a gate that the predictor reads too) is changed once and stays one.
    """
    for holders in _holders(
        model, QuantTensor
    ):  # one weight after the other, so that no second model is ever in memory
        _replace_one(holders, change)


def move(module: nn.Module, put: Callable[[torch.Tensor], torch.Tensor], put_weight: WeightChange) -> None:
    """Put everything that a module computes with in place of what the two functions make of it, one after the other.

    `put_weight` changes QuantTensors, `put` other tensors: norms, thresholds, shifts, counts. Modules that keep a copy
    on every device (`per_device`) are left as they are, and so is what only a fit or calibration reads (cuts).
    """
    replace_weights(module, put_weight)
    for holders in _holders(module, torch.Tensor):
        _replace_one(holders, put)
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Activity):
                value.move(put)


def held_bytes(module: nn.Module) -> int:
    """Bytes of the weights and vectors that `move` would move, counts aside; what is held twice counts once."""
    weights = [_held_by(*holders[0]) for kind in (QuantTensor, torch.Tensor) for holders in _holders(module, kind)]
    return sum(weight.nbytes for weight in weights)


def _holders(model: nn.Module, kind: type) -> list[list[Holder]]:
    """Per weight of that kind, the places that hold it."""
    places: dict[int, list[Holder]] = {}
    for module in model.modules():
        if getattr(module, "per_device", False):
            continue
        for name, value in vars(module).items():
            held = {None: value} if isinstance(value, kind) else _fields(value, kind)
            for field, weight in held.items():
                places.setdefault(id(weight), []).append((module, name, field))
    return list(places.values())


def _held_by(module: nn.Module, name: str, field: Field) -> Any:
    value = getattr(module, name)
    return value if field is None else value[field] if isinstance(field, int) else getattr(value, field)


def _replace_one(holders: list[Holder], change: Callable[[Any], Any]) -> None:
    """Change the one weight that modules hold under a name, or in the dataclass or tuple under it."""
    changed = change(_held_by(*holders[0]))
    for module, name, field in holders:
        value = getattr(module, name)
        if isinstance(field, int):
            setattr(module, name, (*value[:field], changed, *value[field + 1 :]))
        else:
            setattr(module, name, changed if field is None else dataclasses.replace(value, **{field: changed}))


def _fields(value: Any, kind: type) -> dict[Field, Any]:
    """What there is of that kind in a dataclass of weights, or in a tuple; none of anything else."""
    if type(value) is tuple:
        return {number: held for number, held in enumerate(value) if isinstance(held, kind)}
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, QuantTensor)) or hasattr(value, "for_fitting"):
        return {}
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {name: held for name, held in fields.items() if isinstance(held, kind)}
