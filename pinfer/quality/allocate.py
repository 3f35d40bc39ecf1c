"""Densities by layer, from what each layer costs at some densities when it alone is sparse. No model in it.

Costs of layers are taken to add up. Of all allocations with a given mean density the cheapest is then the
one at which every layer gains the same by a little more density (Lagrange; Everett 1963), provided that the
curves are convex: each is replaced by its lower hull. Between measured densities the logarithm of the cost
is interpolated, as costs fall by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter

Point = tuple[float, float]  # density, cost

PIECES = 32  # straight pieces that stand for a curve between two measured densities
LEAST_COST = 1e-9  # nats, of which there is a logarithm


@dataclass(frozen=True)
class Curve:
    """What one layer costs: at `densities`, rising in [0, 1], so many nats a token in `costs`."""

    densities: tuple[float, ...]
    costs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.densities or len(self.densities) != len(self.costs):
            raise ValueError(f"a curve of {len(self.densities)} densities and {len(self.costs)} costs")
        if not all(0 <= one <= 1 for one in self.densities) or any(a >= b for a, b in pairwise(self.densities)):
            raise ValueError(f"a curve's densities must rise within [0, 1]: {list(self.densities)}")
        if not all(math.isfinite(cost) for cost in self.costs):
            raise ValueError(f"a curve's costs must be finite: {list(self.costs)}")

    @cached_property
    def hull(self) -> list[Point]:
        """The corners of the convex curve, falling or level, that is nowhere above the interpolated costs."""
        least, falling = math.inf, []
        for density, cost in zip(self.densities, self.costs, strict=True):
            least = min(least, max(cost, LEAST_COST))
            falling.append((density, least))
        corners: list[Point] = []
        for point in _interpolated(falling):
            while len(corners) > 1 and _slope(corners[-2], corners[-1]) >= _slope(corners[-1], point):
                corners.pop()
            corners.append(point)
        return corners

    def cost(self, density: float) -> float:
        """Nats a token on the hull at a density; beyond its ends, those of its ends."""
        hull = self.hull
        for low, high in pairwise(hull):
            if density < high[0]:
                return low[1] + _slope(low, high) * max(0.0, density - low[0])
        return hull[-1][1]


def allocate(curves: Sequence[Curve], mean: float) -> list[float]:
    """A density for each layer, `mean` on the average, at the least sum of costs; layers that are alike get the same.

    ValueError for a mean that is below that of the curves' lowest densities; above that of their
    highest ones, those are the answer.
    """
    hulls = [curve.hull for curve in curves]
    densities = [hull[0][0] for hull in hulls]
    left = mean * len(hulls) - sum(densities)
    if left < -1e-9:
        lowest = sum(densities) / len(hulls)
        raise ValueError(f"a mean density of {mean:g} is below {lowest:g}, the lowest that the curves reach")
    pieces = sorted(
        (_slope(low, high), layer, high[0] - low[0]) for layer, hull in enumerate(hulls) for low, high in pairwise(hull)
    )
    for _, equal in groupby(pieces, key=itemgetter(0)):
        alike = list(equal)
        share = min(1.0, max(0.0, left) / sum(width for _, _, width in alike))
        for _, layer, width in alike:
            densities[layer] += share * width
            left -= share * width
    return [min(density, hull[-1][0]) for density, hull in zip(densities, hulls, strict=True)]


def _interpolated(corners: Sequence[Point]) -> list[Point]:
    points = [corners[0]]
    for (low, before), (high, after) in pairwise(corners):
        steps = [step / PIECES for step in range(1, PIECES)]
        points += [(low + at * (high - low), before * (after / before) ** at) for at in steps]
        points.append((high, after))
    return points


def _slope(low: Point, high: Point) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
