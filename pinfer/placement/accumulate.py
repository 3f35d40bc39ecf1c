"""Adds up a layer's activation statistics, a chunk of tokens at a time, so that memory does not grow with the text."""

from __future__ import annotations

import numpy as np
import torch

from pinfer.kernels.activation import CLAMPS_UP, ZERO_BELOW_ZERO, activate
from pinfer.placement.statistics import QUANTILES, LayerStatistics

FIRING_MASS = 0.8  # of a token's contribution, held by the neurons that count as firing without a ReLU
# Gates of so many tokens are held for the medians (117 MB for 14,336 neurons). The median of 2,048 of
# many tokens is a quantile between 0.48 and 0.52 of them all, 19 times in 20.
CENTER_TOKENS = 2048
# Magnitudes are counted by the upper bits of their floats, which order as the numbers do: 8 of exponent
# and 10 of mantissa make bins whose middles are within 0.05 % of all that is in them.
DROPPED_BITS = 13
BINS = 1 << (31 - DROPPED_BITS)


class Magnitudes:
    """Counts of |v| by size, from which quantiles are read."""

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, values: torch.Tensor) -> None:
        """Count the values float32 [...] of any sign."""
        bits = values.abs().contiguous().flatten().view(torch.int32) >> DROPPED_BITS
        self._counts += torch.bincount(bits, minlength=BINS)

    def quantiles(self) -> torch.Tensor:
        """float32 [QUANTILES]: the magnitudes at 0, 1, …, 100 %, each the middle of its bin; an exact zero stays zero."""
        return self._at(torch.linspace(0, 1, QUANTILES, dtype=torch.float64))

    def quantile(self, share: float) -> float:
        """The magnitude that a share of them, 0 to 1, does not exceed, as `quantiles`."""
        return float(self._at(torch.tensor([share], dtype=torch.float64)))

    def _at(self, shares: torch.Tensor) -> torch.Tensor:
        cumulated = self._counts.cumsum(0)
        bins = torch.searchsorted(cumulated, (shares * (int(cumulated[-1]) - 1)).round().long(), right=True)
        middles = (bins << DROPPED_BITS) + (1 << (DROPPED_BITS - 1))
        return torch.where(bins == 0, 0, middles).int().view(torch.float32)


class Accumulator:
    """One layer's statistics over `tokens` tokens, which arrive in order.

    down_norms: float32 [N], ‖d_i‖. activation: its name; cutoff: FATReLU's. tokens: how many will come, for the halves and
    for the tokens whose medians are taken.
    """

    def __init__(self, down_norms: torch.Tensor, activation: str, tokens: int, cutoff: float = 0.0) -> None:
        self._cutoff = cutoff
        n = down_norms.numel()
        self._norms, self._activation, self._tokens, self._seen = down_norms, activation, tokens, 0
        self._fired = torch.zeros(n, dtype=torch.int64)
        self._mass = torch.zeros(2, n, dtype=torch.float64)  # in either half
        self._up_sums = torch.zeros(2, n, dtype=torch.float64)
        self._negative = torch.zeros(n, dtype=torch.int64)
        self._sampled = np.unique(np.linspace(0, tokens - 1, min(tokens, CENTER_TOKENS)).round().astype(np.int64))
        self._gated = False
        self._sample = torch.empty(len(self._sampled), n)
        self._inputs, self._hidden = Magnitudes(), Magnitudes()

    def add(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """Count T tokens: x float32 [T, D], gate and up products and h float32 [T, N] (up None: not gated)."""
        acted = activate(self._activation, gate, self._cutoff)
        contribution = hidden.abs().mul_(self._norms)
        self._fired += _column_sums(self._firing(acted, contribution), np.int64)
        first = max(0, self._tokens // 2 - self._seen)
        self._mass[0] += _column_sums(contribution[:first])
        self._mass[1] += _column_sums(contribution[first:])
        self._add_up(gate, up)
        start, end = np.searchsorted(self._sampled, (self._seen, self._seen + len(x)))
        self._sample[start:end] = acted[torch.from_numpy(self._sampled[start:end] - self._seen)]
        self._inputs.add(x)
        self._hidden.add(hidden)
        self._seen += len(x)

    def _firing(self, acted: torch.Tensor, contribution: torch.Tensor) -> torch.Tensor:
        """bool [T, N]"""
        if self._activation in ZERO_BELOW_ZERO:
            return acted != 0
        return holding(contribution, FIRING_MASS)

    def _add_up(self, gate: torch.Tensor, up: torch.Tensor | None) -> None:
        negative = gate < 0
        self._negative += _column_sums(negative, np.int64)
        if up is None:
            return
        size = up.clamp(min=0) if self._activation in CLAMPS_UP else up.abs()
        self._up_sums[0] += _column_sums(size * negative)
        self._up_sums[1] += _column_sums(size * ~negative)
        self._gated = True

    def finish(self) -> LayerStatistics:
        """The statistics; ValueError unless all tokens have come, or if what came is not finite."""
        if self._seen != self._tokens:
            raise ValueError(f"{self._seen} tokens have come, not the {self._tokens} that were announced")
        mass = self._mass.sum(0)
        if not torch.isfinite(mass).all():
            raise ValueError("the activations are not finite")
        return LayerStatistics(
            tokens=torch.tensor([self._seen]),
            fired=self._fired,
            mass=mass,
            first_half_mass=self._mass[0].clone(),
            up_mean=self._up_mean(),
            center=self._sample.median(0).values,
            input_quantiles=self._inputs.quantiles(),
            hidden_quantiles=self._hidden.quantiles(),
        )

    def _up_mean(self) -> torch.Tensor:
        if not self._gated:
            return torch.ones(2, self._norms.numel())
        counts = torch.stack([self._negative, self._seen - self._negative])
        overall = self._up_sums.sum(0, keepdim=True) / self._seen
        return torch.where(counts > 0, self._up_sums / counts.clamp(min=1), overall).float()


def _column_sums(values: torch.Tensor, dtype: type = np.float64) -> torch.Tensor:
    """Sums [N] of values [T, N]; numpy adds row to row, ten times as fast as torch's reduction to a wider type."""
    return torch.from_numpy(np.add.reduce(values.numpy(), axis=0, dtype=dtype))


def holding(contribution: torch.Tensor, share: float) -> torch.Tensor:
    """bool [T, N]: the fewest neurons that hold `share` of each token's contribution float32 [T, N] >= 0.

    Neurons that contribute as much as the last of them belong to them too; those that contribute
    nothing never do.
    """
    values = contribution.numpy()
    ascending = np.sort(values, axis=1)  # values alone: numpy's vector sort is several times torch's speed
    cumulated = np.cumsum(ascending[:, ::-1], axis=1, dtype=np.float64)
    last = (cumulated < share * cumulated[:, -1:]).sum(axis=1)  # [T]
    least = np.take_along_axis(ascending, (values.shape[1] - 1 - last)[:, None], axis=1)
    return torch.from_numpy((values >= least) & (values > 0))
