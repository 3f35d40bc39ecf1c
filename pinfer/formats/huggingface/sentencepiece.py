"""tokenizer.model: what a tokenizer needs of a SentencePiece model file.

The file is a protocol buffer (sentencepiece_model.proto). Read here are ModelProto.pieces (1),
each with piece (1), score (2) and type (3); trainer_spec (2) with model_type (3) and the ids of
unk, bos, eos, pad (40 to 43); normalizer_spec (3) with precompiled_charsmap (2) and
add_dummy_prefix (3). Everything else is skipped.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pinfer.formats.errors import FormatError, shown

MAX_BYTES = 256 * 2**20
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
PIECE_TYPES = range(1, 7)  # the numbers of tokenizer_vocab.TokenType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Value = int | memoryview


@dataclass
class SentencePieceModel:
    """Pieces in the order of their ids, as (text, score, type), and what surrounds a text."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    model_type: int = 1
    special_ids: dict[str, int] = field(default_factory=lambda: {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    add_dummy_prefix: bool = True
    has_charsmap: bool = False


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """A model of type BPE without character rewriting; FormatError naming the file and what is wrong or else."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise FormatError(f"{path}: has more than {MAX_BYTES} bytes")
    try:
        model = _read_model(memoryview(data))
    except (ValueError, IndexError, struct.error) as error:
        raise FormatError(f"{path}: no SentencePiece model: {error}") from None
    if model.model_type != 2:
        name = MODEL_TYPES.get(model.model_type, str(model.model_type))
        raise FormatError(f"{path}: trainer_spec.model_type is {name}; only bpe is supported")
    if model.has_charsmap:
        raise FormatError(f"{path}: normalizer_spec.precompiled_charsmap rewrites characters, which is not supported")
    return model


def _read_model(data: memoryview) -> SentencePieceModel:
    model = SentencePieceModel()
    for number, value in _fields(data):
        if number == 1:
            model.pieces.append(_read_piece(_message(value), len(model.pieces)))
        elif number == 2:
            _read_trainer(_message(value), model)
        elif number == 3:
            for inner, setting in _fields(_message(value)):
                if inner == 2:
                    model.has_charsmap = len(_message(setting)) > 0
                elif inner == 3:
                    model.add_dummy_prefix = bool(_number(setting))
    if not model.pieces:
        raise ValueError("it holds no pieces")
    return model


def _read_piece(data: memoryview, index: int) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == 1:
            text = bytes(_message(value)).decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", _number(value).to_bytes(4, "little"))[0]
        elif number == 3:
            kind = _number(value)
    if kind not in PIECE_TYPES:
        raise ValueError(f"pieces[{index}] {shown(text)} has type {kind}")
    if not math.isfinite(score):
        raise ValueError(f"pieces[{index}] {shown(text)} has score {score}")
    return text, score, kind


def _read_trainer(data: memoryview, model: SentencePieceModel) -> None:
    names = {40: "unk", 41: "bos", 42: "eos", 43: "pad"}
    for number, value in _fields(data):
        if number == 3:
            model.model_type = _number(value)
        elif number in names:
            model.special_ids[names[number]] = _signed(_number(value))


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of one message: numbers with an int (not signed) or the bytes of what is nested."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        value: Value
        if kind == _VARINT:
            value, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
            if len(data) - at < size:
                raise ValueError("it ends within a field")
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif kind == _BYTES:
            size, at = _varint(data, at)
            if len(data) - at < size:
                raise ValueError("it ends within a field")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        yield tag >> 3, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of at most ten bytes, and where it ends; IndexError past the end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), at
    raise ValueError("a number of more than ten bytes")


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes belong")
    return value


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number belongs")
    return value


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
