"""Profiles a model: runs a text through it layer by layer and writes down what its neurons do.

All sequences pass one layer before any passes the next, so that memory holds the residuals [T, D],
one layer's weights, its keys and its values for one sequence, whatever the size of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pinfer.engine import watcher as watchers
from pinfer.engine.checkpoint import Checkpoint, numbered
from pinfer.engine.load import CALIBRATION_TEXT, Engine
from pinfer.engine.measure import measure_layer
from pinfer.engine.solved import ACTIVATIONS, Solved
from pinfer.formats.tokenizer import Tokenizer
from pinfer.models import LayerWalk
from pinfer.placement.statistics import LayerStatistics, from_tensors, to_tensors

STAGE = "profile"
FOLDER = "profile-checkpoint"
SEQUENCE_TOKENS = 512  # also the chunk: values of one sequence at a time are held, [512, N] each
MIN_TOKENS = 64  # fewer say nothing of a neuron that fires on one token in twenty
DEFAULT_TOKENS = 8192
MAX_TEXT_BYTES = 64 * 2**20
CHARACTERS_A_TOKEN = 32  # more than any usual text has; of a longer one, parts are tokenised


@dataclass(frozen=True)
class Text:
    """A calibration text: its name for people, its content, and what tells it from others."""

    name: str
    content: str

    @classmethod
    def read(cls, path: str | Path | None) -> Text:
        """A UTF-8 file of at most MAX_TEXT_BYTES, or the shipped text. OSError if it cannot be read, ValueError else."""
        if path is None:
            return cls("the shipped calibration text", CALIBRATION_TEXT.read_text(encoding="utf-8"))
        with Path(path).open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise ValueError(f"{path}: a calibration text may have at most {MAX_TEXT_BYTES} bytes")
        try:
            return cls(Path(path).name, data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error

    def thinned(self, characters: int) -> str:
        """About so many characters in spans of 16,384 from all over, or all if it has no more."""
        count = max(1, characters // 16_384)
        stride, length = len(self.content) // count, characters // count
        if stride <= length:
            return self.content
        return "\n".join(self.content[at : at + length] for at in range(0, count * stride, stride))

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


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


def cut(tokenizer: Tokenizer, text: Text, tokens: int, context: int) -> list[torch.Tensor]:
    """Sequences int64 [T <= SEQUENCE_TOKENS] of about `tokens` tokens together, from all over the text.

    Each opens with BOS where the model uses one. ValueError for fewer than MIN_TOKENS, asked for or there.
    """
    if tokens < MIN_TOKENS:
        raise ValueError(f"tokens must be at least {MIN_TOKENS}, not {tokens}")
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text.thinned(CHARACTERS_A_TOKEN * tokens), add_bos=False)
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"{text.name}: too short a text: {MIN_TOKENS} tokens are needed, it has {len(ids)}")
    room = min(SEQUENCE_TOKENS, context) - len(start)
    if room < 2:
        raise ValueError(f"the model's context of {context} tokens is too short to profile it")
    wanted = min(tokens, len(ids))
    count = -(-wanted // room)
    length, stride = wanted // count, len(ids) // count
    return [torch.tensor(start + ids[at : at + length]) for at in range(0, count * stride, stride)]


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
    return {"text_sha256": text.sha256, **walk_settings(engine, sequences)}


def walk_settings(engine: Engine, sequences: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a walk with sequences int64 [T] depends on beside the model's file, as plain data."""
    ids = hashlib.sha256()
    for tokens in sequences:
        ids.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
    return {
        "ids_sha256": ids.hexdigest(),
        "sequences": len(sequences),
        "tokens": sum(len(tokens) for tokens in sequences),
        "activation": engine.config.activation,
        "int8": engine.int8,
    }


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
