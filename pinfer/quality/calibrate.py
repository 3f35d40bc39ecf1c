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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch

from pinfer.ffn import DenseFFN
from pinfer.kernels.registry import use_int8
from pinfer.models import Transformer
from pinfer.predictors import Predictor
from pinfer.quality.allocate import Curve, allocate
from pinfer.quality.ledger import Ledger, Measured
from pinfer.quality.target import LEAST_DENSITY, Target, Transfer, bound
from pinfer.quality.trials import Loss, Passage, Trials
from pinfer.sparsify import LEAST_SEQUENCES, DownMaker, transposed_down

Family = Literal["sensitivity", "uniform"]
V = TypeVar("V")

# Each layer is tried at densities whose odds d / (1 - d) are these powers of ODDS, counted from the
# one nearest to the mean density in question, and whole: most tries serve other targets as well.
ODDS, AROUND = 2.5, (-2, -1, 0, 1, 2)
PROBES = 5  # uniform densities tried for the one to search around
TRIALS = 6  # whole runs for a quality, of each allocation
NEAR, AIM = 0.95, 0.975  # a bound within this share of what may be lost ends the search; what it heads for


@dataclass(frozen=True)
class Calibration:
    """A density for each layer's predictor; the curve of each layer; figures, plain data for JSON (see `calibrate`)."""

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

    Figures: allocation (sensitivity or uniform, whichever has the lower KL at the mean density
    reached); density, that mean; sensitivity and uniform, the `Loss` of both at that density; for a
    quality also `allowed` nats, `bound`, `transfer`, `full`, the loss with every neuron computed, and whether
    the sparsest allocation tried was enough; tries; tokens.

    ValueError for a model or predictors that cannot take it, and for a quality that even every neuron does not keep.
    """
    for name, sequences in (("search", search), ("validation", validation)):
        if len(sequences) < LEAST_SEQUENCES:
            raise ValueError(
                f"calibration needs at least {LEAST_SEQUENCES} sequences to {name} on, not {len(sequences)}"
            )
    trials = Trials(model, predictors, downs)
    with use_int8(False):
        passages = Passage(model, search, _stride(model, 0.5)), Passage(model, validation, _stride(model, 1.0))
        return _Search(trials, *passages, target, refit, Ledger(known or {}, measured)).run()


def _stride(model: Transformer, share: float) -> int:
    """Of how many positions one is scored, so that logits cost about such a share of what the FFNs do."""
    return max(1, round(_weights(model.head) / (share * sum(_ffn_weights(model)))))


def _ffn_weights(model: Transformer) -> list[int]:
    ffns = (cast(DenseFFN, ffn) for ffn in model.ffns())
    return [_weights(ffn.gate) * (2 if ffn.up is None else 3) for ffn in ffns]


def _weights(matrix: Any) -> int:
    return int(matrix.rows * matrix.columns)


class Refit(NamedTuple):
    """fit: makes predictors, one a layer, of sequences; sequences: those that the predictors in use were fitted on."""

    fit: Callable[[Sequence[torch.Tensor]], Sequence[Predictor]]
    sequences: Sequence[torch.Tensor]


class _Search:
    """One calibration. `level` is a mean density throughout."""

    def __init__(
        self,
        trials: Trials,
        search: Passage,
        validation: Passage,
        target: Target,
        refit: Refit | None,
        ledger: Ledger,
    ) -> None:
        self._trials, self._search, self._validation = trials, search, validation
        self._target, self._refit, self._ledger = target, refit, ledger
        self._transfer = Transfer(1.0, 1.0)
        self._curves: list[Curve] = []
        self._n_layers = trials.model.config.n_layers

    def run(self) -> Calibration:
        target = self._target
        self._ledger.ahead = self._work_ahead()
        full = None if target.quality is None else self._full()
        around = self._around() if target.density is None else target.density
        tries = _tries(around)
        if full is not None and self._refit is not None:
            self._transfer = self._measure_transfer(self._refit, around)
        self._curves = self._measure_layers(tries)
        if full is None:
            level, suffices = cast(float, target.density), False
            family = self._better(level)
        else:
            family, level, suffices = self._least_level(full, tries[0])
        asked = {name: value for name, value in asdict(target).items() if value is not None}
        both = {name: asdict(self._loss(name, level)) for name in ("sensitivity", "uniform")}
        figures = {"allocation": family, "density": level, **both, "tries": tries, "tokens": self._tokens()}
        if full is not None:
            reached = self._bound(family, level)
            figures |= {
                "allowed": target.allowed,
                "bound": reached,
                "transfer": asdict(self._transfer),
                "full": asdict(full),
                "sparsest_suffices": suffices,
            }
        return Calibration(self._densities(family, level), self._curves, {"target": asked} | figures)

    def _tokens(self) -> dict[str, int]:
        of = {"search": self._search, "validation": self._validation}
        return {name: passage.tokens for name, passage in of.items()} | {
            f"{name}_scored": passage.scored for name, passage in of.items()
        }

    def _full(self) -> Loss:
        """With every neuron computed; ValueError if that is not good enough."""
        full, target = self._loss("uniform", 1.0), self._target
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
            density = 1 / (1 + math.exp(-middle))
            loss = self._measure("search", self._search, "uniform", density)
            low, high = (low, middle) if loss.kl <= self._target.allowed else (middle, high)
        return 1 / (1 + math.exp(-(low + high) / 2))

    def _measure_transfer(self, refit: Refit, density: float) -> Transfer:
        """At a uniform density, from predictors of either half of the sequences fitted on."""

        def of_half(number: int) -> list[float]:
            predictors = refit.fit(_half(refit.sequences, number))
            trials = self._trials.of(predictors)
            scores = trials.scores(self._validation, [density] * self._n_layers)
            return [
                float(torch.cat([one.kl for one in _half(scores, half)]).double().mean())
                for half in (number, 1 - number)
            ]

        names = [f"fitted on half {number} at {density!r}" for number in (0, 1)]
        work = 2 * self._passage_work(self._validation, 1, self._n_layers)
        found = self._ledger.find(names, work, lambda missing: [of_half(number) for number in missing])
        return Transfer(*(sum(one) / 2 for one in zip(*found, strict=True)))

    def _measure_layers(self, tries: list[float]) -> list[Curve]:
        curves, walk = [], self._search.walk
        for layer in range(self._n_layers):

            def costs(missing: list[int], layer: int = layer) -> list[float]:
                while walk.layer < layer:
                    walk.advance()
                return self._trials.layer(self._search, [tries[number] for number in missing])

            names = [f"layer {layer} at {density!r}" for density in tries]
            found = self._ledger.find(names, self._layer_work(layer), costs)
            curves.append(Curve(tuple(tries), tuple(found)))
        return curves

    def _least_level(self, full: Loss, lowest: float) -> tuple[Family, float, bool]:
        """The better family, the least mean density at which it keeps the quality, and whether that is the lowest."""
        level = self._bisect("sensitivity", full, lowest)
        family = self._better(level)
        if family == "uniform":
            level = min(level, self._bisect("uniform", full, lowest))
        return family, level, level <= lowest

    def _bisect(self, family: Family, full: Loss, lowest: float) -> float:
        """The least level found whose bound is allowed.

        What layers lose together is what they lose alone times a factor that changes little from level
        to level: each trial tells it anew. ValueError never: level 1 is known to be allowed.
        """
        allowed, accepted, rejected = self._target.allowed, 1.0, 0.0
        factor = 1.0
        for _ in range(TRIALS):
            level = self._level_of(family, AIM * allowed / factor, lowest)
            if not rejected < level < accepted:
                level = (max(rejected, lowest) + accepted) / 2
            reached = self._bound(family, level)
            if reached <= allowed:
                accepted = level
                if level <= lowest or reached >= NEAR * allowed:
                    break
            else:
                rejected = level
            factor = max(reached, 1e-9) / self._expected(family, level)
        return accepted

    def _level_of(self, family: Family, cost: float, lowest: float) -> float:
        """The level at which the layers' own costs add up to `cost`, by bisection."""
        low, high = lowest, 1.0
        if self._expected(family, low) <= cost:
            return low
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if self._expected(family, middle) <= cost else (middle, high)
        return high

    def _expected(self, family: Family, level: float) -> float:
        densities = self._densities(family, level)
        return sum(curve.cost(density) for curve, density in zip(self._curves, densities, strict=True))

    def _densities(self, family: Family, level: float) -> list[float]:
        return allocate(self._curves, level) if family == "sensitivity" else [level] * self._n_layers

    def _better(self, level: float) -> Family:
        """Of the two allocations at one level, that with the lower KL."""
        return "sensitivity" if self._loss("sensitivity", level).kl <= self._loss("uniform", level).kl else "uniform"

    def _loss(self, family: Family, level: float) -> Loss:
        return self._measure("validation", self._validation, family, level)

    def _bound(self, family: Family, level: float) -> float:
        return bound(self._loss(family, level), self._transfer.factor)

    def _measure(self, which: str, passage: Passage, family: Family, level: float) -> Loss:
        densities = self._densities(family, level)
        work = self._passage_work(passage, 1, self._n_layers)
        name = f"{which}, {family} {level!r}"
        found = self._ledger.find([name], work, lambda _: [asdict(self._trials.whole(passage, densities))])
        return Loss(**found[0])

    def _work_ahead(self) -> float:
        layers = sum(map(self._layer_work, range(self._n_layers)))
        search, validation = (
            self._passage_work(passage, 1, self._n_layers) for passage in (self._search, self._validation)
        )
        if self._target.quality is None:
            return layers + 2 * validation
        return layers + PROBES * search + (TRIALS + 2 + 2 * (self._refit is not None)) * validation

    def _layer_work(self, layer: int) -> float:
        return self._passage_work(self._search, len(AROUND) + 1, self._n_layers - layer)

    def _passage_work(self, passage: Passage, tries: int, layers: int) -> float:
        model = passage.model
        blocks = sum(_ffn_weights(model)[-layers:])
        return tries * passage.tokens * blocks + (tries + 1) * passage.scored * _weights(model.head)


def _half(sequences: Sequence[V], number: int) -> Sequence[V]:
    middle = len(sequences) // 2
    return sequences[:middle] if number == 0 else sequences[middle:]


def _tries(density: float) -> list[float]:
    """The densities that each layer is tried at for one in question."""
    if density == 1:
        return [1.0]
    power = round(_log_odds(density) / math.log(ODDS))
    odds = (ODDS ** (power + step) for step in AROUND)
    return [*sorted({max(LEAST_DENSITY, one / (1 + one)) for one in odds}), 1.0]


def _log_odds(density: float) -> float:
    return math.log(density / (1 - density))
