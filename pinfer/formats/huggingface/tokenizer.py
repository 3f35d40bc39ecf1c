"""The tokenizer of a Hugging Face folder as the `tokenizer.*` metadata of a GGUF file, and back.

Keys and values are those that llama.cpp's converter writes. What GGUF has no key for, and
llama.cpp therefore ignores, goes under `tokenizer.pinfer.*`:

    normalizer     "NFC": texts are composed before they are tokenized, as Qwen's are
    space_prefix   "first": a space goes before the start of a text alone, not behind special tokens (Mistral v0.3)
    lstrip_ids, rstrip_ids   special tokens that swallow the white space before or behind them (Phi-3)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.huggingface.sentencepiece import SentencePieceModel, read_sentencepiece
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

CONFIG_BYTES = 16 * 2**20
PAD_SCORE, ADDED_SCORE = -10000.0, -1000.0
# Folders with vocab.json and merges.txt alone: the class stands for the pre-tokenizer.
_CLASSES = {"GPT2": ("gpt-2", False), "Qwen2": ("qwen2", True)}


@dataclass
class _Row:
    """One token: its text, type and score."""

    text: str
    kind: TokenType
    score: float


class _Config:
    """What tokenizer_config.json and its companions say, in the order in which they are asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tokenizer = self._read("tokenizer_config.json")
        self._others = [self._read("special_tokens_map.json"), self._read("config.json")]
        self._generation = self._read("generation_config.json")

    def _read(self, name: str) -> Node:
        path = self._folder / name
        return Node.read(path, CONFIG_BYTES) if path.is_file() else Node(None, f"{path}:")

    def token(self, role: str) -> str | None:
        """The text of a special token."""
        for node in (self.tokenizer, self._others[0]):
            entry = node.at(f"{role}_token")
            text = entry.get("content", str) if isinstance(entry.value, dict) else entry.as_(str)
            if text is not None:
                return text
        return None

    def token_ids(self, role: str) -> list[int]:
        """The ids of a special token by generation_config.json or config.json; several may end a text."""
        for node in (self._generation, self._others[1]):
            entry = node.at(f"{role}_token_id")
            if isinstance(entry.value, list):
                return [item.as_(int, -1) for item in entry.items()]
            if entry.value is not None:
                return [entry.as_(int)]
        return []

    def added(self) -> list[AddedToken]:
        """`added_tokens_decoder`, and added_tokens.json for ids that it does not name."""
        tokens = {}
        for text, node in self._read("added_tokens.json").fields():
            tokens[node.as_(int, -1)] = AddedToken(_checked_id(node.as_(int, -1), node), text, False)
        for key, node in self.tokenizer.at("added_tokens_decoder").fields():
            token_id = _checked_id(int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1, node)
            flags = (node.get(name, bool, False) for name in ("special", "lstrip", "rstrip"))
            content = node.get("content", str)
            if not content:
                raise node.fault("has no content")
            tokens[token_id] = AddedToken(token_id, content, *flags)
        return list(tokens.values())

    def chat_templates(self) -> dict[str, str]:
        """Templates by name, the one to use under ""; chat_template.jinja comes before tokenizer_config.json."""
        path = self._folder / "chat_template.jinja"
        if path.is_file():
            with path.open("rb") as file:
                data = file.read(CONFIG_BYTES + 1)
            if len(data) > CONFIG_BYTES:
                raise FormatError(f"{path}: has more than {CONFIG_BYTES} bytes")
            try:
                return {"": data.decode("utf-8")}
            except UnicodeDecodeError as error:
                raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None
        entry = self.tokenizer.at("chat_template")
        if entry.value is None:
            entry = self._read("chat_template.json").at("chat_template")
        if not isinstance(entry.value, list):
            return {} if entry.value is None else {"": entry.as_(str)}
        named = {item.get("name", str, ""): item.get("template", str, "") for item in entry.items()}
        return {"" if name == "default" else name: template for name, template in named.items()}


def _checked_id(token_id: int, node: Node) -> int:
    if not 0 <= token_id < MAX_ID:
        raise node.fault(f"is for the id {token_id}, not one from 0 to {MAX_ID - 1}")
    return token_id


def tokenizer_metadata(folder: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """The metadata that `load_tokenizer` reads, for the tokenizer files in a folder.

    vocab_size: rows of the model's embedding; ids without a token become "[PADn]" of type UNUSED.

    Read are tokenizer.json, or vocab.json with merges.txt, or tokenizer.model, and beside them
    tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json (ids of
    special tokens), added_tokens.json and chat_template.jinja. Raises FileNotFoundError where
    there is no tokenizer, FormatError naming file and key for a faulty or unsupported one.
    """
    folder = Path(folder)
    config = _Config(folder)
    source = _find_source(folder, config)
    if isinstance(source, JsonTokenizer):
        pieces = folder / "tokenizer.model"
        model = read_sentencepiece(pieces) if source.pre is None and pieces.is_file() else None
        rows, values = _from_json(source, model, config)
    else:
        rows, values = _from_sentencepiece(source, config)
    _pad(rows, vocab_size, folder)
    size = max(rows) + 1
    ordered = [rows.get(i) or _Row(f"[PAD{i}]", TokenType.UNUSED, PAD_SCORE) for i in range(size)]
    metadata: dict[str, Any] = {
        f"{KEY}model": values.pop("model"),
        f"{KEY}pre": values.pop("pre"),
        f"{KEY}tokens": [row.text for row in ordered],
        f"{KEY}token_type": [int(row.kind) for row in ordered],
    }
    if metadata[f"{KEY}model"] == "llama":
        metadata[f"{KEY}scores"] = [row.score for row in ordered]
    metadata |= values
    templates = config.chat_templates()
    for name, template in templates.items():
        metadata[f"tokenizer.chat_template{'.' if name else ''}{name}"] = template
    if set(templates) - {""}:
        metadata["tokenizer.chat_templates"] = sorted(set(templates) - {""})
    return metadata


def _find_source(folder: Path, config: _Config) -> JsonTokenizer | SentencePieceModel:
    if (folder / "tokenizer.json").is_file():
        return read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        name = (
            config.tokenizer.get("tokenizer_class", str, "GPT2Tokenizer").removesuffix("Fast").removesuffix("Tokenizer")
        )
        if name not in _CLASSES:
            raise config.tokenizer.at("tokenizer_class").fault(f"is {shown(name)}: tokenizer.json is needed")
        return read_vocab_files(folder, *_CLASSES[name])
    if (folder / "tokenizer.model").is_file():
        return read_sentencepiece(folder / "tokenizer.model")
    raise FileNotFoundError(f"{folder}: no tokenizer.json, vocab.json with merges.txt, or tokenizer.model")


def _from_json(
    source: JsonTokenizer, model: SentencePieceModel | None, config: _Config
) -> tuple[dict[int, _Row], dict[str, Any]]:
    scores = {} if source.pre is not None else _scores(source, model)
    rows = {i: _Row(text, TokenType.NORMAL, scores.get(text, 0.0)) for text, i in source.vocab.items()}
    if source.pre is None:
        _mark_bytes(rows, source.vocab)
    added = {token.id: token for token in [*config.added(), *source.added]}.values()
    _add(rows, added, spaces=source.pre is None)
    unknown = source.vocab.get(source.unknown or "")
    if source.pre is None and unknown is not None:
        rows[unknown].kind = TokenType.UNKNOWN
    values: dict[str, Any] = {"model": "llama" if source.pre is None else "gpt2", "pre": source.pre or "default"}
    if source.pre is None:
        values[f"{KEY}add_space_prefix"] = source.space_prefix != "never"
        if source.space_prefix == "first":
            values[f"{PINFER_KEY}space_prefix"] = "first"
    else:
        values[f"{KEY}merges"] = [f"{left} {right}" for left, right in source.merges]
        if source.nfc:
            values[f"{PINFER_KEY}normalizer"] = "NFC"
    for side in ("lstrip", "rstrip"):
        ids = sorted(token.id for token in added if getattr(token, side))
        if ids or (side == "rstrip" and source.pre is None):
            values[f"{PINFER_KEY}{side}_ids"] = ids
    around = source.around
    values |= _special(config, rows, around or (None, None))
    if source.pre is None and unknown is not None:
        values.setdefault(f"{KEY}unknown_token_id", unknown)
    values |= _surround(config, values, around, default_bos=source.pre is None)
    return rows, values


def _from_sentencepiece(model: SentencePieceModel, config: _Config) -> tuple[dict[int, _Row], dict[str, Any]]:
    rows = {i: _Row(text, TokenType(kind), score) for i, (text, score, kind) in enumerate(model.pieces)}
    for row in rows.values():
        if row.kind == TokenType.USER_DEFINED:
            row.text = row.text.replace(SPACE, " ")
    added = config.added()
    _add(rows, added, spaces=True)
    values: dict[str, Any] = {"model": "llama", "pre": "default"}
    values[f"{KEY}add_space_prefix"] = model.add_dummy_prefix
    for side in ("lstrip", "rstrip"):
        ids = sorted(token.id for token in added if getattr(token, side))
        if ids or side == "rstrip":
            values[f"{PINFER_KEY}{side}_ids"] = ids
    values |= _special(config, rows, (None, None))
    for role, token_id in model.special_ids.items():
        if token_id in rows:
            values.setdefault(f"{KEY}{ROLES[role]}_token_id", token_id)
    values |= _surround(config, values, None, default_bos=True)
    return rows, values


def _scores(source: JsonTokenizer, model: SentencePieceModel | None) -> dict[str, float]:
    """A score a token: those of tokenizer.model if it has every token that merges make, else by the merges' order.

    SentencePiece joins what makes the token of the highest score, BPE what the first merge names,
    and these merges were listed by falling score: the first merge that makes a token is its rank.
    """
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(source.merges):
        ranks.setdefault(left + right, rank)
    if model is not None:
        known = {text: score for text, score, _ in model.pieces}
        if ranks.keys() <= known.keys():
            return known
    behind = float(len(source.merges))
    return {text: -float(ranks.get(text, behind + i)) for text, i in source.vocab.items()}


def _mark_bytes(rows: dict[int, _Row], vocab: dict[str, int]) -> None:
    for byte in range(256):
        token_id = vocab.get(f"<0x{byte:02X}>")
        if token_id is not None:
            rows[token_id] = _Row(rows[token_id].text, TokenType.BYTE, 0.0)


def _add(rows: dict[int, _Row], added: Any, spaces: bool) -> None:
    """Put added tokens in their places; in SentencePiece models ordinary ones are spelled with spaces."""
    for token in added:
        control = token.special or _looks_special(token.content)
        text = token.content if control or not spaces else token.content.replace(SPACE, " ")
        kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
        rows[token.id] = _Row(text, kind, ADDED_SCORE)


def _looks_special(text: str) -> bool:
    """Marks that files call ordinary tokens and llama.cpp's converter control tokens: no user's text may spell them."""
    return (
        (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
        or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    )


def _special(config: _Config, rows: dict[int, _Row], around: tuple[str | None, str | None]) -> dict[str, Any]:
    """The ids of special tokens by role, which become control tokens, and of what else ends a text."""
    values: dict[str, Any] = {}
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
    config: _Config, values: dict[str, Any], around: tuple[str | None, str | None] | None, default_bos: bool
) -> dict[str, bool]:
    """Whether BOS and EOS go around a text: by tokenizer_config.json, else by the post-processor, else as is usual."""
    defaults = (default_bos, False) if around is None else (around[0] is not None, around[1] is not None)
    return {
        f"{KEY}add_{role}_token": config.tokenizer.get(f"add_{role}_token", bool, default)
        and f"{KEY}{role}_token_id" in values
        for role, default in zip(("bos", "eos"), defaults, strict=True)
    }


def _pad(rows: dict[int, _Row], vocab_size: int | None, folder: Path) -> None:
    size = max(rows) + 1
    if vocab_size is None or vocab_size == size:
        return
    if vocab_size < size:
        raise FormatError(f"{folder}: the tokenizer has {size} tokens, the model {vocab_size} rows for them")
    if vocab_size > MAX_ID:
        raise FormatError(f"{folder}: vocab_size is {vocab_size}; at most {MAX_ID} is supported")
    rows[vocab_size - 1] = _Row(f"[PAD{vocab_size - 1}]", TokenType.UNUSED, PAD_SCORE)
