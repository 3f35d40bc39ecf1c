"""What densities are calibrated to, and the bound by which a quality is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pinfer.predictors.cuts import DENSITIES
from pinfer.quality.allocate import LEAST_COST
from pinfer.quality.trials import Loss

LEAST_DENSITY = DENSITIES[0]
CONFIDENCE = 1.64  # standard deviations that 95 % of a normal distribution lie below


@dataclass(frozen=True)
class Target:
    """What is asked for: a mean density over layers, or a share of the dense model's perplexity to keep; one of them."""

    density: float | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        if (self.density is None) == (self.quality is None):
            raise ValueError(
                f"calibration is for a density or for a quality: one of them, not {self.density} and {self.quality}"
            )
        if self.density is not None and not LEAST_DENSITY <= self.density <= 1:
            raise ValueError(f"density must lie in [{LEAST_DENSITY:g}, 1], not {self.density:g}")
        if self.quality is not None and not 0 < self.quality < 1:
            raise ValueError(f"quality must lie in (0, 1), such as 0.99, not {self.quality:g}")

    @property
    def allowed(self) -> float:
        """Nats a token that may be added; infinite for a density."""
        return math.inf if self.quality is None else -math.log(self.quality)


@dataclass(frozen=True)
class Transfer:
    """How much more is lost on kinds of text that predictors have not seen.

    own, other: the KL, nats a token, of predictors fitted on one half of a text, over that half and over
    the other one, both halves taken together.
    """

    own: float
    other: float

    @property
    def factor(self) -> float:
        return max(1.0, self.other / max(self.own, LEAST_COST))


def bound(loss: Loss, factor: float = 1.0) -> float:
    """Nats a token that a new text is hardly to exceed, `factor` being that of `Transfer`.

    The greater of two: what was added, with its confidence bound; and the KL, for which added nats
    stand where the dense model's own probabilities are right, with a bound for a single new sequence.
    The first alone is noisy, and knows nothing of how sequences differ. Sequences of the calibration's
    text know nothing of how texts differ: both are taken times the factor.
    """
    spread = math.hypot(loss.kl_error, loss.kl_spread)
    return max(factor * loss.added + CONFIDENCE * loss.added_error, factor * (loss.kl + CONFIDENCE * spread))
