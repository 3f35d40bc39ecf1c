"""How often neurons are named: from a published skew, uniform, or from statistics.

PowerInfer (Song et al. 2024, figure 5) reports the share h80 of a model's neurons that hold 80 % of its activations. A
power law through that point has the hottest share h of neurons hold F(h) = h^α of them, α = ln 0.8 / ln h80. No neuron
is named more than once a token, so at a mean density a the law is cut: F(h) = min(h / a, h^α); all that is cut off the
hottest neurons is lost to F until the law is back below, and the whole is 1 either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pinfer.placement.statistics import LayerStatistics

HELD = 0.8
# Share of neurons that hold 80 % of activations (whole model), and of LLaMA-70B with SwiGLU.
SKEWS = {"relu-llama-70b": 0.26, "opt-30b": 0.17, "swiglu-70b": 0.75, "uniform": HELD}


def exponent(h80: float) -> float:
    """α of F(h) = h^α; ValueError unless h80 lies in (0, 0.8], 0.8 being uniform."""
    if not 0 < h80 <= HELD:
        raise ValueError(f"the share of neurons that hold 80 % of activations must lie in (0, 0.8], not {h80}")
    return math.log(HELD) / math.log(h80)


def held_by(share: np.ndarray, h80: float, density: float) -> np.ndarray:
    """F(h) of shares h float64 in [0, 1]."""
    return np.minimum(share / density, share ** exponent(h80))


def published_rates(
    skew: str | float, density: float, n_layers: int, n_neurons: int, *, spread: float = 0.0, seed: int = 0
) -> list[np.ndarray]:
    """Rates float64 [N] a layer, hottest first, whose mean over the model is `density`, in (0, 1].

    skew: a name of SKEWS or h80 itself. spread: without it every layer is alike; with it the layers' densities are
    log-normal with this standard deviation, and the neurons of each stand in an order of their own (seeded).
    ValueError for what is out of range.
    """
    if isinstance(skew, str) and skew not in SKEWS:
        raise ValueError(f"skew {skew!r} is none of {', '.join(SKEWS)}")
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    if not 0 <= spread <= 2:
        raise ValueError(f"spread must lie in [0, 2], not {spread}")
    h80 = SKEWS[skew] if isinstance(skew, str) else skew
    if not spread:
        return [_rates(h80, density, n_neurons)] * n_layers
    random = np.random.default_rng(seed)
    wanted = np.exp(spread * random.standard_normal(n_layers))
    layers = []
    for share in _scaled([wanted], density)[0]:
        layers.append(random.permutation(_rates(h80, float(share), n_neurons)))
    return layers


def measured_rates(
    statistics: Sequence[LayerStatistics], *, density: float | None = None, over_prediction: float = 1.0
) -> list[np.ndarray]:
    """Rates float64 [N] a layer from how often neurons fired, times over-prediction.

    density: the mean over the model that firing is scaled to first; None: as counted. No rate exceeds 1, and what
    scaling takes above it goes to the others. ValueError where nothing fired, or fired on more tokens than there were, or a
    number is out of range.
    """
    if not over_prediction >= 1 or not math.isfinite(over_prediction):
        raise ValueError(f"over_prediction must be at least 1, not {over_prediction}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    for number, one in enumerate(statistics):
        tokens, least, most = int(one.tokens), int(one.fired.min()), int(one.fired.max())
        if not 0 <= least <= most <= tokens or not tokens:
            raise ValueError(f"layer {number}: neurons fired on {least} to {most} of {tokens} tokens")
    rates = [(one.fired.double() / int(one.tokens)).numpy() for one in statistics]
    total, count = sum(float(one.sum()) for one in rates), sum(map(len, rates))
    if total == 0:
        raise ValueError("no neuron ever fired: there is nothing to place by")
    wanted = (total / count if density is None else density) * over_prediction
    return _scaled(rates, min(1.0, wanted))


def _rates(h80: float, density: float, n_neurons: int) -> np.ndarray:
    edges = np.linspace(0, 1, n_neurons + 1)
    return np.clip(np.diff(held_by(edges, h80, density)) * density * n_neurons, 0, 1)


def _scaled(rates: Sequence[np.ndarray], mean: float) -> list[np.ndarray]:
    """Rates >= 0 times one factor, cut at 1, such that their mean is as given (or all that fired are at 1)."""
    every = np.concatenate(rates)
    low, high = 0.0, 1.0
    while np.minimum(1, high * every).mean() < mean and high < 1e12:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * every).mean() < mean else (low, middle)
    return [np.minimum(1.0, high * one) for one in rates]
