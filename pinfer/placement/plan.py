"""A placement plan as plain data: per layer, where attention lives and which neurons are hot."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args

import numpy as np
import torch

Place = Literal["gpu", "cpu"]
# Who predicts: the GPU for all neurons, the CPU for all, or each device for its own.
PredictorPlace = Literal["gpu", "cpu", "split"]
FORMAT = 1


@dataclass(frozen=True, eq=False)
class LayerPlan:
    """One layer: where its attention is, with the layer's norms, keys and values; its hot neurons bool [N], which are
    on the GPU; and where it predicts."""

    attention: Place
    hot: torch.Tensor
    predictor: PredictorPlace = "split"

    def __post_init__(self) -> None:
        if self.hot.dtype != torch.bool or self.hot.dim() != 1:
            raise ValueError(f"hot neurons are {self.hot.dtype} {list(self.hot.shape)}, expected torch.bool [N]")
        for name, value, choices in (
            ("attention", self.attention, get_args(Place)),
            ("predictor", self.predictor, get_args(PredictorPlace)),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}, none of {', '.join(choices)}")

    @property
    def n_hot(self) -> int:
        return int(self.hot.sum())

    @property
    def is_split(self) -> bool:
        """Whether both devices compute in this layer."""
        return self.n_hot != (self.hot.numel() if self.attention == "gpu" else 0)


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole model's placement.

    head:         where the last norm and the head are.
    context:      positions that keys and values are reserved for; None where the plan was not made for any.
    budget_bytes: the GPU memory it was made for; None without a limit.
    figures:      what the solver predicts and accounts for, as plain data for JSON.
    """

    layers: tuple[LayerPlan, ...]
    head: Place = "gpu"
    context: int | None = None
    budget_bytes: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.head not in get_args(Place):
            raise ValueError(f"head is {self.head!r}, none of {', '.join(get_args(Place))}")

    @classmethod
    def uniform(cls, n_layers: int, n_neurons: int, cold_fraction: float) -> Plan:
        """The same share of cold neurons in every layer, the last ones by number (no statistics needed)."""
        if not 0 <= cold_fraction <= 1:
            raise ValueError(f"cold_fraction must lie in [0, 1], not {cold_fraction}")
        n_hot = n_neurons - round(cold_fraction * n_neurons)
        return cls(tuple(LayerPlan("gpu", torch.arange(n_neurons) < n_hot) for _ in range(n_layers)))

    @classmethod
    def whole_layers(cls, n_layers: int, n_neurons: int, gpu_layers: int) -> Plan:
        """The last `gpu_layers` layers on the GPU, as llama.cpp's -ngl has them; above n_layers, or -1, the head too."""
        if gpu_layers < -1:
            raise ValueError(f"gpu_layers must be at least -1 (all), not {gpu_layers}")
        wanted = n_layers + 1 if gpu_layers == -1 else gpu_layers
        on_gpu = [layer >= n_layers - wanted for layer in range(n_layers)]
        layers = tuple(LayerPlan("gpu" if here else "cpu", torch.full((n_neurons,), here)) for here in on_gpu)
        return cls(layers, "gpu" if wanted > n_layers else "cpu")

    def split(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The hot and the cold neuron numbers of a layer, each int64 and ascending."""
        hot = self.layers[layer].hot
        return hot.nonzero().flatten(), (~hot).nonzero().flatten()

    def to_plain(self) -> dict[str, Any]:
        """Plain data for JSON; hot neurons as base64 of a bit each, the first in the lowest bit of the first byte."""
        return {
            "format": FORMAT,
            "head": self.head,
            "context": self.context,
            "budget_bytes": self.budget_bytes,
            "figures": dict(self.figures),
            "layers": [
                {
                    "attention": layer.attention,
                    "predictor": layer.predictor,
                    "n_neurons": layer.hot.numel(),
                    "n_hot": layer.n_hot,
                    "hot": base64.b64encode(np.packbits(layer.hot.numpy(), bitorder="little").tobytes()).decode(),
                }
                for layer in self.layers
            ],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Plan:
        """What `to_plain` gave. ValueError for another format, or where something is missing or does not fit."""
        if (found := _taken(plain, "format", int)) != FORMAT:
            raise ValueError(f"a plan of format {found}, this version reads {FORMAT}")
        layers = tuple(_layer(number, one) for number, one in enumerate(_taken(plain, "layers", list)))
        return cls(
            layers,
            _taken(plain, "head", str),
            _taken(plain, "context", int, NoneType),
            _taken(plain, "budget_bytes", int, NoneType),
            _taken(plain, "figures", Mapping),
        )


def _taken(plain: Any, name: str, *types: type) -> Any:
    """A value of plain data. ValueError where it is missing or none of these types."""
    if not isinstance(plain, Mapping) or name not in plain:
        raise ValueError(f"no plan: {name} is missing")
    value = plain[name]
    if not isinstance(value, types):
        wanted = " or ".join(one.__name__ for one in types)
        raise ValueError(f"no plan: {name} is of type {type(value).__name__}, not {wanted}")
    return value


def _layer(number: int, plain: Any) -> LayerPlan:
    try:
        count, n_hot = _taken(plain, "n_neurons", int), _taken(plain, "n_hot", int)
        packed = np.frombuffer(base64.b64decode(_taken(plain, "hot", str), validate=True), dtype=np.uint8)
        if count < 0 or len(packed) != -(-count // 8):
            raise ValueError(f"{len(packed)} bytes of hot neurons for {count} neurons")
        hot = torch.from_numpy(np.unpackbits(packed, count=count, bitorder="little").astype(bool))
        layer = LayerPlan(_taken(plain, "attention", str), hot, _taken(plain, "predictor", str))
        if layer.n_hot != n_hot:
            raise ValueError(f"{layer.n_hot} hot neurons where {n_hot} are announced")
    except ValueError as problem:
        raise ValueError(f"layer {number}: {problem}") from problem
    return layer
