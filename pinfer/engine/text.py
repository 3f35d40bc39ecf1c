"""Calibration texts, and the sequences of tokens that are taken from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pinfer.formats.tokenizer import Tokenizer
from pinfer.models import Transformer

ASSETS = Path(__file__).parent.parent / "assets"
CALIBRATION_TEXT = ASSETS / "calibration.txt"
EVALUATION_TEXT = ASSETS / "evaluation.txt"  # neither trained nor calibrated on

SEQUENCE_TOKENS = 512
MIN_TOKENS = 64  # fewer say nothing of a neuron that fires on one token in twenty
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


def cut(
    tokenizer: Tokenizer, text: Text, tokens: int, context: int, longest: int = SEQUENCE_TOKENS, at_least: int = 1
) -> list[torch.Tensor]:
    """Sequences int64 [T <= longest] of about `tokens` tokens together, from all over the text, `at_least` so many.

    Each opens with BOS where the model uses one. ValueError for fewer than MIN_TOKENS, asked for or there.
    """
    if tokens < MIN_TOKENS:
        raise ValueError(f"tokens must be at least {MIN_TOKENS}, not {tokens}")
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text.thinned(CHARACTERS_A_TOKEN * tokens), add_bos=False)
    if len(ids) < MIN_TOKENS:
        raise ValueError(f"{text.name}: too short a text: {MIN_TOKENS} tokens are needed, it has {len(ids)}")
    room = min(longest, context) - len(start)
    if room < 2:
        raise ValueError(f"the model's context of {context} tokens is too short to calibrate it")
    wanted = min(tokens, len(ids))
    count = max(at_least, -(-wanted // room))
    length, stride = wanted // count, len(ids) // count
    return [torch.tensor(start + ids[at : at + length]) for at in range(0, count * stride, stride)]


def walk_settings(sequences: Sequence[torch.Tensor], model: Transformer, int8: bool) -> dict[str, Any]:
    """What a model's activations on sequences int64 [T] depend on beside its file, as plain data."""
    ids = hashlib.sha256()
    for tokens in sequences:
        ids.update(len(tokens).to_bytes(8, "little") + tokens.numpy().tobytes())
    return {
        "ids_sha256": ids.hexdigest(),
        "sequences": len(sequences),
        "tokens": sum(len(tokens) for tokens in sequences),
        "activation": model.config.activation,
        "int8": int8,
    } | ({"long_rope": True} if model.long_rope else {})
