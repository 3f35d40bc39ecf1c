"""The tokenizer of a Hugging Face folder as the `tokenizer.*` metadata of a GGUF file, and back.

Keys and values are those that llama.cpp's converter writes. What GGUF has no key for, and
llama.cpp therefore ignores, goes under `tokenizer.pinfer.*`:

    normalizer     "NFC": texts are composed before they are tokenized, as Qwen's are
    space_prefix   "first": a space goes before the start of a text alone, not behind special tokens (Mistral v0.3)
    lstrip_ids, rstrip_ids   special tokens that swallow the white space before or behind them (Phi-3)
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.huggingface.sentencepiece import SentencePieceModel, read_sentencepiece
from pinfer.formats.huggingface.tokenizer_config import TokenizerConfig
from pinfer.formats.huggingface.tokenizer_json import (
    MAX_ID,
    SPACE,
    AddedToken,
    JsonTokenizer,
    read_tokenizer_json,
    read_vocab_files,
)
from pinfer.formats.huggingface.write_tokenizer import write_tokenizer
from pinfer.formats.tokenizer_vocab import END_TEXTS, KEY, PINFER_KEY, ROLES, TokenType

__all__ = ["tokenizer_metadata", "write_tokenizer"]

PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0
# Folders with vocab.json and merges.txt alone: the class stands for the pre-tokenizer and for NFC.
_CLASSES = {"GPT2": ("gpt-2", False), "Qwen2": ("qwen2", True)}


@dataclass
class _Row:
    """One token: its text, type and score."""

    text: str
    kind: TokenType
    score: float


Rows = dict[int, _Row]


def tokenizer_metadata(folder: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """The metadata that `load_tokenizer` reads, for the tokenizer files in a folder.

    vocab_size: rows of the model's embedding. Ids without a token become "[PADn]" of type UNUSED;
    added tokens that have no row (Gemma 3's for images) are left out.

    Read are tokenizer.json, or vocab.json with merges.txt, or tokenizer.model, and beside them
    tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json (ids of
    special tokens), added_tokens.json and chat_template.jinja. Raises FileNotFoundError where
    there is no tokenizer, FormatError naming file and key for a faulty or unsupported one.
    """
    folder = Path(folder)
    config = TokenizerConfig(folder)
    source = _find_source(folder, config)
    if isinstance(source, JsonTokenizer):
        added = _with_rows([*config.added(), *source.added], vocab_size)
        rows, values, around = _from_json(source, _find_scores(folder, source), added)
    else:
        added = _with_rows(config.added(), vocab_size)
        rows, values = _from_sentencepiece(source, config)
        around = None
    spm = values[f"{KEY}model"] == "llama"
    _add(rows, added, spaces=spm)
    _pad(rows, vocab_size, folder)
    values |= _stripping(added, always=spm) | _special(config, rows, values, around or (None, None))
    values |= _surround(config, values, around, default_bos=spm)
    return _table(rows, scores=spm) | values | _chat_templates(config)


def _find_source(folder: Path, config: TokenizerConfig) -> JsonTokenizer | SentencePieceModel:
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        full = config.tokenizer.get("tokenizer_class", str, "GPT2Tokenizer")
        name = full.removesuffix("Fast").removesuffix("Tokenizer")
        if name not in _CLASSES:
            raise config.tokenizer.at("tokenizer_class").fault(f"is {shown(full)}: tokenizer.json is needed")
        return read_vocab_files(folder, *_CLASSES[name])
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder / "tokenizer.model")
    raise FileNotFoundError(f"{folder}: no tokenizer.json, vocab.json with merges.txt, or tokenizer.model")


def _find_scores(folder: Path, source: JsonTokenizer) -> dict[str, float]:
    """Scores for a tokenizer on characters: those of tokenizer.model, if it has every token that merges make.

    Otherwise by the merges' order: SentencePiece joins what makes the token of the highest score,
    BPE what the first merge names, and these merges were listed by falling score. So a
    tokenizer.model that cannot be read (a pointer of Git LFS, say) is not missed.
    """
    if source.pre is not None:
        return {}
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(source.merges):
        ranks.setdefault(left + right, rank)
    path = folder / "tokenizer.model"
    if path.is_file():
        with contextlib.suppress(FormatError):
            known = {text: score for text, score, _ in read_sentencepiece(path).pieces}
            if ranks.keys() <= known.keys():
                return known
    behind = len(source.merges)
    return {text: -float(ranks.get(text, behind + i)) for text, i in source.vocab.items()}


def _with_rows(tokens: list[AddedToken], vocab_size: int | None) -> list[AddedToken]:
    """The last of each id, without those that a model of `vocab_size` rows cannot have."""
    by_id = {token.id: token for token in tokens}
    return [token for token in by_id.values() if vocab_size is None or token.id < vocab_size]


def _from_json(
    source: JsonTokenizer, scores: dict[str, float], added: list[AddedToken]
) -> tuple[Rows, dict[str, Any], tuple[str | None, str | None] | None]:
    dropped = {token.id for token in source.added} - {token.id for token in added}
    rows = {
        i: _Row(text, TokenType.NORMAL, scores.get(text, 0.0)) for text, i in source.vocab.items() if i not in dropped
    }
    values: dict[str, Any] = {f"{KEY}model": "gpt2" if source.pre else "llama", f"{KEY}pre": source.pre or "default"}
    if source.pre is not None:
        values[f"{KEY}merges"] = [f"{left} {right}" for left, right in source.merges]
        if source.nfc:
            values[f"{PINFER_KEY}normalizer"] = "NFC"
        return rows, values, source.around
    _mark_bytes(rows, source.vocab)
    values[f"{KEY}add_space_prefix"] = source.space_prefix != "never"
    if source.space_prefix == "first":
        values[f"{PINFER_KEY}space_prefix"] = "first"
    unknown = source.vocab.get(source.unknown or "")
    if unknown is not None:
        rows[unknown].kind = TokenType.UNKNOWN
        values[f"{KEY}unknown_token_id"] = unknown
    return rows, values, source.around


def _from_sentencepiece(model: SentencePieceModel, config: TokenizerConfig) -> tuple[Rows, dict[str, Any]]:
    rows = {i: _Row(text, TokenType(kind), score) for i, (text, score, kind) in enumerate(model.pieces)}
    for row in rows.values():
        if row.kind == TokenType.USER_DEFINED:
            row.text = row.text.replace(SPACE, " ")
    prefix = config.tokenizer.get("add_prefix_space", bool, model.add_dummy_prefix)
    values = {f"{KEY}model": "llama", f"{KEY}pre": "default", f"{KEY}add_space_prefix": prefix}
    ids = {f"{KEY}{ROLES[role]}_token_id": i for role, i in model.special_ids.items() if i in rows}
    return rows, values | ids


def _mark_bytes(rows: Rows, vocab: dict[str, int]) -> None:
    for byte in range(256):
        token_id = vocab.get(f"<0x{byte:02X}>")
        if token_id in rows:
            rows[token_id] = _Row(rows[token_id].text, TokenType.BYTE, 0.0)


def _add(rows: Rows, added: Collection[AddedToken], spaces: bool) -> None:
    """Put added tokens in their places; in SentencePiece models ordinary ones are spelled with spaces."""
    unknown = {i for i, row in rows.items() if row.kind == TokenType.UNKNOWN}
    for token in added:
        control = token.special or _looks_special(token.content)
        text = token.content if control or not spaces else token.content.replace(SPACE, " ")
        kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
        rows[token.id] = _Row(text, TokenType.UNKNOWN if token.id in unknown else kind, ADDED_SCORE)


def _looks_special(text: str) -> bool:
    """Marks that files call ordinary tokens and llama.cpp's converter control tokens: no user's text may spell them."""
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
        or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    )


def _pad(rows: Rows, vocab_size: int | None, folder: Path) -> None:
    size = max(rows) + 1
    if vocab_size is not None and vocab_size < size:
        raise FormatError(f"{folder}: the tokenizer has {size} tokens, the model {vocab_size} rows for them")
    if vocab_size is not None and vocab_size > MAX_ID:
        raise FormatError(f"{folder}: vocab_size is {vocab_size}; at most {MAX_ID} is supported")
    for i in range(vocab_size or size):
        if i not in rows:
            rows[i] = _Row(f"[PAD{i}]", TokenType.UNUSED, PAD_SCORE)


def _stripping(added: Collection[AddedToken], always: bool) -> dict[str, list[int]]:
    """The ids that swallow white space; `always` an empty list too, where a reader would else guess by the name."""
    sides = {"lstrip": [token.id for token in added if token.lstrip], "rstrip": [t.id for t in added if t.rstrip]}
    return {f"{PINFER_KEY}{side}_ids": sorted(i) for side, i in sides.items() if i or (always and side == "rstrip")}


def _special(
    config: TokenizerConfig, rows: Rows, known: dict[str, Any], around: tuple[str | None, str | None]
) -> dict[str, Any]:
    """The ids of special tokens by role, which become control tokens, and of what else ends a text."""
    values = {key: i for key, i in known.items() if key.endswith("_token_id")}
    ids = {row.text: i for i, row in rows.items()}
    fallback = {"bos": around[0], "eos": around[1]}
    for role, name in ROLES.items():
        text = config.token(role) or fallback.get(role)
        token_id = ids.get(text) if text is not None else next(iter(config.token_ids(role)), None)
        if token_id in rows:
            values[f"{KEY}{name}_token_id"] = token_id
            if rows[token_id].kind == TokenType.NORMAL:
                rows[token_id].kind = TokenType.CONTROL
    named = set(values.values())
    others = [i for i in config.token_ids("eos") if i in rows and i not in named and rows[i].text not in END_TEXTS]
    free = [key for key in (f"{KEY}eot_token_id", f"{KEY}eom_token_id") if key not in values]
    return values | dict(zip(free, others, strict=False))


def _surround(
    config: TokenizerConfig,
    values: dict[str, Any],
    around: tuple[str | None, str | None] | None,
    default_bos: bool,
) -> dict[str, bool]:
    """Whether BOS and EOS go around a text: by tokenizer_config.json, else by the post-processor, else as is usual."""
    defaults = (default_bos, False) if around is None else (around[0] is not None, around[1] is not None)
    return {
        f"{KEY}add_{role}_token": config.tokenizer.get(f"add_{role}_token", bool, default)
        and f"{KEY}{role}_token_id" in values
        for role, default in zip(("bos", "eos"), defaults, strict=True)
    }


def _table(rows: Rows, scores: bool) -> dict[str, Any]:
    ordered = [rows[i] for i in range(len(rows))]
    values: dict[str, Any] = {f"{KEY}tokens": [row.text for row in ordered]}
    values[f"{KEY}token_type"] = [int(row.kind) for row in ordered]
    return values | ({f"{KEY}scores": [row.score for row in ordered]} if scores else {})


def _chat_templates(config: TokenizerConfig) -> dict[str, Any]:
    """The template to use, and others under their names."""
    templates = config.chat_templates()
    values: dict[str, Any] = {
        f"tokenizer.chat_template{'.' if name else ''}{name}": template for name, template in templates.items()
    }
    others = sorted(set(templates) - {""})
    return values | ({"tokenizer.chat_templates": others} if others else {})
