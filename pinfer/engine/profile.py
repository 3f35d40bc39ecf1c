"""Profiles a model: runs a text through it layer by layer and writes down what its neurons do.

All sequences pass one layer before any passes the next, so that memory holds the residuals [T, D],
one layer's weights, its keys and its values for one sequence, whatever the size of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pinfer.engine import watcher as watchers
from pinfer.engine.checkpoint import Checkpoint, numbered
from pinfer.engine.load import Engine
from pinfer.engine.measure import measure_layer
from pinfer.engine.solved import ACTIVATIONS, Solved
from pinfer.engine.text import Text, walk_settings
from pinfer.models import LayerWalk
from pinfer.placement.statistics import LayerStatistics, from_tensors, to_tensors

STAGE = "profile"
FOLDER = "profile-checkpoint"
DEFAULT_TOKENS = 8192


class Watcher(watchers.Watcher):
    """What a profile tells while it runs; the base class keeps silent."""

    def layer(self, number: int, found: LayerStatistics) -> None:
        """A layer is done and kept."""


@dataclass(frozen=True)
class Profile:
    """A finished profile: per layer what was found, and the settings it was made under."""

    layers: tuple[LayerStatistics, ...]
    settings: dict[str, Any]
    figures: dict[str, Any]


def profile(
    engine: Engine, solved: Solved, text: Text, sequences: list[torch.Tensor], watcher: Watcher | None = None
) -> Profile:
    """Profile a dense model over sequences int64 [T] that were `cut` from a text, into a solved directory.

    Goes on from the checkpoint of an interrupted run with the same settings, to the same result bit for
    bit; a profile that is there already is returned as it is. ValueError for a model that is not dense or
    whose activations are not finite, and while another process writes into the directory.
    """
    watcher = watcher or Watcher()
    settings = _settings(engine, text, sequences)
    with solved.lock():
        checkpoint = Checkpoint(solved.path / FOLDER, {"settings": settings, "fingerprint": solved.model.fingerprint})
        done = solved.stages.get(STAGE)
        if done is not None and done.settings == settings:
            watcher.note(f"{solved.path} holds this profile already")
            layers = from_tensors(solved.read_tensors(ACTIVATIONS), engine.config.n_layers)
        else:
            if done is not None:
                watcher.note(f"{solved.path} holds a profile of another text or other settings, to be replaced")
            layers = _measure(engine, sequences, checkpoint, watcher)
            solved.write(ACTIVATIONS, to_tensors(layers), stage=STAGE, settings=settings, figures=figures_of(layers))
        checkpoint.remove()
    return Profile(layers, settings, solved.stages[STAGE].figures)


def figures_of(layers: tuple[LayerStatistics, ...]) -> dict[str, Any]:
    """The figures of a profile by layer, and density over all layers (they have one width)."""
    densities = [layer.density for layer in layers]
    return {
        "tokens": int(layers[0].tokens),
        "density": sum(densities) / len(densities),
        "layer_density": densities,
        "layer_hot_share": [layer.hot_share() for layer in layers],
        "layer_mass_share": [layer.mass_share() for layer in layers],
        "layer_convergence": [layer.convergence for layer in layers],
    }


def _settings(engine: Engine, text: Text, sequences: list[torch.Tensor]) -> dict[str, Any]:
    """All that the statistics depend on beside the model, as plain data. The number of threads is not part of it."""
    return {"text_sha256": text.sha256, **walk_settings(sequences, engine.model, engine.int8)}


def _measure(
    engine: Engine, sequences: list[torch.Tensor], checkpoint: Checkpoint, watcher: Watcher
) -> tuple[LayerStatistics, ...]:
    """The statistics of every layer, from where the checkpoint stands."""
    layers, residuals = _resume(checkpoint, watcher)
    watcher.begin(engine.config.n_layers, len(sequences), len(layers))
    with engine.computing():
        walk = LayerWalk(engine.model, sequences, residuals)
        walk.layer = len(layers)
        while walk.layer < engine.config.n_layers:
            layers.append(measure_layer(engine, walk, watcher.sequence))
            number = len(layers) - 1
            new = {_layer(number): to_tensors((layers[-1],)), _residuals(number): numbered(walk.residuals)}
            checkpoint.save(new, {"layers": len(layers)}, drop={_residuals(number - 1)})
            watcher.layer(number, layers[-1])
    return tuple(layers)


def _resume(checkpoint: Checkpoint, watcher: Watcher) -> tuple[list[LayerStatistics], list[torch.Tensor] | None]:
    """The layers done and the residuals after them; none where the checkpoint is of no use."""
    kept = checkpoint.resume(watcher)
    if kept is None:
        return [], None
    done = int(kept.data["layers"])
    layers = [from_tensors(kept.tensors[_layer(number)], 1)[0] for number in range(done)]
    watcher.note(f"going on after layer {done - 1} of an interrupted run")
    return layers, kept.sequence(_residuals(done - 1))


def _layer(number: int) -> str:
    return f"layer-{number:03}"


def _residuals(number: int) -> str:
    return f"residuals-{number:03}"
