"""Thresholds by density: how far to lower a predictor's bar so that a given share of neurons passes.

Every predictor compares scores with thresholds of the form base + cut · scale: base and scale belong to
the layer's neurons, the cut to the density wanted. The cuts are quantiles of the margins
(score - base) / scale over tokens of a calibration text, so the density reached elsewhere is near the
one asked for and not equal to it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

# Fine where ReLU models live, and evenly above.
DENSITIES = (
    *(0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09),
    *(0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.225, 0.25, 0.275),
    *(round(0.3 + 0.05 * step, 2) for step in range(14)),
    *(0.97, 0.98, 0.99, 1.0),
)
KEPT_VALUES = 1 << 24  # of the margins that cuts are quantiles of


@dataclass(frozen=True)
class Cuts:
    """values: float32 [DENSITIES], falling; base and scale > 0: float32 [1] or [N]."""

    for_fitting: ClassVar[bool] = True  # no prediction reads them, so they stay on the CPU

    values: torch.Tensor
    base: torch.Tensor
    scale: torch.Tensor

    def __post_init__(self) -> None:
        if self.values.shape != (len(DENSITIES),):
            raise ValueError(f"cuts are {list(self.values.shape)}, expected [{len(DENSITIES)}]")
        if bool(self.values.isnan().any()):
            raise ValueError("scores to take cuts from are not numbers (NaN): the weights are damaged")
        if bool((self.values.diff() > 0).any()):
            raise ValueError("cuts must fall as the density rises")

    @classmethod
    def of(cls, margins: torch.Tensor, base: torch.Tensor, scale: torch.Tensor) -> Cuts:
        """From margins [T, N] of many tokens; of more than KEPT_VALUES, those of some tokens taken evenly."""
        some = margins[:: max(1, -(-margins.numel() // KEPT_VALUES))]
        flat = some.flatten().float().sort(descending=True).values
        # As many values pass as lie above the cut, which is itself one of them.
        ranks = [min(flat.numel() - 1, max(0, round(density * flat.numel()))) for density in DENSITIES]
        return cls(flat[ranks].clone(), base, scale)

    def threshold(self, density: float) -> torch.Tensor:
        """What scores must exceed so that a share `density` in [0, 1] of neurons passes, float32 as base and scale."""
        return self.base + self.cut(density) * self.scale

    def cut(self, density: float) -> float:
        """At density 1 it is -inf, so that everything passes; between the DENSITIES it is interpolated."""
        if not 0 <= density <= 1:
            raise ValueError(f"a density of {density} does not lie in [0, 1]")
        if density == 1:
            return -math.inf
        density = max(density, DENSITIES[0])
        above = bisect.bisect_left(DENSITIES, density)
        if DENSITIES[above] == density:
            return float(self.values[above])
        low, high = DENSITIES[above - 1], DENSITIES[above]
        share = (density - low) / (high - low)
        return float(self.values[above - 1] * (1 - share) + self.values[above] * share)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named tensors for a file, from which `from_tensors` makes it again."""
        return {"cuts": self.values, "cut_base": self.base, "cut_scale": self.scale}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], n_neurons: int) -> Cuts:
        """The inverse of `tensors`; KeyError or ValueError for tensors that are missing or do not fit."""
        values, base, scale = (tensors[name] for name in ("cuts", "cut_base", "cut_scale"))
        for name, one in (("cut_base", base), ("cut_scale", scale)):
            if one.shape not in ((1,), (n_neurons,)) or one.dtype != torch.float32:
                raise ValueError(f"{name} is {one.dtype} {list(one.shape)}, expected float32 [1] or [{n_neurons}]")
        if values.dtype != torch.float32:
            raise ValueError(f"cuts are {values.dtype}, expected float32")
        return cls(values, base, scale)
