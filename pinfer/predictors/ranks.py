"""Chooses a rank for each layer's low-rank predictor, so that all of them together keep to a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pinfer.predictors.low_rank import RANK_MULTIPLE
from pinfer.quant import QuantType


@dataclass(frozen=True)
class LayerNeed:
    """What a layer asks of its predictor.

    spectrum: float64 [M], descending, the energy of each direction of the gate's outputs
    (`low_rank.spectrum`). density: the share of its neurons that are active.
    """

    n_neurons: int
    width: int
    density: float
    spectrum: torch.Tensor

    def gain(self, rank: int) -> float:
        """The share of energy that RANK_MULTIPLE directions after the first `rank` add, times the density."""
        total = float(self.spectrum.sum())
        return self.density * float(self.spectrum[rank : rank + RANK_MULTIPLE].sum()) / total if total > 0 else 0.0


def factor_bytes(rank: int, n_neurons: int, width: int, kind: QuantType) -> int:
    """Bytes of factors [R, D] and [N, R] stored as `kind`."""
    return rank * kind.row_bytes(width) + n_neurons * kind.row_bytes(rank)


def rank_under_budget(needs: Sequence[LayerNeed], budget_bytes: int, kind: QuantType) -> tuple[int, ...]:
    """A rank for each layer, a multiple of 32, such that their factors take at most `budget_bytes`.

    Every layer has the least rank; then, as long as it fits, the layer whose next 32 directions bring
    most for a byte has them, of equals the one of the lowest rank. Gains fall with the rank, so that no other ranks of that size gain more
    but for what the last step leaves over. ValueError, naming the least budget, where it is too small.
    """
    ranks = [RANK_MULTIPLE] * len(needs)
    steps = [factor_bytes(RANK_MULTIPLE, need.n_neurons, need.width, kind) for need in needs]
    left = budget_bytes - sum(steps)
    if left < 0:
        raise ValueError(
            f"a budget of {budget_bytes} bytes is too small for the predictors: "
            f"rank {RANK_MULTIPLE} in every layer takes {sum(steps)} bytes"
        )
    while True:
        open_layers = [
            (need.gain(ranks[layer]) / steps[layer], -ranks[layer], -layer)
            for layer, need in enumerate(needs)
            if steps[layer] <= left and ranks[layer] + RANK_MULTIPLE <= min(need.n_neurons, need.width)
        ]
        if not open_layers:
            return tuple(ranks)
        layer = -max(open_layers)[-1]
        ranks[layer] += RANK_MULTIPLE
        left -= steps[layer]
