"""tokenizer.json and tokenizer_config.json out of the `tokenizer.*` metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pinfer.files import write_atomically
from pinfer.formats.tokenizer_bpe import find_pre_tokenizer, split_merges
from pinfer.formats.tokenizer_pre import GPT2
from pinfer.formats.tokenizer_settings import TokenizerSettings, read_settings
from pinfer.formats.tokenizer_spm import SPACE
from pinfer.formats.tokenizer_vocab import ROLES, TokenType, Vocabulary, read_strings, read_value, read_vocabulary

_ADDED = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)


def write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the tokenizer for `transformers` (class PreTrainedTokenizerFast), which gives the same ids.

    Rows of padding ("[PADn]") are left out. Raises FormatError for faulty metadata, OSError where
    a file cannot be written.
    """
    vocabulary = read_vocabulary(metadata)
    settings = read_settings(metadata, vocabulary)
    ids = {_spelled(vocabulary, i): i for i in vocabulary.ids.values() if not _is_padding(vocabulary, i)}
    if vocabulary.model == "llama":
        merges, parts = _merges_of_scores(vocabulary), _spm_parts(settings)
    else:
        merges = [pair for pair in split_merges(read_strings(metadata, "merges")) if _all_known(pair, ids)]
        parts = _bpe_parts(settings, read_value(metadata, "pre", str))
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None if vocabulary.unk_id is None else vocabulary.tokens[vocabulary.unk_id],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": vocabulary.model == "llama",
        "byte_fallback": vocabulary.model == "llama",
        "ignore_merges": parts.pop("ignore_merges"),
        "vocab": ids,
        "merges": merges,
    }
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(vocabulary, settings)}
    content |= parts | {"post_processor": _post_processor(vocabulary, settings), "model": model}
    folder = Path(folder)
    write_atomically(folder / "tokenizer.json", json.dumps(content, ensure_ascii=False, indent=1).encode())
    config = _config(metadata, vocabulary, settings)
    write_atomically(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2).encode())


def _is_padding(vocabulary: Vocabulary, token_id: int) -> bool:
    return vocabulary.types[token_id] == TokenType.UNUSED and vocabulary.tokens[token_id] == f"[PAD{token_id}]"


def _spelled(vocabulary: Vocabulary, token_id: int) -> str:
    """A token as tokenizer.json spells it: SentencePiece's own (runs of spaces in Gemma) with marks for spaces."""
    text = vocabulary.tokens[token_id]
    marked = vocabulary.model == "llama" and vocabulary.types[token_id] == TokenType.USER_DEFINED
    return text.replace(" ", SPACE) if marked else text


def _all_known(pair: tuple[str, str], ids: Mapping[str, int]) -> bool:
    return pair[0] in ids and pair[1] in ids and "".join(pair) in ids


def _merges_of_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to make a token of two others, by falling score of the token."""
    scores = vocabulary.scores or [0.0] * len(vocabulary.tokens)
    kinds = (TokenType.NORMAL, TokenType.UNUSED, TokenType.USER_DEFINED)
    ids = {text.replace(" ", SPACE): i for text, i in vocabulary.ids.items() if vocabulary.types[i] in kinds}
    found = [
        (-scores[i], (text[:at], text[at:]))
        for text, i in ids.items()
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]
    found.sort(key=lambda item: item[0])
    return [pair for _, pair in found]


def _spm_parts(settings: TokenizerSettings) -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer: dict[str, Any] | None = replace
    pre_tokenizer = None
    if settings.space_prefix == "always":
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    elif settings.space_prefix == "first":
        normalizer = None
        pre_tokenizer = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if settings.space_prefix != "never":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    decoder = {"type": "Sequence", "decoders": steps}
    return {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder, "ignore_merges": False}


def _bpe_parts(settings: TokenizerSettings, pre_name: str | None) -> dict[str, Any]:
    pre = find_pre_tokenizer(pre_name)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pre.patterns == (GPT2,):
        pre_tokenizer: dict[str, Any] = byte_level | {"use_regex": True}
    else:
        steps: list[dict[str, Any]] = [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in pre.patterns
        ]
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [*steps, byte_level]}
    normalizer = {"type": "NFC"} if settings.nfc else None
    decoder = byte_level | {"use_regex": True}
    return {
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "ignore_merges": pre.ignore_merges,
    }


def _added(vocabulary: Vocabulary, settings: TokenizerSettings) -> list[dict[str, Any]]:
    """Those spelled with marks are looked for after the normalizer has put marks for spaces, as Gemma's are."""
    return [
        {
            "id": i,
            "content": _spelled(vocabulary, i),
            "single_word": False,
            "lstrip": i in settings.lstrip_ids,
            "rstrip": i in settings.rstrip_ids,
            "normalized": SPACE in _spelled(vocabulary, i) and settings.space_prefix == "never",
            "special": vocabulary.types[i] != TokenType.USER_DEFINED,
        }
        for i in vocabulary.ids_of_type(*_ADDED)
    ]


def _post_processor(vocabulary: Vocabulary, settings: TokenizerSettings) -> dict[str, Any] | None:
    """BOS and EOS around a text, and around each of a pair."""
    bos = vocabulary.bos_id if settings.add_bos else None
    eos = vocabulary.eos_id if settings.add_eos else None
    named = {vocabulary.tokens[i]: i for i in (bos, eos) if i is not None}
    if not named:
        return None

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        tokens = [
            None if i is None else {"SpecialToken": {"id": vocabulary.tokens[i], "type_id": kind}} for i in (bos, eos)
        ]
        items = [tokens[0], {"Sequence": {"id": name, "type_id": kind}}, tokens[1]]
        return [item for item in items if item is not None]

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in named.items()},
    }


def _config(metadata: Mapping[str, Any], vocabulary: Vocabulary, settings: TokenizerSettings) -> dict[str, Any]:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in ROLES.items():
        token_id = read_value(metadata, f"{name}_token_id", int)
        if token_id is None:
            token_id = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "unk": vocabulary.unk_id}.get(role)
        if token_id is not None and 0 <= token_id < len(vocabulary.tokens):
            config[f"{role}_token"] = vocabulary.tokens[token_id]
    config |= {"add_bos_token": settings.add_bos, "add_eos_token": settings.add_eos}
    templates = settings.chat_templates
    if set(templates) == {""}:
        config["chat_template"] = templates[""]
    elif templates:
        config["chat_template"] = [{"name": name or "default", "template": text} for name, text in templates.items()]
    return config
