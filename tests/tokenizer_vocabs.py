"""Small vocabularies in the form of GGUF metadata, for tests of the tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
KEY = "tokenizer.ggml."
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog doesn't mind: it's 12345 degrees.",
    "def merge(left, right):\n    return left + right  # the merge of the two\n\n",
    "日本語のテキスト、中文文字。 Ünïcödé ñandú été été",
] * 4


def metadata(model: str, tokens: list[str], types: list[int], **others: Any) -> dict[str, Any]:
    """Metadata with the keys every vocabulary has, and `others` under `tokenizer.ggml.`."""
    values = {"model": model, "tokens": tokens, "token_type": types, **others}
    return {KEY + name: value for name, value in values.items()}


def spm_metadata(pieces: dict[str, float], special: Mapping[str, int] | None = None, **others: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary: <unk>, <s>, </s>, the 256 bytes, `special` (text to type) and `pieces` (to score)."""
    head = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    types = (
        head | {f"<0x{byte:02X}>": BYTE for byte in range(256)} | dict(special or {}) | dict.fromkeys(pieces, NORMAL)
    )
    scores = [pieces.get(token, 0.0) for token in types]
    return metadata("llama", list(types), list(types.values()), scores=scores, **others)


def english_spm(**others: Any) -> dict[str, Any]:
    """A SentencePiece vocabulary of a few words, with space runs of equal score and two turn marks."""
    pieces = [*"▁theowrldan", "he", "▁t", "▁the", "or", "ld", "wor", "world", "▁world"]
    scores = {piece: -float(rank) for rank, piece in enumerate(pieces)}
    scores |= {"▁" * length: -1000.0 for length in (2, 3, 4, 8)}
    return spm_metadata(scores, {"<start_of_turn>": CONTROL, "<end_of_turn>": CONTROL, "\n\n": USER_DEFINED}, **others)


@cache
def _trained_bpe() -> tuple[list[str], list[str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


def bpe_metadata(pre: str | None = "gpt-2", special: Mapping[str, int] | None = None, **others: Any) -> dict[str, Any]:
    """A byte-level BPE vocabulary trained on a few lines, with `special` tokens (text to type) behind it."""
    tokens, merges = _trained_bpe()
    if special is None:
        special = {"<|endoftext|>": CONTROL, "<|im_start|>": CONTROL, "<|im_end|>": CONTROL, "<tool>": USER_DEFINED}
    types = [NORMAL] * len(tokens) + list(special.values())
    values: dict[str, Any] = {"merges": list(merges), **others}
    return metadata("gpt2", [*tokens, *special], types, **values) | ({} if pre is None else {f"{KEY}pre": pre})
