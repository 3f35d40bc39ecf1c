"""Activation statistics as plain data: per layer, how often each neuron fires and how much it contributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch

QUANTILES = 101  # of magnitudes, at 0, 1, …, 100 %
HOTTEST = 0.2  # the share of neurons whose overlap tells how settled a ranking is


@dataclass(frozen=True)
class LayerStatistics:
    """What one layer's N neurons did over the tokens of a text, each sequence's first token left out.

    tokens:          int64 [1], the tokens counted.
    fired:           int64 [N], on how many of them a neuron fired: act(gate) != 0 where the activation is
                     exactly 0 below 0; otherwise the neuron is among the fewest that hold 80 % of the
                     token's contribution, Σ |h_i| ‖d_i‖.
    mass:            float64 [N], Σ over tokens of |h_i| ‖d_i‖, what a neuron contributes to the layer's output.
    first_half_mass: float64 [N], the same over the first half of the tokens.
    up_mean:         float32 [2, N], the mean of |u_i| where the gate product is below 0, and where it is not
                     (u_i as it enters h: clamped under dReLU, 1 without an up). A neuron that was never on
                     one side has its mean over all tokens there.
    center:          float32 [N], the median of act(gate) (the lower of two), over at most CENTER_TOKENS
                     tokens taken evenly.
    input_quantiles: float32 [QUANTILES], of |x| over all values of the FFN's input (TEAL thresholds it).
    hidden_quantiles: float32 [QUANTILES], of |h|; both to within 0.1 % of a value.
    """

    tokens: torch.Tensor
    fired: torch.Tensor
    mass: torch.Tensor
    first_half_mass: torch.Tensor
    up_mean: torch.Tensor
    center: torch.Tensor
    input_quantiles: torch.Tensor
    hidden_quantiles: torch.Tensor

    def __post_init__(self) -> None:
        """ValueError unless shapes and types are those above."""
        n = self.fired.numel()
        for name, (dtype, shape) in _kinds(n).items():
            found: torch.Tensor = getattr(self, name)
            if found.dtype != dtype or tuple(found.shape) != shape:
                raise ValueError(
                    f"{name} is {found.dtype} {list(found.shape)}, expected {dtype} {list(shape)} for {n} neurons"
                )

    def renumbered(self, order: torch.Tensor) -> LayerStatistics:
        """The same for neurons in another order: what is first was neuron order[0] (int64 [N])."""
        by_neuron = {name: getattr(self, name)[..., order] for name, (_, shape) in _kinds(self.n_neurons).items()
                     if name in ("fired", "mass", "first_half_mass", "up_mean", "center")}  # fmt: skip
        return dataclasses.replace(self, **by_neuron)

    @property
    def n_neurons(self) -> int:
        return self.fired.numel()

    @property
    def density(self) -> float:
        """Neurons that fire on a token, as a share of all."""
        return int(self.fired.sum()) / (int(self.tokens) * self.n_neurons)

    @property
    def convergence(self) -> float:
        """The share of the hottest 20 % by mass that both halves of the tokens agree on; chance is 0.2."""
        count = max(1, round(HOTTEST * self.n_neurons))
        halves = (self.first_half_mass, self.mass - self.first_half_mass)
        first, second = (set(hottest_first(half)[:count].tolist()) for half in halves)
        return len(first & second) / count

    def hot_share(self, share: float = 0.8) -> float:
        """The smallest share of neurons that make up `share` of all firings; 0 where none fired."""
        return share_holding(self.fired, share)

    def mass_share(self, share: float = 0.8) -> float:
        """The smallest share of neurons that make up `share` of the contribution mass."""
        return share_holding(self.mass, share)


def hottest_first(values: torch.Tensor) -> torch.Tensor:
    """Neuron numbers int64 [N] by falling value; among equals, the lower number comes first."""
    return values.sort(descending=True, stable=True).indices


def share_holding(values: torch.Tensor, share: float) -> float:
    """The smallest share of the entries of `values` [N] >= 0 that sum to `share` of the total; 0 where that is 0."""
    cumulated = values.double().sort(descending=True).values.cumsum(0)
    if not cumulated[-1] > 0:
        return 0.0
    return (int((cumulated < share * cumulated[-1]).sum()) + 1) / values.numel()


def to_tensors(layers: tuple[LayerStatistics, ...]) -> dict[str, torch.Tensor]:
    """The statistics as named tensors for a safetensors file: "blk.3.mass" and so on."""
    return {
        f"blk.{number}.{field.name}": getattr(layer, field.name)
        for number, layer in enumerate(layers)
        for field in dataclasses.fields(layer)
    }


def from_tensors(tensors: Mapping[str, torch.Tensor], n_layers: int) -> tuple[LayerStatistics, ...]:
    """What `to_tensors` was given; ValueError where a tensor is missing or another shape or type than it should be."""
    layers = []
    for number in range(n_layers):
        names = {field.name: f"blk.{number}.{field.name}" for field in dataclasses.fields(LayerStatistics)}
        if missing := [name for name in names.values() if name not in tensors]:
            raise ValueError(f"tensor {missing[0]} is missing")
        try:
            layers.append(LayerStatistics(**{field: tensors[name] for field, name in names.items()}))
        except ValueError as problem:
            raise ValueError(f"blk.{number}: {problem}") from problem
    return tuple(layers)


def _kinds(n: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every field for n neurons."""
    return {
        "tokens": (torch.int64, (1,)),
        "fired": (torch.int64, (n,)),
        "mass": (torch.float64, (n,)),
        "first_half_mass": (torch.float64, (n,)),
        "up_mean": (torch.float32, (2, n)),
        "center": (torch.float32, (n,)),
        "input_quantiles": (torch.float32, (QUANTILES,)),
        "hidden_quantiles": (torch.float32, (QUANTILES,)),
    }
