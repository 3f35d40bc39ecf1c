"""How often each neuron is to fire, and the offsets that make it so."""

from __future__ import annotations

import torch

Tensor = torch.Tensor

MOST_FREQUENT = 0.98  # no neuron fires more often
HOT_SHARE, HOT_FIRINGS = 0.26, 0.80  # a power law as PowerInfer reports it: 80 % of the firings on 26 % of the neurons
# Above this mean no frequencies below MOST_FREQUENT put HOT_FIRINGS on HOT_SHARE of the neurons
# (their most is 0.98 · 0.26 / 0.8); the exponent then stays what it is here.
_STEEPEST_DENSITY = 0.30
_BISECTIONS = 60


def power_law(n: int, mean: float, exponent: float) -> Tensor:
    """min(0.98, C · rank^-exponent) over `n` neurons, C such that the mean is `mean`; float64 [n], falling."""
    powers = ((torch.arange(n, dtype=torch.float64) + 0.5) / n) ** -exponent
    low, high = 0.0, 1.0
    while float((high * powers).clamp(max=MOST_FREQUENT).mean()) < mean:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = float((middle * powers).clamp(max=MOST_FREQUENT).mean()) < mean
        low, high = (middle, high) if below else (low, middle)
    return (high * powers).clamp(max=MOST_FREQUENT)


def power_law_exponent(n: int, density: float) -> float:
    """The exponent that puts about 80 % of the firings on 26 % of the neurons."""
    mean = min(density, _STEEPEST_DENSITY)
    low, high = 0.0, 8.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        frequencies = power_law(n, mean, middle)
        held = float(frequencies[: round(HOT_SHARE * n)].sum() / frequencies.sum())
        low, high = (middle, high) if held < HOT_FIRINGS else (low, middle)
    return high


def frequencies(n: int, density: float, exponent: float, generator: torch.Generator) -> Tensor:
    """Each neuron's probability of firing, float64 [n], in random order; exponent 0 is the same for all."""
    if exponent == 0:
        return torch.full((n,), density, dtype=torch.float64)
    return power_law(n, density, exponent)[torch.randperm(n, generator=generator)]


def fitting_offsets(rest: Tensor, constant: Tensor, wanted: Tensor) -> Tensor:
    """The offsets o such that rest + o · constant > 0 for a share `wanted` of the tokens; float32 [n].

    rest: float32 [T, n], the gates without their offsets; constant: float32 [T], > 0, the sum of the
    constant channels; wanted: float64 [n]. Between samples the quantile is placed so that a fresh
    token is expected to fire as often as wanted (k of T samples above it: k / (T + 1)).
    """
    ordered = (rest / constant[:, None]).sort(dim=0, descending=True).values
    tokens = rest.shape[0]
    rank = (wanted * (tokens + 1)).clamp(1, tokens)
    above = rank.long().clamp(max=tokens - 1) - 1
    share = (rank - 1 - above).float()
    first, second = ordered.gather(0, above[None])[0], ordered.gather(0, above[None] + 1)[0]
    return -torch.lerp(first, second, share)


def share_holding(counts: Tensor, firings: float = HOT_FIRINGS) -> float:
    """The least share of neurons that holds `firings` of all firings; counts [n]. 0 where nothing fired."""
    total = counts.double().sort(descending=True).values.cumsum(0)
    if not float(total[-1]):
        return 0.0
    return int((total < firings * total[-1]).sum() + 1) / counts.shape[0]
