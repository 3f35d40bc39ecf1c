"""Chooses a density for each layer: the least loss at a mean density, or the least density at a quality.

The method: each layer's KL to the dense model is measured at a few densities while the others are dense;
`allocate` shares out a mean density by these curves; and as the losses of layers compound, the whole model
is then run at what was chosen, on sequences that the curves were not made from, beside the uniform density
that is the baseline. All of it is computed with float32 activations: under int8 the dense and the sparse run
round differently, which is no loss, and is 0.008 nats of KL on Gemma-3-270M with every neuron computed.

A quality q is the share of the dense model's perplexity that is kept, exp(nll_dense - nll_sparse) >= q,
so that -log q nats a token may be added. What is added is bounded from above twice (see `bound`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pinfer.kernels.registry import use_int8
from pinfer.models import Transformer
from pinfer.predictors import Predictor
from pinfer.quality.allocate import LEAST_COST, Curve, allocate
from pinfer.quality.ledger import Ledger, Measured
from pinfer.quality.measurements import Measurements, Refit
from pinfer.quality.target import LEAST_DENSITY, Target, Transfer, bound
from pinfer.quality.trials import Loss, Trials
from pinfer.sparsify import LEAST_SEQUENCES, DownMaker, transposed_down

SENSITIVITY, UNIFORM = "sensitivity", "uniform"
# Each layer is tried at densities whose odds d / (1 - d) are these powers of ODDS, counted from the
# one nearest to the mean density in question, and whole: most tries serve other targets as well.
ODDS, AROUND = 2.5, (-2, -1, 0, 1, 2)
PROBES = 5  # uniform densities tried for the one to search around
TRIALS = 6  # whole runs for a quality, of each allocation
NEAR, AIM = 0.95, 0.975  # a bound within this share of what may be lost ends the search; what it heads for
HALVINGS = 30  # of a range of densities, where nothing is run


@dataclass(frozen=True)
class Calibration:
    """A density for each layer's predictor; the curve of each layer; figures, plain data for JSON (see `calibrate`).

    Densities are those that predictors are set to; what they name of a text is near, and in each `Loss`.
    """

    densities: list[float]
    curves: list[Curve]
    figures: dict[str, Any]


def calibrate(
    model: Transformer,
    predictors: Sequence[Predictor],
    search: Sequence[torch.Tensor],
    validation: Sequence[torch.Tensor],
    target: Target,
    downs: DownMaker = transposed_down,
    refit: Refit | None = None,
    *,
    known: Mapping[str, Any] | None = None,
    measured: Measured = lambda _name, _found, _left_s: None,
) -> Calibration:
    """Densities for the predictors (one a layer, to be set by density) of a dense model, which stays as it is.

    search, validation: sequences int64 [T >= 3], at least four each, of text that the predictors were
    not fitted on; the second measure what the first found. To be run under inference mode and the
    backend that the model will run on.

    refit: for a quality, how the predictors were fitted and on what: they are fitted anew on either half
    of that, for what a kind of text costs that they have not seen (`Transfer`). Sequences are then to be in the
    text's order, so that halves differ. Without it a new text is taken to be of the calibration's kinds.

    measured(name, found, left_s) is told of every measurement, as plain data, and of the seconds that
    are left at most; `known` has those of an earlier call, by name, whatever its target but with the same
    other arguments: they are not made again, and the result is the same.

    Figures: allocation, sensitivity or uniform, whichever has the lower KL at the density asked for, or
    keeps the quality at the lower one; density, the mean; sensitivity and uniform, the `Loss` of both at
    that density; tries; tokens; for a quality also `allowed` nats, `bound`, `transfer`, `full`, the loss
    with every neuron computed, and whether the sparsest allocation tried was enough.

    ValueError for a model or predictors that cannot take it, and for a quality that even every neuron does not keep.
    """
    for name, sequences in (("search", search), ("validation", validation)):
        if len(sequences) < LEAST_SEQUENCES:
            raise ValueError(
                f"calibration needs at least {LEAST_SEQUENCES} sequences to {name} on, not {len(sequences)}"
            )
    with use_int8(False):
        trials, ledger = Trials(model, predictors, downs), Ledger(known or {}, measured)
        return _Search(Measurements(trials, search, validation, ledger), target, refit).run()


class _Search:
    """One calibration. `level` is a mean density throughout."""

    def __init__(self, measurements: Measurements, target: Target, refit: Refit | None) -> None:
        self._measurements, self._target, self._refit = measurements, target, refit
        self._n_layers = measurements.n_layers
        self._transfer = Transfer(1.0, 1.0)
        self._tries: list[float] = []
        self._curves: list[Curve] = []

    def run(self) -> Calibration:
        self._measurements.plan(*self._whole_runs(), tries=len(AROUND) + 1)
        if self._target.density is not None:
            self._measure_layers(self._target.density)
            return self._result(self._better(self._target.density), self._target.density, {})
        full = self._full()
        around = self._around()
        if self._refit is not None:
            self._transfer = self._measurements.transfer(self._refit, around)
        self._measure_layers(around)
        allocation, level = self._least_level()
        quality = {
            "allowed": self._target.allowed,
            "bound": self._bound(allocation, level),
            "transfer": asdict(self._transfer),
            "full": asdict(full),
            "sparsest_suffices": level <= self._tries[0],
        }
        return self._result(allocation, level, quality)

    def _whole_runs(self) -> tuple[int, int]:
        """How many times at most the whole model is run over the search and the validation sequences."""
        if self._target.density is not None:
            return 0, 2
        return PROBES, TRIALS + 2 + (0 if self._refit is None else 2)

    def _result(self, allocation: str, level: float, others: dict[str, Any]) -> Calibration:
        figures = {
            "target": {name: value for name, value in asdict(self._target).items() if value is not None},
            "allocation": allocation,
            "density": level,
            **{name: asdict(self._loss(name, level)) for name in (SENSITIVITY, UNIFORM)},
            "tries": self._tries,
            "tokens": self._measurements.tokens(),
        }
        return Calibration(self._densities(allocation, level), self._curves, figures | others)

    def _full(self) -> Loss:
        """With every neuron computed; ValueError if that is not good enough."""
        full, target = self._loss(UNIFORM, 1.0), self._target
        if bound(full) <= target.allowed:
            return full
        raise ValueError(
            f"quality {target.quality} allows {target.allowed:.2g} nats a token, and with every neuron computed "
            f"up to {bound(full):.2g} may be lost (KL {full.kl:.2g} ± {full.kl_error:.1g}, added "
            f"{full.added:.2g} ± {full.added_error:.1g}): ask for less, or validate on more text"
        )

    def _around(self) -> float:
        """The uniform density at which the search sequences lose what the target allows, by bisection of its odds."""
        low, high = _log_odds(LEAST_DENSITY), -_log_odds(LEAST_DENSITY)
        for _ in range(PROBES):
            middle = (low + high) / 2
            loss = self._measurements.whole("search", UNIFORM, [_density(middle)] * self._n_layers)
            low, high = (low, middle) if loss.kl <= self._target.allowed else (middle, high)
        return _density((low + high) / 2)

    def _measure_layers(self, around: float) -> None:
        self._tries = _tries(around)
        self._curves = self._measurements.curves(self._tries)

    def _least_level(self) -> tuple[str, float]:
        """The allocation that keeps the quality at the lower mean density, and that."""
        level = self._keeping(SENSITIVITY)
        if self._better(level) == UNIFORM and (uniform := self._keeping(UNIFORM)) <= level:
            return UNIFORM, uniform
        return SENSITIVITY, level

    def _keeping(self, allocation: str) -> float:
        """The least level found whose bound is allowed; level 1 is known to be.

        What layers lose together is what they lose alone times a factor that changes little from level
        to level: each trial tells it anew.
        """
        allowed, accepted, rejected = self._target.allowed, 1.0, 0.0
        factor, lowest = self._transfer.factor, self._tries[0]
        for _ in range(TRIALS):
            level = self._level_of(allocation, AIM * allowed / factor)
            if not rejected < level < accepted:
                level = (max(rejected, lowest) + accepted) / 2
            reached = self._bound(allocation, level)
            if reached > allowed:
                rejected = level
            else:
                accepted = level
                if level <= lowest or reached >= NEAR * allowed:
                    break
            factor = max(reached, LEAST_COST) / self._expected(allocation, level)
        return accepted

    def _level_of(self, allocation: str, cost: float) -> float:
        """The level at which the layers' own costs add up to `cost`, by bisection."""
        low, high = self._tries[0], 1.0
        if self._expected(allocation, low) <= cost:
            return low
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if self._expected(allocation, middle) <= cost else (middle, high)
        return high

    def _expected(self, allocation: str, level: float) -> float:
        densities = self._densities(allocation, level)
        return sum(curve.cost(density) for curve, density in zip(self._curves, densities, strict=True))

    def _densities(self, allocation: str, level: float) -> list[float]:
        return allocate(self._curves, level) if allocation == SENSITIVITY else [level] * self._n_layers

    def _better(self, level: float) -> str:
        """Of the two allocations at one level, that with the lower KL."""
        return min((SENSITIVITY, UNIFORM), key=lambda allocation: self._loss(allocation, level).kl)

    def _loss(self, allocation: str, level: float) -> Loss:
        # The curves follow from the tries, and they from the highest below 1.
        name = (
            UNIFORM if allocation == UNIFORM else f"{SENSITIVITY} by tries up to {max(self._tries[:-1], default=1.0)!r}"
        )
        return self._measurements.whole("validation", name, self._densities(allocation, level))

    def _bound(self, allocation: str, level: float) -> float:
        return bound(self._loss(allocation, level), self._transfer.factor)


def _tries(density: float) -> list[float]:
    """The densities that each layer is tried at for one in question."""
    if density == 1:
        return [1.0]
    power = round(_log_odds(density) / math.log(ODDS))
    around = (_density((power + step) * math.log(ODDS)) for step in AROUND)
    return [*sorted({max(LEAST_DENSITY, one) for one in around}), 1.0]


def _log_odds(density: float) -> float:
    return math.log(density / (1 - density))


def _density(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds))
