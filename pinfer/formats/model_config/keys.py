"""The metadata keys of one architecture, checked as they are read."""

from __future__ import annotations

import math
from typing import Any, cast, get_args

from pinfer.config import Activation
from pinfer.formats.errors import FormatError, shown
from pinfer.formats.model_file import ModelFile

# Hugging Face's names of the same functions, which some files carry.
_ACTIVATION_NAMES = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
    "relu_squared": "relu2",
    "fatrelu": "relu",
}
_LARGEST_COUNT = 2**31 - 1


class Keys:
    """The keys that a file's architecture prefixes with its name."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self.architecture = file.architecture

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def has(self, key: str) -> bool:
        return self.name(key) in self.file.metadata

    def is_list(self, key: str) -> bool:
        return isinstance(self.file.metadata.get(self.name(key)), list)

    def error(self, key: str, problem: str) -> FormatError:
        return self.file.error(f"metadata key {shown(self.name(key))} {problem}")

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; a list with one value for every layer counts as that value."""
        name = self.name(key)
        if self.is_list(key):
            value = self._uniform(key)
        else:
            value = self.file.get(name, int) if default is None else self.file.get(name, int, default)
        if not least <= value <= _LARGEST_COUNT:
            raise self.error(key, f"must lie in [{least}, {_LARGEST_COUNT}], not {value}")
        return value

    def _uniform(self, key: str) -> int:
        values = set(self.file.get_list(self.name(key), int))
        if len(values) != 1:
            raise self.error(key, f"holds {len(values)} different values; layers that differ are not supported yet")
        return values.pop()

    def positive(self, key: str, default: float | None = None) -> float:
        name = self.name(key)
        value = self.file.get(name, float) if default is None else self.file.get(name, float, default)
        if not (math.isfinite(value) and value > 0):
            raise self.error(key, f"must be finite and positive, not {value}")
        return value

    def at_least_zero(self, key: str, default: float = 0.0) -> float:
        value = self.file.get(self.name(key), float, default)
        if not (math.isfinite(value) and value >= 0):
            raise self.error(key, f"must be finite and at least 0, not {value}")
        return value

    def refuse(self, key: str, kind: type[Any], neutral: tuple[object, ...], what: str) -> None:
        """Fail if `key` is there with a value that is not among its `neutral` ones."""
        value = self.file.get(self.name(key), kind, neutral[0])
        if value not in neutral:
            raise self.error(key, f"is {value}: {what} not supported yet")

    def fraction(self, key: str) -> float:
        """An epsilon, in (0, 1)."""
        value = self.positive(key)
        if value >= 1:
            raise self.error(key, f"must lie in (0, 1), not {value}")
        return value

    def activation(self, default: Activation) -> Activation:
        """From our own key `hidden_activation`, which ReLU models need: llama.cpp has none for them."""
        stated = self.file.get(self.name("hidden_activation"), str, default)
        value = _ACTIVATION_NAMES.get(stated, stated)
        if value not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise self.error("hidden_activation", f"is {shown(stated)}, which is not supported yet; {known} are")
        return cast(Activation, value)
