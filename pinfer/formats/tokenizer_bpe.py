"""Byte-level BPE (`tokenizer.ggml.model` "gpt2"), on top of the `tokenizers` library.

Every byte has a printable stand-in character, tokens and merges are spelled in these, and a
pre-tokenizer splits the text into the words that merges stay within.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.tokenizer_pre import PRE_TOKENIZERS, PreTokenizer
from pinfer.formats.tokenizer_vocab import KEY, TokenType, Vocabulary


def _stand_ins() -> list[str]:
    """The character that stands for each byte: itself if Latin-1 can show it, else one from U+0100 on."""
    shown_bytes = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown_bytes]
    return [chr(byte) if byte in shown_bytes else chr(0x100 + hidden.index(byte)) for byte in range(256)]


BYTE_TO_CHAR = _stand_ins()
# Words begin there in every row of tokenizer_pre.py but those that `joins_words`: a space before a
# letter goes with it, and a single newline ends what is before it. Parts repeat, and looking one
# up is five times as fast as splitting it by the patterns.
WORD_START = re.compile(r"(?= [A-Za-z])|(?<=\S\n)(?=[A-Za-z])")
_CACHED_PARTS = 1 << 16
_CACHED_LENGTH = 64
CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


class BpeModel:
    """Text to ids for byte-level BPE.

    llama.cpp lets a merge produce a text that is no token and spells that as bytes in the end;
    `tokenizers` demands a token. Such texts therefore get ids behind the vocabulary (`_spelled`).
    """

    def __init__(self, vocabulary: Vocabulary, merges: list[str], pre: PreTokenizer) -> None:
        pairs = split_merges(merges)
        ids = _mergeable(vocabulary)
        extra = _texts_without_token(ids, pairs)
        size = len(vocabulary.tokens)
        self._size = size
        self._char_ids = {char: ids.get(char) for char in BYTE_TO_CHAR}
        self._spelled = {size + index: text for index, text in enumerate(extra)}
        ids |= {text: token_id for token_id, text in self._spelled.items()}
        self._tokenizer = Tokenizer(models.BPE(ids, pairs, ignore_merges=pre.ignore_merges))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
        self._cut = None if pre.joins_words else WORD_START
        self._cache: dict[str, list[int]] = {}
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])

    def encode(self, text: str, at_start: bool) -> list[int]:
        """The ids of `text`; byte-level BPE does not care where it stands (`at_start`)."""
        ids: list[int] = []
        cache = self._cache
        for part in self._cut.split(text) if self._cut else [text]:
            cached = cache.get(part)
            ids.extend(self._encode_part(part) if cached is None else cached)
        return ids

    def _encode_part(self, part: str) -> list[int]:
        ids = self._encode_words(part)
        if len(part) <= _CACHED_LENGTH:
            if len(self._cache) >= _CACHED_PARTS:
                self._cache.clear()
            self._cache[part] = ids
        return ids

    def _encode_words(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not self._spelled or max(ids, default=0) < self._size:
            return ids
        return [spelled for token_id in ids for spelled in self._spell(token_id)]

    def _spell(self, token_id: int) -> list[int]:
        """`token_id` itself, or the bytes of a text that is no token.

        A byte without a token is dropped, as by llama.cpp and the models' own tokenizers: Falcon
        has none for 14 control characters, others lack only bytes that UTF-8 never uses.
        """
        if token_id < self._size:
            return [token_id]
        spelled = (self._char_ids[char] for char in self._spelled[token_id])
        return [char_id for char_id in spelled if char_id is not None]


def find_pre_tokenizer(name: str | None) -> PreTokenizer:
    """The row of `tokenizer.ggml.pre`; a file without that key gets llama.cpp's default."""
    try:
        return PRE_TOKENIZERS["default" if name is None else name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise FormatError(f"{KEY}pre is {shown(str(name))}, which is not supported; known are {known}") from None


def _mergeable(vocabulary: Vocabulary) -> dict[str, int]:
    """The tokens that text may become: never control tokens, nor added tokens that are not spelled in stand-ins."""
    types = vocabulary.types
    kept = (TokenType.NORMAL, TokenType.UNUSED, TokenType.UNDEFINED)
    return {
        text: i
        for text, i in vocabulary.ids.items()
        if types[i] in kept or (types[i] == TokenType.USER_DEFINED and text.isascii())
    }


def split_merges(merges: Iterable[str]) -> list[tuple[str, str]]:
    """Each "left right" as a pair, the first of equals kept; FormatError naming a malformed one."""
    pairs: dict[tuple[str, str], None] = {}
    for index, merge in enumerate(merges):
        left, _, right = merge.partition(" ")
        if not left or not right or " " in right:
            raise FormatError(f"{KEY}merges[{index}] is {shown(merge)}, not two texts with a space between them")
        pairs[left, right] = None
    return list(pairs)


def _texts_without_token(ids: dict[str, int], pairs: list[tuple[str, str]]) -> list[str]:
    """Bytes and texts of merges that are no tokens, in a fixed order; FormatError for one that no bytes spell."""
    spelled = {*BYTE_TO_CHAR, *(left for left, _ in pairs), *(right for _, right in pairs), *map("".join, pairs)}
    missing = sorted(spelled - ids.keys())
    for text in missing:
        if not all(char in CHAR_TO_BYTE for char in text):
            raise FormatError(f"{KEY}merges uses {shown(text)}, which is neither a token nor made of byte characters")
    return missing
