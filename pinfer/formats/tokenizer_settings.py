"""What a GGUF file's metadata says on how text becomes tokens, beside the vocabulary itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.tokenizer_bpe import find_pre_tokenizer
from pinfer.formats.tokenizer_vocab import KEY, PINFER_KEY, TokenType, Vocabulary, read_value

SpacePrefix = Literal["always", "first", "never"]


@dataclass(frozen=True)
class TokenizerSettings:
    """How one model's texts are prepared.

    chat_templates: by name, the one to use under "".
    space_prefix: "always" puts a space before text that starts a prompt or follows a special
                  token, "first" before the start of a text alone.
    nfc:          texts are composed (Unicode's form C) before anything else.
    lstrip_ids, rstrip_ids: special tokens that swallow the white space before and behind them.
    """

    add_bos: bool
    add_eos: bool
    chat_templates: dict[str, str]
    space_prefix: SpacePrefix
    nfc: bool
    lstrip_ids: frozenset[int]
    rstrip_ids: frozenset[int]


def read_settings(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> TokenizerSettings:
    """Read and check them; FormatError names the key at fault."""
    llama = vocabulary.model == "llama"
    default_bos = True if llama else find_pre_tokenizer(read_value(metadata, "pre", str)).add_bos
    normalizer = _choice(metadata, "normalizer", ("NFC",))
    prefixes = llama and _flag(metadata, "add_space_prefix", True)
    first = _choice(metadata, "space_prefix", ("first",)) is not None
    return TokenizerSettings(
        add_bos=_add_bos(metadata, vocabulary, default_bos),
        add_eos=_flag(metadata, "add_eos_token", False),
        chat_templates=_chat_templates(metadata),
        space_prefix=("first" if first else "always") if prefixes else "never",
        nfc=normalizer is not None,
        lstrip_ids=frozenset(_ids(metadata, "lstrip_ids", vocabulary, [])),
        rstrip_ids=frozenset(_ids(metadata, "rstrip_ids", vocabulary, _phi3_ids(metadata, vocabulary))),
    )


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = read_value(metadata, name, bool)
    return default if value is None else value


def _add_bos(metadata: Mapping[str, Any], vocabulary: Vocabulary, default: bool) -> bool:
    """Whether prompts start with BOS; FormatError if the file asks for one that it does not name."""
    asked = _flag(metadata, "add_bos_token", False)
    if asked and vocabulary.bos_id is None:
        raise FormatError(f"{KEY}add_bos_token is true, but there is no {KEY}bos_token_id")
    return _flag(metadata, "add_bos_token", default) and vocabulary.bos_id is not None


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    key = "tokenizer.chat_template"
    names = {
        name: name.removeprefix(key).removeprefix(".") for name in metadata if name == key or name.startswith(key + ".")
    }
    for name in names:
        if not isinstance(metadata[name], str):
            raise FormatError(f"{name} is {shown(str(metadata[name]))}, not a string")
    return {short: metadata[name] for name, short in names.items()}


def _choice(metadata: Mapping[str, Any], name: str, known: tuple[str, ...]) -> str | None:
    value = metadata.get(PINFER_KEY + name)
    if value is None or value in known:
        return value
    raise FormatError(f"{PINFER_KEY}{name} is {shown(str(value))}; known is {', '.join(known)}")


def _ids(metadata: Mapping[str, Any], name: str, vocabulary: Vocabulary, default: list[int]) -> list[int]:
    value = metadata.get(PINFER_KEY + name)
    if value is None:
        return default
    size = len(vocabulary.tokens)
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < size for item in value):
        raise FormatError(f"{PINFER_KEY}{name} is no list of token ids below {size}")
    return value


def _phi3_ids(metadata: Mapping[str, Any], vocabulary: Vocabulary) -> list[int]:
    """Phi-3's special tokens swallow the whitespace behind them; GGUF has no key for that, so its name tells."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return []
    special = vocabulary.ids_of_type(TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNKNOWN)
    return [i for i in special if vocabulary.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>")]
