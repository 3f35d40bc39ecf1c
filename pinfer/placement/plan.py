"""A placement plan as plain data: per layer, which neurons are hot."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Plan:
    """hot[i]: bool [N], the neurons of layer i that live on the fast device; the others are cold."""

    hot: tuple[torch.Tensor, ...]

    @classmethod
    def uniform(cls, n_layers: int, n_neurons: int, cold_fraction: float) -> Plan:
        """The same share of cold neurons in every layer, the last ones by number (no statistics needed)."""
        if not 0 <= cold_fraction <= 1:
            raise ValueError(f"cold_fraction must lie in [0, 1], not {cold_fraction}")
        n_hot = n_neurons - round(cold_fraction * n_neurons)
        return cls(tuple(torch.arange(n_neurons) < n_hot for _ in range(n_layers)))

    def split(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The hot and the cold neuron numbers of a layer, each int64 and ascending."""
        hot = self.hot[layer]
        return hot.nonzero().flatten(), (~hot).nonzero().flatten()
