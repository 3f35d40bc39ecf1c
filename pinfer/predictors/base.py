"""What a predictor is: it says which neurons to compute for these tokens, on the device, without a host sync."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from pinfer.kernels.ops import split_active
from pinfer.kernels.select_active import Active
from pinfer.predictors.cuts import Cuts
from pinfer.quant import QuantTensor

P = TypeVar("P", bound="Predictor")


class Prediction(NamedTuple):
    """The neurons to compute.

    active:      union over the tokens (see `Active`).
    mask:        bool [T, N], which of them each token uses; None for one token.
    gate_values: float32 [T, N], g_i · x with its bias where the predictor had to compute it; else None.
    shift:       float32 [N] or None: y is to be summed over (act(g_i · x + b_i) - shift_i) · (u_i · x) · d_i.
    """

    active: Active
    mask: torch.Tensor | None
    gate_values: torch.Tensor | None
    shift: torch.Tensor | None = None

    def to(self, device: torch.device) -> Prediction:
        """The same on a device."""
        active = Active(self.active.indices.to(device), self.active.count.to(device))
        return Prediction(active, *(None if one is None else one.to(device) for one in self[1:]))


def split_prediction(whole: Prediction, sizes: tuple[int, ...]) -> list[Prediction]:
    """A prediction by parts, of the first sizes[0] neurons, the next sizes[1] and so on, each numbered from 0."""
    lists = split_active(whole.active.indices, whole.active.count, sizes)
    parts = []
    for active, (first, end) in zip(lists, pairwise([0, *accumulate(sizes)]), strict=True):
        mask, values = (None if one is None else one[:, first:end] for one in (whole.mask, whole.gate_values))
        parts.append(Prediction(active, mask, values, None if whole.shift is None else whole.shift[first:end]))
    return parts


@dataclass(frozen=True)
class PredictorQuality:
    """What a predictor reaches on tokens that its weights were not fitted or trained on.

    Fitted ones have not set their thresholds by them either; trained ones have, and when to stop.

    recall: share of truly active neurons that it names, 1 where none is active; active: share of all
    neurons that are truly active; density: share that it names.
    """

    recall: float
    active: float
    density: float

    @property
    def over_prediction(self) -> float:
        """Neurons named for each truly active one; 1 is perfect."""
        return self.density / self.active if self.active else math.inf


class Predictor(nn.Module, ABC):
    """Chooses neurons for one layer's FFN.

    quality:      what it reached on held-out tokens, where it was fitted to a recall.
    density:      the share of neurons that it was set to name, where that is known.
    cuts:         its thresholds by density, where it has such; `threshold` is then one of them.
    compensation: QuantTensor [D, D] or None; what it makes of x stands for the neurons left out.
    opens_dense:  whether a sequence's first token is computed whole. Its activations are outliers
                  that later tokens attend to, and thresholds for the others fit it badly.
    reads_gate:   whether a prediction reads every row of the FFN's gate, which it has as `gate` and
                  `gate_bias`, and says what they gave.
    """

    threshold: torch.Tensor
    gate: QuantTensor
    gate_bias: torch.Tensor | None
    quality: PredictorQuality | None = None
    density: float | None = None
    cuts: Cuts | None = None
    compensation: QuantTensor | None = None
    opens_dense = False
    reads_gate = False

    @abstractmethod
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        """x: float32 [T, D], the FFN's normed input; residual: float32 [T, D], the same before the norm."""

    @property
    def own_bytes(self) -> int:
        """Bytes of weights that a prediction reads and the FFN does not have: 0 for those that read the gate."""
        return 0

    @property
    def expected_density(self) -> float | None:
        """The share of neurons that a prediction will name, for kernels tuned by density; None if nobody knows."""
        return self.quality.density if self.density is None and self.quality is not None else self.density

    def at_density(self: P, density: float) -> P:
        """The same predictor, its weights shared, set to name a share `density` in [0, 1] of the neurons.

        ValueError for one without thresholds to move.
        """
        if self.cuts is None:
            raise ValueError(f"{type(self).__name__} has no threshold to set a density of {density:g} by")
        other = copy.copy(self)
        other.threshold, other.density, other.quality = self.cuts.threshold(density), density, None
        return other

    @abstractmethod
    def shard(self, neurons: torch.Tensor) -> Predictor:
        """The same predictor for some of the neurons (int64 [H]), numbered in that order, without compensation or cuts."""


def share_of(named: torch.Tensor, active: torch.Tensor) -> float:
    """Share of the active (token, neuron) pairs, bool [T, N], that are named; 1 where none is active."""
    return float((named & active).sum() / active.sum()) if bool(active.any()) else 1.0
