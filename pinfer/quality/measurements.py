"""What a calibration measures: curves of layers, losses of the whole model, what unseen kinds of text cost.

Each measurement has a name and is plain data, so that an interrupted calibration goes on from those it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import NamedTuple, TypeVar, cast

import torch

from pinfer.ffn import DenseFFN
from pinfer.models import Transformer
from pinfer.predictors import Predictor
from pinfer.quality.allocate import Curve
from pinfer.quality.ledger import Ledger
from pinfer.quality.target import Transfer
from pinfer.quality.trials import Loss, Passage, Trials
from pinfer.quant import QuantTensor

V = TypeVar("V")
# Logits are made of some positions only where a vocabulary is large: of so many that they cost such a
# share of what the FFNs do. The search runs half of the layers on the average.
LOGIT_SHARE = {"search": 0.5, "validation": 1.0}


class Refit(NamedTuple):
    """fit: makes predictors, one a layer, of sequences; sequences: those that the predictors in use were fitted on."""

    fit: Callable[[Sequence[torch.Tensor]], Sequence[Predictor]]
    sequences: Sequence[torch.Tensor]


class Measurements:
    """Trials over two passages, `search` and `validation`, that a ledger remembers."""

    def __init__(
        self, trials: Trials, search: Sequence[torch.Tensor], validation: Sequence[torch.Tensor], ledger: Ledger
    ) -> None:
        self._trials, self._ledger = trials, ledger
        self._passages = {
            name: Passage(trials.model, sequences, _stride(trials.model, LOGIT_SHARE[name]))
            for name, sequences in (("search", search), ("validation", validation))
        }

    @property
    def n_layers(self) -> int:
        return self._trials.model.config.n_layers

    def plan(self, searches: int, validations: int, tries: int) -> None:
        """What is ahead: whole runs over each passage, and so many tries of every layer."""
        layers = sum(self._work("search", tries, layer) for layer in range(self.n_layers))
        whole = searches * self._work("search", 1) + validations * self._work("validation", 1)
        self._ledger.ahead = layers + whole

    def tokens(self) -> dict[str, int]:
        """Tokens that each passage has, and positions that are scored of them."""
        counts = {name: passage.tokens for name, passage in self._passages.items()}
        return counts | {f"{name}_scored": passage.scored for name, passage in self._passages.items()}

    def curves(self, tries: Sequence[float]) -> list[Curve]:
        """Of each layer, the KL over the search sequences at the densities tried. Only `transfer` and validation may follow."""
        walk, curves = self._passages["search"].walk, []
        for layer in range(self.n_layers):

            def costs(missing: list[int], layer: int = layer) -> list[float]:
                while walk.layer < layer:
                    walk.advance()
                return self._trials.layer(self._passages["search"], [tries[number] for number in missing])

            names = [f"layer {layer} at {density!r}" for density in tries]
            found = self._ledger.find(names, self._work("search", len(tries), layer), costs)
            curves.append(Curve(tuple(tries), tuple(found)))
        return curves

    def whole(self, passage: str, allocation: str, densities: Sequence[float]) -> Loss:
        """The whole model's loss over a passage. `allocation` names how these densities follow from their mean."""
        name = f"{passage}, {allocation}, mean {fmean(densities):.9g}"
        work = self._work(passage, 1)
        found = self._ledger.find(
            [name], work, lambda _missing: [asdict(self._trials.whole(self._passages[passage], densities))]
        )
        return Loss(**found[0])

    def transfer(self, refit: Refit, density: float) -> Transfer:
        """Of predictors fitted on either half of the sequences, all set to one density."""
        passage = self._passages["validation"]

        def of_half(number: int) -> list[float]:
            trials = self._trials.of(refit.fit(_half(refit.sequences, number)))
            scores = trials.scores(passage, [density] * self.n_layers)
            parts = (_half(scores, half) for half in (number, 1 - number))
            return [float(torch.cat([one.kl for one in part]).double().mean()) for part in parts]

        names = [f"fitted on half {number} at {density!r}" for number in (0, 1)]
        found = self._ledger.find(names, 2 * self._work("validation", 1), lambda missing: list(map(of_half, missing)))
        return Transfer(*map(fmean, zip(*found, strict=True)))

    def _work(self, name: str, tries: int, layer: int = 0) -> float:
        """Multiplications of tries that begin at a layer: the FFNs' and the head's, the dense logits with them."""
        passage, model = self._passages[name], self._trials.model
        blocks = sum(_ffn_weights(model)[layer:])
        return tries * passage.tokens * blocks + (tries + 1) * passage.scored * _weights(model.head)


def _half(sequences: Sequence[V], number: int) -> Sequence[V]:
    middle = len(sequences) // 2
    return sequences[:middle] if number == 0 else sequences[middle:]


def _stride(model: Transformer, share: float) -> int:
    return max(1, round(_weights(model.head) / (share * sum(_ffn_weights(model)))))


def _ffn_weights(model: Transformer) -> list[int]:
    ffns = (cast(DenseFFN, ffn) for ffn in model.ffns())
    return [_weights(ffn.gate) * (2 if ffn.up is None else 3) for ffn in ffns]


def _weights(matrix: QuantTensor) -> int:
    return matrix.rows * matrix.columns
