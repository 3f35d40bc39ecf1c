"""Trains low-rank predictors for a model from its own activations, layer by layer.

All sequences pass one layer, whose inputs and contributions go into files; its predictor is trained
from them; then they are removed and the next layer follows. Memory holds the residuals [T, D], twice
while a checkpoint is written, one layer's weights, a batch, and the factors of the layers that are done.
A checkpoint is kept after every collection, every measurement and every layer; the choice of ranks
and a collection begin anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pinfer.engine import watcher as watchers
from pinfer.engine.checkpoint import Checkpoint, Kept, numbered
from pinfer.engine.load import Engine
from pinfer.engine.mapped import fingerprint
from pinfer.engine.measure import dense_ffn, release_layer
from pinfer.engine.pairs import LayerPairs, PairPlan, collect_pairs
from pinfer.engine.sample import choose_ranks
from pinfer.engine.text import walk_settings
from pinfer.ffn import DenseFFN
from pinfer.kernels.activation import ZERO_BELOW_ZERO
from pinfer.models import LayerWalk
from pinfer.predictors.cuts import Cuts
from pinfer.predictors.low_rank import RANK_MULTIPLE
from pinfer.predictors.ranks import LayerNeed, rank_under_budget
from pinfer.predictors.training import Figures, LayerTraining, Trained, TrainingSettings
from pinfer.quant import BY_NAME, QuantTensor

FOLDER = "train-checkpoint"
PAIRS = "pairs"  # within it
DEFAULT_FACTORS = TrainingSettings()


@dataclass(frozen=True)
class TrainSettings:
    """How a model's predictors are trained.

    factors: of each layer. ffn_share: the share of the FFN's bytes that all predictors together may
    take; it chooses each layer's rank in place of the factors'. None: they all have that one. sparsity:
    the share of neurons that count as not active, those that contribute least; None for activations
    that are zero below zero. disk_bytes: for the files of one layer, beside the checkpoint.
    """

    factors: TrainingSettings = DEFAULT_FACTORS
    ffn_share: float | None = 0.05
    sparsity: float | None = None
    disk_bytes: int = 8 * 10**9

    def check(self, engine: Engine) -> None:
        """ValueError where the model cannot be trained for under these settings."""
        activation = engine.config.activation
        chosen = self.factors if self.ffn_share is None else dataclasses.replace(self.factors, rank=RANK_MULTIPLE)
        for layer in range(engine.config.n_layers):
            chosen.check(*dense_ffn(engine, layer).gate.shape)
        if self.ffn_share is not None:
            if not 0 < self.ffn_share <= 1:
                raise ValueError(f"ffn_share must be above 0 and at most 1, the whole FFN, not {self.ffn_share:g}")
            self.ranks_of_equals(engine)
        if self.sparsity is None and activation not in ZERO_BELOW_ZERO:
            raise ValueError(f"training needs a sparsity, such as 0.5, for a model whose activation is {activation}")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise ValueError(f"sparsity must be between 0 and 1, not {self.sparsity:g}")

    def budget_bytes(self, engine: Engine) -> int:
        """Bytes that all predictors together may take under `ffn_share`."""
        assert self.ffn_share is not None
        return int(self.ffn_share * sum(ffn_bytes(dense_ffn(engine, layer)) for layer in range(engine.config.n_layers)))

    def ranks_of_equals(self, engine: Engine) -> tuple[int, ...]:
        """Ranks that fill the budget if no layer needs more than another; ValueError where it is too small for any."""
        nothing = torch.zeros(1, dtype=torch.float64)
        shapes = [dense_ffn(engine, layer).gate.shape for layer in range(engine.config.n_layers)]
        needs = [LayerNeed(*shape, density=0.0, spectrum=nothing) for shape in shapes]
        return rank_under_budget(needs, self.budget_bytes(engine), BY_NAME[self.factors.weight_type])


@dataclass(frozen=True)
class LayerResult:
    """One layer's trained factors. ffn_bytes: of the FFN they predict for."""

    layer: int
    trained: Trained
    ffn_bytes: int

    @property
    def rank(self) -> int:
        return self.trained.first.rows

    @property
    def predictor_bytes(self) -> int:
        return self.trained.first.nbytes + self.trained.second.nbytes


class Watcher(watchers.Watcher):
    """What training tells while it runs; the base class keeps silent."""

    def ranks(self, ranks: Sequence[int]) -> None:
        """The rank of every layer is chosen."""

    def measured(self, layer: int, step: int, weighted_recall: float) -> None:
        """A layer's factors were judged after so many steps."""

    def layer(self, number: int, found: LayerResult) -> None:
        """A layer is done and kept."""


def train(
    engine: Engine,
    directory: Path,
    sequences: Sequence[torch.Tensor],
    settings: TrainSettings,
    watcher: Watcher | None = None,
) -> tuple[LayerResult, ...]:
    """Train a predictor for every layer of a dense model on sequences int64 [T], the last of which it is judged by.

    Goes on from the checkpoint that an interrupted run with the same model, sequences and settings left
    in `directory`, to the same bytes if the number of threads is the same; any other is removed with a note.
    The checkpoint stays until `remove_checkpoint`. Nobody else may write into the directory meanwhile.
    ValueError for a model that is not dense or whose activations are not finite, for settings that it
    cannot take, too few tokens, and a disk budget too small.
    """
    settings.check(engine)
    return _Run(engine, directory / FOLDER, sequences, settings, watcher or Watcher()).results()


def remove_checkpoint(directory: Path) -> None:
    """Remove what `train` keeps in a directory to go on from."""
    Checkpoint(directory / FOLDER, {}).remove()


def ffn_bytes(ffn: DenseFFN) -> int:
    """Bytes of the weights of an FFN."""
    return sum(weight.nbytes for weight in (ffn.gate, ffn.up, ffn.down) if weight is not None)


def plan_of(engine: Engine, sequences: Sequence[torch.Tensor], settings: TrainSettings) -> PairPlan:
    """Which tokens are kept; layers have one width. ValueError where they are too few."""
    n_neurons, width = dense_ffn(engine, 0).gate.shape
    return PairPlan.of([len(one) for one in sequences], width, n_neurons, settings.disk_bytes)


class _Run:
    """A run of `train`: what is done so far, kept in the checkpoint step by step."""

    def __init__(
        self, engine: Engine, folder: Path, sequences: Sequence[torch.Tensor], settings: TrainSettings, watcher: Watcher
    ) -> None:
        self._engine, self._folder, self._sequences = engine, folder, sequences
        self._settings, self._watcher = settings, watcher
        self._plan = plan_of(engine, sequences, settings)
        key = {
            "fingerprint": fingerprint(engine.file, timed=False),
            **walk_settings(sequences, engine.model, engine.int8),
            **asdict(settings),
        }
        self._checkpoint = Checkpoint(folder, key)
        self._done: list[LayerResult] = []
        self._data: dict[str, Any] = {"figures": [], "ranks": None, "pairs": None, "state": None}

    def results(self) -> tuple[LayerResult, ...]:
        kept = self._resume()
        n_layers = self._engine.config.n_layers
        if self._data["ranks"] is None:
            self._data["ranks"] = list(self._ranks())
        self._watcher.ranks(self._data["ranks"])
        self._watcher.begin(n_layers, len(self._sequences), len(self._done))
        with self._engine.computing():
            residuals = None if kept is None else kept.sequence(_residuals(self._collected - 1))
            walk = LayerWalk(self._engine.model, self._sequences, residuals)
        walk.layer = self._collected
        state = None if kept is None or self._data["state"] is None else kept.tensors[self._data["state"]]
        del kept, residuals
        while len(self._done) < n_layers:
            if self._data["pairs"] is None:
                self._collect(walk)
            self._train_layer(state)
            state = None
        return tuple(self._done)

    @property
    def _collected(self) -> int:
        """Layers that the sequences have passed."""
        return len(self._done) + (self._data["pairs"] is not None)

    def _resume(self) -> Kept | None:
        kept = self._checkpoint.resume(self._watcher)
        if kept is None:
            return None
        try:
            if kept.data["pairs"] is not None:
                LayerPairs(self._folder / PAIRS, kept.data["pairs"], check=True)
        except (OSError, ValueError) as problem:
            self._watcher.note(f"starting anew: {self._folder / PAIRS}: {problem}")
            self._checkpoint.remove()
            return None
        self._data = dict(kept.data)
        if self._data["pairs"] is None:
            self._drop_pairs()  # of a layer whose result was kept, by a run that was killed then
        for layer, figures in enumerate(kept.data["figures"]):
            self._done.append(self._result(layer, kept.tensors[_layer(layer)], figures))
        within = "" if self._data["pairs"] is None else f", within layer {len(self._done)}"
        self._watcher.note(f"going on after {len(self._done)} layers of an interrupted run{within}")
        return kept

    def _ranks(self) -> tuple[int, ...]:
        settings, n_layers = self._settings, self._engine.config.n_layers
        if settings.ffn_share is None:
            return (settings.factors.rank,) * n_layers
        budget, kind = settings.budget_bytes(self._engine), BY_NAME[settings.factors.weight_type]
        with self._engine.computing():
            return choose_ranks(self._engine, self._sequences, budget, kind, settings.sparsity)

    def _collect(self, walk: LayerWalk) -> None:
        """The next layer's files, and what the layer after it reads."""
        layer = walk.layer
        with self._engine.computing():
            mark = collect_pairs(
                self._engine,
                walk,
                self._folder / PAIRS,
                self._plan,
                self._settings.sparsity,
                self._watcher.sequence,
            )
        self._data["pairs"] = mark
        self._checkpoint.save({_residuals(layer): numbered(walk.residuals)}, self._data, {_residuals(layer - 1)})

    def _train_layer(self, state: Mapping[str, torch.Tensor] | None) -> None:
        layer = len(self._done)
        pairs = LayerPairs(self._folder / PAIRS, self._data["pairs"], check=False)
        gate = dense_ffn(self._engine, layer).gate
        factors = dataclasses.replace(self._settings.factors, rank=self._data["ranks"][layer])
        training = LayerTraining(pairs, gate, factors, state)
        release_layer(self._engine, layer)
        while not training.done:
            training.advance()
            name, before = f"training-{layer:03}-{training.step:07}", self._data["state"]
            self._data["state"] = name
            self._checkpoint.save({name: training.state()}, self._data, {before})
            self._watcher.measured(layer, training.step, training.curve[-1][1])
        self._finish(layer, training.result())

    def _finish(self, layer: int, trained: Trained) -> None:
        """Keep a layer's result; its files go."""
        tensors = {"first": trained.first.blocks, "second": trained.second.blocks, "bias": trained.bias}
        tensors |= trained.cuts.tensors()
        figures = asdict(trained.figures)
        before = self._data["state"]
        self._data |= {"figures": [*self._data["figures"], figures], "pairs": None, "state": None}
        self._checkpoint.save({_layer(layer): tensors}, self._data, {before})
        self._drop_pairs()
        self._done.append(self._result(layer, tensors, figures))
        self._watcher.layer(layer, self._done[-1])

    def _drop_pairs(self) -> None:
        for path in (self._folder / PAIRS).glob("*"):
            path.unlink()

    def _result(self, layer: int, tensors: Mapping[str, torch.Tensor], figures: Mapping[str, Any]) -> LayerResult:
        ffn, kind = dense_ffn(self._engine, layer), BY_NAME[self._settings.factors.weight_type]
        first = QuantTensor(tensors["first"], kind, ffn.gate.columns)
        second = QuantTensor(tensors["second"], kind, first.rows)
        trained = Trained(
            first, second, tensors["bias"], Cuts.from_tensors(tensors, ffn.gate.rows), Figures.of(figures)
        )
        return LayerResult(layer, trained, ffn_bytes(ffn))


def _layer(number: int) -> str:
    return f"layer-{number:03}"


def _residuals(number: int) -> str:
    return f"residuals-{number:03}"
