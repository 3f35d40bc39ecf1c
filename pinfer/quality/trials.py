"""Trials of densities on one model: its FFNs are exchanged for sparse ones while a trial lasts.

The distance of a trial from the dense run is KL(dense ‖ sparse) of the next token, in nats. Of one layer's
trials the layers before it are dense, so that only the others are run. Dense and sparse are to be computed
under the same backend and precision, under inference mode.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pinfer.ffn import DenseFFN, SparseFFN
from pinfer.models import LayerWalk, Transformer
from pinfer.predictors import Predictor
from pinfer.quality.compare import LOGIT_BYTES
from pinfer.quality.losses import Estimate, over_windows
from pinfer.sparsify import DownMaker, fitted_predictors, sparsify, transposed_down

# Softmaxes are made of 8 positions of Gemma's 262,144 tokens at a time: buffers of 64 MB, which the system
# maps anew at each use, take four times as long. Logits are made of 64, for which a matrix is unpacked once.
SOFTMAX_BYTES = 8 << 20


class Scores(NamedTuple):
    """Position by position, float32 [S]: KL(dense ‖ sparse), and the loss that sparse adds, both in nats."""

    kl: torch.Tensor
    added: torch.Tensor


@dataclass(frozen=True)
class Loss:
    """What a trial costs over all sequences, in nats a token, with standard errors over sequences.

    kl_spread: the standard deviation of a sequence's mean KL; density: the share of neurons that were computed.
    """

    kl: float
    kl_error: float
    kl_spread: float
    added: float
    added_error: float
    density: float

    @classmethod
    def of(cls, scores: Sequence[Scores], density: float) -> Loss:
        kl, added = (over_windows([getattr(one, name) for one in scores]) for name in Scores._fields)
        means = torch.stack([one.kl.double().mean() for one in scores])
        return cls(*_pair(kl), float(means.std()), *_pair(added), density)


def _pair(estimate: Estimate) -> tuple[float, float]:
    return estimate.value, estimate.standard_error


class Passage:
    """Sequences and what the dense model makes of them.

    Of each sequence, int64 [T >= 3], every `stride`-th position is scored; the first, which some
    predictors have computed whole, is not, nor is the last, of which no next token is known.
    """

    def __init__(self, model: Transformer, sequences: Sequence[torch.Tensor], stride: int = 1) -> None:
        if any(len(tokens) < 3 for tokens in sequences):
            raise ValueError("calibration needs sequences of at least 3 tokens")
        self.model, self.stride = model, stride
        self.targets = [tokens[2::stride] for tokens in sequences]  # those of positions 1, 1 + stride, …
        self.tokens = sum(map(len, sequences))
        self.walk = LayerWalk(model, sequences)
        self.dense = self.states()

    @property
    def scored(self) -> int:
        return sum(map(len, self.targets))

    def states(self) -> list[torch.Tensor]:
        """What the head reads at the scored positions if the sequences go on from where the walk stands, float32 [S, D]."""
        ends = (self.walk.rest(number) for number in range(len(self.targets)))
        return [states[1 : -1 : self.stride] for states in ends]

    def scores(self, trials: Sequence[Sequence[torch.Tensor]]) -> list[list[Scores]]:
        """Of each trial, given by its `states()`, the scores of every sequence. Dense logits are made once for all."""
        found: list[list[Scores]] = [[] for _ in trials]
        for number, (dense, targets) in enumerate(zip(self.dense, self.targets, strict=True)):
            of_sequence = self._distances(dense, [trial[number] for trial in trials], targets)
            for scores, of_trial in zip(of_sequence, found, strict=True):
                of_trial.append(scores)
        return found

    def _distances(
        self, dense: torch.Tensor, trials: Sequence[torch.Tensor], targets: torch.Tensor
    ) -> Iterator[Scores]:
        row_bytes = 4 * self.model.head.rows
        step, few = (max(1, size // row_bytes) for size in (LOGIT_BYTES, SOFTMAX_BYTES))
        pieces: list[list[Scores]] = [[] for _ in trials]
        for at in range(0, len(targets), step):
            part, here = slice(at, at + step), targets[at : at + step, None].split(few)
            log_p = [logits.log_softmax(-1) for logits in self.model.logits(dense[part]).split(few)]
            for trial, of_trial in zip(trials, pieces, strict=True):
                for p, logits, target in zip(log_p, self.model.logits(trial[part]).split(few), here, strict=True):
                    q = logits.log_softmax(-1)
                    added = (p.gather(1, target) - q.gather(1, target))[:, 0]
                    of_trial.append(Scores((p.exp() * (p - q)).sum(-1), added))
        for of_trial in pieces:
            yield Scores(*map(torch.cat, zip(*of_trial, strict=True)))


class Trials:
    """Runs of one dense model with some of its layers sparse; between two trials the model is dense."""

    def __init__(self, model: Transformer, predictors: Sequence[Predictor], downs: DownMaker = transposed_down) -> None:
        """predictors: one a layer, to be set by density. ValueError for a model that is not dense."""
        if len(predictors) != model.config.n_layers:
            raise ValueError(f"{len(predictors)} predictors for a model of {model.config.n_layers} layers")
        self.model, self.predictors, self._dense = model, predictors, model.ffns()
        if not all(isinstance(ffn, DenseFFN) for ffn in self._dense):
            raise ValueError("densities are calibrated on a dense model; this one is sparse already")
        try:
            sparse = sparsify(model, fitted_predictors(predictors), downs=downs).ffns()
        finally:
            self._restore()
        self._sparse = [ffn for ffn in sparse if isinstance(ffn, SparseFFN)]

    @contextmanager
    def at(self, densities: Mapping[int, float]) -> Iterator[None]:
        """In this block the layers named have those densities; the others are dense."""
        try:
            for layer, density in densities.items():
                ffn = self._sparse[layer]
                ffn.predictor = self.predictors[layer].at_density(density)
                ffn.activity.reset()
                self.model.blocks[layer].ffn = ffn
            yield
        finally:
            self._restore()

    def of(self, predictors: Sequence[Predictor]) -> Trials:
        """The same with other predictors."""
        other = copy.copy(self)
        other.predictors = predictors
        return other

    def whole(self, passage: Passage, densities: Sequence[float]) -> Loss:
        """The whole model at these densities, over a passage whose walk stands at the first layer."""
        scores = self.scores(passage, densities)
        counts = [ffn.activity for ffn in self._sparse]
        return Loss.of(scores, sum(one.density for one in counts) / len(counts))

    def scores(self, passage: Passage, densities: Sequence[float]) -> list[Scores]:
        """The scores of each sequence, as `whole`."""
        with self.at(dict(enumerate(densities))):
            states = passage.states()
        return passage.scores([states])[0]

    def layer(self, passage: Passage, densities: Sequence[float]) -> list[float]:
        """Mean KL at each of the densities of that layer alone at which the passage's walk stands."""
        trials = []
        for density in densities:
            with self.at({passage.walk.layer: density}):
                trials.append(passage.states())
        return [float(torch.cat([one.kl for one in scores]).double().mean()) for scores in passage.scores(trials)]

    def _restore(self) -> None:
        for block, ffn in zip(self.model.blocks, self._dense, strict=True):
            block.ffn = ffn
