"""Text to token ids and back, built from the metadata of a GGUF file.

Token ids are those of llama.cpp, and of the model's own tokenizer where the metadata says what
llama.cpp has no key for. Decoding is the exact inverse of encoding, byte for byte, with two
exceptions that lie in the models: SentencePiece writes a space as "▁" (U+2581), so for models
"llama" a literal "▁" in a text comes back as a space; and where `tokenizer.pinfer.normalizer` is
"NFC" the composed text comes back, as the model was trained on that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, SupportsIndex

from tokenizers import normalizers

from pinfer.formats.detokenizer import Detokenizer, StreamingDetokenizer
from pinfer.formats.errors import FormatError, shown
from pinfer.formats.tokenizer_bpe import BpeModel, find_pre_tokenizer
from pinfer.formats.tokenizer_settings import TokenizerSettings, read_settings
from pinfer.formats.tokenizer_special import SpecialSplitter
from pinfer.formats.tokenizer_spm import SpmModel
from pinfer.formats.tokenizer_vocab import KEY, TokenType, Vocabulary, read_strings, read_value, read_vocabulary

__all__ = ["StreamingDetokenizer", "Tokenizer", "load_tokenizer"]

_NFC = normalizers.NFC()  # of the Unicode version that the models' own tokenizers have


class _TextModel(Protocol):
    def encode(self, text: str, at_start: bool) -> list[int]: ...


class Tokenizer:
    """The tokenizer of one model; made by `load_tokenizer`.

    `add_bos` and `add_eos` say what the model wants around a text; `encode` follows the former,
    the latter is for whoever builds training or embedding inputs. `eog_ids` end a generation.
    `control_tokens` are ids by text; `named_tokens` are the texts behind the names that chat
    templates use (bos_token, eos_token, unk_token).
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        model: _TextModel,
        detokenizer: Detokenizer,
        settings: TokenizerSettings,
    ) -> None:
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eog_ids = vocabulary.eog_ids
        self.add_bos = settings.add_bos
        self.add_eos = settings.add_eos
        self.chat_templates = settings.chat_templates
        self.chat_template = settings.chat_templates.get("")
        self._nfc = settings.nfc
        self._prefix_inside = settings.space_prefix != "first"
        self._tokens = vocabulary.tokens
        self.control_tokens = {self._tokens[i]: i for i in vocabulary.ids_of_type(TokenType.CONTROL)}
        self.named_tokens = _named_tokens(vocabulary)
        self._model = model
        self._detokenizer = detokenizer
        user_defined = vocabulary.ids_of_type(TokenType.USER_DEFINED)
        special = vocabulary.ids_of_type(TokenType.USER_DEFINED, TokenType.CONTROL, TokenType.UNKNOWN)
        # Plain text keeps every byte, so only parsed special tokens may swallow what is behind them.
        self._split_added = SpecialSplitter({self._tokens[i]: i for i in user_defined})
        self._split_special = SpecialSplitter(
            {self._tokens[i]: i for i in special}, settings.lstrip_ids, settings.rstrip_ids
        )

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """The ids of `text`, behind a BOS token if `add_bos` (None: if the model asks for one).

        Text that spells a control token, such as "<end_of_turn>", is plain text unless
        `parse_special`. Raises ValueError for a lone surrogate, which no UTF-8 can carry, and for
        `add_bos` where the model has no BOS token.
        """
        _check_unicode(text)
        ids: list[int] = []
        if self.add_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise ValueError("add_bos was asked for, but this model has no BOS token")
            ids.append(self.bos_id)
        splitter = self._split_special if parse_special else self._split_added
        return ids + self._encode_parts(splitter.split(text))

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """The ids of texts that follow each other: (text, True) is one control token, (text, False) holds none.

        No BOS is added. ValueError for a control token that the vocabulary lacks.
        """
        parts: list[int | str] = []
        for text, control in pieces:
            if not control:
                _check_unicode(text)
                parts.extend(self._split_added.split(text))
            elif text in self.control_tokens:
                parts.append(self.control_tokens[text])
            else:
                raise ValueError(f"{shown(text)} is no control token of this vocabulary")
        return self._encode_parts(self._split_special.stripped(parts))

    def _encode_parts(self, parts: Iterable[int | str]) -> list[int]:
        """Ids as they are, and the stretches between them encoded."""
        ids: list[int] = []
        at_start = True
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._model.encode(self._normalized(part), at_start))
            at_start = isinstance(part, int) and self._prefix_inside
        return ids

    def _normalized(self, text: str) -> str:
        """Only stretches between special tokens: "<|im_end|>" would else compose with an accent behind it."""
        return _NFC.normalize_str(text) if self._nfc else text

    def decode(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> str:
        """The text of `ids`, with U+FFFD for bytes that are no UTF-8; ValueError for an id outside the vocabulary.

        `skip_special` leaves out control and unknown tokens, which else appear as their texts.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[SupportsIndex], *, skip_special: bool = False) -> bytes:
        """The bytes of `ids`; `decode_bytes(encode(text, add_bos=False)) == text.encode()`."""
        return b"".join(self._detokenizer.pieces(ids, skip_special))

    def stream(self, *, skip_special: bool = False, after: Sequence[int] = ()) -> StreamingDetokenizer:
        """A decoder of ids as they are generated, which continue the text of `after`."""
        return StreamingDetokenizer(self._detokenizer, skip_special=skip_special, after=after)

    def token_text(self, token_id: SupportsIndex) -> str:
        """The token as the vocabulary spells it, such as "▁the" or "Ġthe"; ValueError for an id outside it."""
        return self._tokens[self._detokenizer.check_id(token_id)]


def load_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that the `tokenizer.ggml.*` keys of a GGUF file describe.

    Models "llama" (SentencePiece BPE) and "gpt2" (byte-level BPE) are supported. Raises
    FormatError, whose message starts with the key, for any other and for a faulty vocabulary.
    """
    kind = read_value(metadata, "model", str)
    if kind not in (None, "llama", "gpt2"):
        raise FormatError(f"{KEY}model {shown(kind)} is not supported; 'llama' and 'gpt2' are")
    vocabulary = read_vocabulary(metadata)
    settings = read_settings(metadata, vocabulary)
    if vocabulary.model == "llama":
        model: _TextModel = SpmModel(vocabulary, settings.space_prefix != "never")
    else:
        pre = find_pre_tokenizer(read_value(metadata, "pre", str))
        model = BpeModel(vocabulary, read_strings(metadata, "merges"), pre)
    return Tokenizer(vocabulary, model, Detokenizer(vocabulary, settings.space_prefix), settings)


def _named_tokens(vocabulary: Vocabulary) -> dict[str, str]:
    ids = {"bos_token": vocabulary.bos_id, "eos_token": vocabulary.eos_id, "unk_token": vocabulary.unk_id}
    return {name: vocabulary.tokens[i] for name, i in ids.items() if i is not None}


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"text holds the lone surrogate U+{code:04X} at index {error.start}; it is not Unicode"
        ) from None
