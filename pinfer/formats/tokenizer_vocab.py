"""The vocabulary in a GGUF file's metadata, read and checked.

Keys are `tokenizer.ggml.*`; how they are read follows llama.cpp (src/llama-vocab.cpp), whose
token ids the tokenizers reproduce. Every fault is a FormatError that starts with the key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from pinfer.formats.errors import FormatError, shown

KEY = "tokenizer.ggml."
PINFER_KEY = "tokenizer.pinfer."  # what GGUF has no key for, see formats/huggingface/tokenizer.py
# The roles of special tokens, as tokenizer_config.json and as GGUF spell them.
ROLES = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "sep": "seperator",  # GGUF's spelling
    "pad": "padding",
    "cls": "cls",
    "mask": "mask",
    "eot": "eot",
    "eom": "eom",
}


class TokenType(IntEnum):
    """What a token is, with the numbers of `tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Texts that end a turn, whatever type the file gives them: conversions often get that type wrong.
END_TEXTS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "[e~[",
        "<｜end▁of▁sentence｜>",
    ]
)
# Code-completion marks that end a generation too: padding, the next repository, the next file.
_END_MARKS = {
    "fim_pad_token_id": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep_token_id": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep_token_id": "<|file_sep|>",
}
# Code-completion marks that end nothing but must not be typed by a user.
_OTHER_MARKS = {
    "fim_pre_token_id": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|>",
    "fim_suf_token_id": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|>",
    "fim_mid_token_id": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|>",
}


def looks_special(text: str) -> bool:
    """Marks that files call ordinary tokens and llama.cpp's converter control tokens: no user's text may spell them."""
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
        or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    )


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model: `tokens[i]`, `types[i]` and, where the file has them, `scores[i]` belong to id i."""

    model: str
    tokens: list[str]
    ids: dict[str, int]
    types: list[int]
    scores: list[float] | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    eog_ids: frozenset[int]

    def ids_of_type(self, *types: TokenType) -> list[int]:
        """The ids whose tokens are of one of `types`, ascending."""
        return [token_id for token_id, kind in enumerate(self.types) if kind in types]


def read_vocabulary(metadata: Mapping[str, Any]) -> Vocabulary:
    """Read and check the vocabulary in `metadata`; FormatError names the key at fault."""
    model = read_value(metadata, "model", str)
    if model is None:
        raise FormatError(f"{KEY}model is missing: the file holds no tokenizer")
    tokens = _read_tokens(metadata)
    ids = _index_tokens(tokens)
    types = _read_types(metadata, len(tokens))
    scores = _read_scores(metadata, len(tokens))
    # The ids that SentencePiece models of the Llama family share; other models name theirs.
    bos, eos, unk = (1, 2, 0) if model == "llama" else (None, None, None)
    size = len(tokens)
    bos_id = _read_id(metadata, "bos_token_id", size, bos)
    eos_id = _read_id(metadata, "eos_token_id", size, eos)
    unk_id = _read_id(metadata, "unknown_token_id", size, unk)
    eog_ids = _find_ends(metadata, ids, types, size, eos_id)
    return Vocabulary(model, tokens, ids, types, scores, bos_id, eos_id, unk_id, eog_ids)


def read_value(metadata: Mapping[str, Any], name: str, kind: type) -> Any:
    """The value of `tokenizer.ggml.<name>`, or None where the file has none; FormatError unless it is a `kind`."""
    value = metadata.get(KEY + name)
    if value is None or (isinstance(value, kind) and isinstance(value, bool) == (kind is bool)):
        return value
    raise FormatError(f"{KEY}{name} is {shown(str(value))}, not of type {kind.__name__}")


def read_strings(metadata: Mapping[str, Any], name: str) -> list[str]:
    """A non-empty list of strings that UTF-8 can carry; FormatError otherwise."""
    values = read_value(metadata, name, list)
    if not values:
        raise FormatError(f"{KEY}{name} is {'missing' if values is None else 'empty'}")
    try:
        "".join(values).encode()
    except TypeError:
        index = next(i for i, value in enumerate(values) if not isinstance(value, str))
        raise FormatError(f"{KEY}{name}[{index}] is {shown(repr(values[index]))}, not a string") from None
    except UnicodeEncodeError:
        raise FormatError(f"{KEY}{name} holds text that is not valid Unicode") from None
    return values


def _read_tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The tokens; an empty one gets llama.cpp's stand-in text, so that texts stay distinct."""
    tokens = read_strings(metadata, "tokens")
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]


def _index_tokens(tokens: list[str]) -> dict[str, int]:
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) == len(tokens):
        return ids
    first = next(i for i, token in enumerate(tokens) if ids[token] != i)
    token = tokens[first]
    raise FormatError(f"{KEY}tokens holds {shown(token)} twice, as {first} and {ids[token]}")


def _read_types(metadata: Mapping[str, Any], size: int) -> list[int]:
    types = _read_numbers(metadata, "token_type", size)
    if types is None:
        return [int(TokenType.NORMAL)] * size
    strange = set(types) - set(TokenType)
    if strange:
        raise FormatError(f"{KEY}token_type holds {min(strange)}; known are 0 to {max(TokenType)}")
    return [int(kind) for kind in types]


def _read_scores(metadata: Mapping[str, Any], size: int) -> list[float] | None:
    scores = _read_numbers(metadata, "scores", size)
    if scores is not None and any(map(math.isnan, scores)):
        raise FormatError(f"{KEY}scores[{[math.isnan(score) for score in scores].index(True)}] is NaN")
    return scores


def _read_numbers(metadata: Mapping[str, Any], name: str, size: int) -> list[Any] | None:
    """One number per token, or None where the file has no such key."""
    values = read_value(metadata, name, list)
    if values is None:
        return None
    if len(values) != size:
        raise FormatError(f"{KEY}{name} has {len(values)} items, but {KEY}tokens has {size}")
    if not set(map(type, values)) <= {int, float}:
        raise FormatError(f"{KEY}{name} holds items that are no numbers")
    return values


def _read_id(metadata: Mapping[str, Any], name: str, size: int, default: int | None) -> int | None:
    """A token id; `default` (where the vocabulary is large enough for it) if the file names none."""
    value = read_value(metadata, name, int)
    if value is None:
        return default if default is not None and default < size else None
    if not 0 <= value < size:
        raise FormatError(f"{KEY}{name} is {value}, outside the vocabulary of {size} tokens")
    return value


def _find_ends(
    metadata: Mapping[str, Any], ids: dict[str, int], types: list[int], size: int, eos_id: int | None
) -> frozenset[int]:
    """The ids that end a generation; marks found by their text become CONTROL in `types`.

    As in llama.cpp, so that user text cannot spell a mark that a conversion mistyped.
    """
    ends = {ids[text] for text in END_TEXTS if text in ids}
    # Gemma and Qwen have "</s>" as an HTML tag; llama.cpp 0.3.36 ends on it there too, against the file's type.
    if "</s>" in ids and types[ids["</s>"]] == TokenType.CONTROL:
        ends.add(ids["</s>"])
    marks = set(ends)
    for name, texts in (_END_MARKS | _OTHER_MARKS).items():
        named = _read_id(metadata, name, size, None)
        found = {ids[text] for text in texts.split() if text in ids} if named is None else set()
        marks |= found
        if name in _END_MARKS:
            ends |= found if named is None else {named}
    for token_id in marks:
        types[token_id] = int(TokenType.CONTROL)
    # gpt-oss and Solar put <|end|> between the parts of one answer.
    if "<|end|>" in ids and ({"<|return|>", "<|call|>"} <= ids.keys() or {"<|flush|>", "<|calls|>"} <= ids.keys()):
        ends.discard(ids["<|end|>"])
    others = [_read_id(metadata, name, size, None) for name in ("eot_token_id", "eom_token_id")]
    return frozenset(ends | {token_id for token_id in (eos_id, *others) if token_id is not None})
