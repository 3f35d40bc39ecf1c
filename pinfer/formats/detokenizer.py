"""Ids back to text: the bytes of each token, whole sequences, and streams that never show half a character."""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.tokenizer_bpe import CHAR_TO_BYTE
from pinfer.formats.tokenizer_spm import SPACE
from pinfer.formats.tokenizer_vocab import KEY, TokenType, Vocabulary

_BYTE_TEXT = re.compile("<0x([0-9A-Fa-f]{2})>")
_SPECIAL = (TokenType.CONTROL, TokenType.UNKNOWN)
_CUT_OUT = (TokenType.CONTROL, TokenType.USER_DEFINED)


class Detokenizer:
    """The bytes of tokens of one vocabulary.

    The encoder of Llama-like models puts a space before text that starts a prompt or follows a
    special token (`space_prefix` "always", or "first" for the former alone); it is taken away again
    in the same places.
    """

    def __init__(self, vocabulary: Vocabulary, space_prefix: str) -> None:
        self._tokens = vocabulary.tokens
        self._types = vocabulary.types
        self._byte_level = vocabulary.model == "gpt2"
        self.strips_space = space_prefix != "never"
        self._bos_id = vocabulary.bos_id
        self._strips_inside = space_prefix == "always"
        self._pieces: dict[int, bytes] = {}
        self._byte_values = {
            token_id: self._byte_value(token_id) for token_id in vocabulary.ids_of_type(TokenType.BYTE)
        }

    def check_id(self, token_id: SupportsIndex) -> int:
        """`token_id` as an int; ValueError unless the vocabulary has it."""
        index = operator.index(token_id)
        if not 0 <= index < len(self._tokens):
            raise ValueError(f"token id {index} is outside the vocabulary of {len(self._tokens)} tokens")
        return index

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special` leaves the token out: control and unknown tokens."""
        return self._types[token_id] in _SPECIAL

    def space_follows(self, token_id: int) -> bool:
        """Whether the encoder puts a space before text that follows this token (BOS: the text is the first)."""
        if self._strips_inside:
            return self._types[token_id] in _CUT_OUT
        return self.strips_space and token_id == self._bos_id

    def piece(self, token_id: int) -> bytes:
        """The bytes of one token, wherever it stands."""
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make_piece(token_id)
        return piece

    def pieces(self, ids: Iterable[SupportsIndex], skip_special: bool, after: int | None = None) -> Iterable[bytes]:
        """The bytes of each of `ids`, which follow the token `after` (None: they start the text)."""
        strip = self.strips_space if after is None else self.space_follows(after)
        for item in ids:
            token_id = self.check_id(item)
            piece = self.piece(token_id)
            if strip and piece.startswith(b" ") and not self.is_special(token_id):
                piece = piece[1:]
            strip = self.space_follows(token_id)
            yield b"" if skip_special and self.is_special(token_id) else piece

    def _make_piece(self, token_id: int) -> bytes:
        text, kind = self._tokens[token_id], self._types[token_id]
        if kind == TokenType.BYTE:
            return self._byte_values[token_id]
        if kind in _SPECIAL or (kind == TokenType.USER_DEFINED and self._byte_level):
            return text.encode()
        if not self._byte_level:
            return text.replace(SPACE, " ").encode()
        # A character that stands for no byte is spelled out: nothing better is known of it.
        return b"".join(bytes([CHAR_TO_BYTE[char]]) if char in CHAR_TO_BYTE else char.encode() for char in text)

    def _byte_value(self, token_id: int) -> bytes:
        text = self._tokens[token_id]
        match = _BYTE_TEXT.fullmatch(text)
        if match is None:
            raise FormatError(
                f"{KEY}tokens[{token_id}] is {shown(text)}, not a byte like <0x0A>, though its type says so"
            )
        return bytes([int(match[1], 16)])


class StreamingDetokenizer:
    """Text of a growing sequence of ids; a character appears once all its bytes have.

    Everything pushed and flushed adds up to `Tokenizer.decode` of the same ids. `after` is what
    stands before them, as a prompt does before generated tokens: it decides whether a leading
    space belongs to the text.
    """

    def __init__(self, detokenizer: Detokenizer, *, skip_special: bool = False, after: Sequence[int] = ()) -> None:
        self._detokenizer = detokenizer
        self._skip_special = skip_special
        self._last = detokenizer.check_id(after[-1]) if len(after) else None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: SupportsIndex) -> str:
        """The characters that `token_id` completes, perhaps none; ValueError for an id outside the vocabulary."""
        piece = b"".join(self._detokenizer.pieces([token_id], self._skip_special, self._last))
        self._last = operator.index(token_id)
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """The end of the text: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
