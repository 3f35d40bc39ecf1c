"""What a predictor's scores catch, for every cut through them at once."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Floats by their upper 19 bits (sign, exponent, 10 of mantissa), in the order of the numbers: bins 0.1 % wide.
DROPPED_BITS = 13
BINS = 1 << (32 - DROPPED_BITS)


class Reach(NamedTuple):
    """What naming `named` neurons for each active one catches.

    recall: the share of active neurons named. weighted_recall: the share of a token's contribution that
    named neurons hold, the mean over tokens.
    """

    named: float
    recall: float
    weighted_recall: float


class Frontier:
    """Tokens' scores and contributions, added a chunk at a time; memory does not grow with them."""

    def __init__(self) -> None:
        self._named = torch.zeros(BINS, dtype=torch.int64)
        self._active = torch.zeros(BINS, dtype=torch.int64)
        self._share = torch.zeros(BINS, dtype=torch.float64)
        self._tokens, self._pairs = 0, 0

    def add(self, scores: torch.Tensor, contribution: torch.Tensor) -> None:
        """Scores and contribution >= 0, float32 [T, N]; a token of which no neuron is active counts for no recall."""
        bits = scores.contiguous().view(torch.int32)
        bins = (torch.where(bits < 0, ~bits, bits | -(2**31)) >> DROPPED_BITS) & (BINS - 1)
        active = contribution > 0
        of_active, total = bins[active], contribution.sum(1, keepdim=True)
        shares = (contribution / total)[active].double()
        self._named += torch.bincount(bins.flatten(), minlength=BINS)
        self._active += torch.bincount(of_active, minlength=BINS)
        self._share += torch.bincount(of_active, weights=shares, minlength=BINS)
        self._tokens += int((total > 0).sum())
        self._pairs += scores.numel()

    @property
    def density(self) -> float:
        """The share of (token, neuron) pairs that are active."""
        return int(self._active.sum()) / max(1, self._pairs)

    def at(self, *over_predictions: float) -> tuple[Reach, ...]:
        """For each, the lowest cut that names no more than so many neurons for each active one.

        Where none is active nothing needs to be named, and recall is 1.
        """
        active = int(self._active.sum())
        if not active:
            return (Reach(0.0, 1.0, 1.0),) * len(over_predictions)
        named, caught, share = (counts.flip(0).cumsum(0) for counts in (self._named, self._active, self._share))
        found = []
        for over_prediction in over_predictions:
            within = int(torch.searchsorted(named, int(over_prediction * active), right=True))  # bins from the top
            if not within:
                found.append(Reach(0.0, 0.0, 0.0))
                continue
            last = within - 1
            weighted = float(share[last]) / max(1, self._tokens)
            found.append(Reach(int(named[last]) / active, int(caught[last]) / active, weighted))
        return tuple(found)
