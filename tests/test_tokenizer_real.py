"""Tokenizers against llama.cpp's ids on real vocabularies, where these are installed."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path

import pytest

from pinfer.formats.gguf import GGUFFile
from pinfer.formats.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data"
SUPPORTED = [
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm"),
    *("mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
]
# Bytes that a vocabulary has no token for, and that are dropped: Falcon's control characters, and the
# first byte of planes 4 to 16, which lie empty but for private use.
FALCON_LACKS = bytes([3, 4, 5, 11, 17, *range(19, 24), 25, 28, 29, 30])
LACKING = {"falcon": FALCON_LACKS + b"\xf2", "refact": b"\xf1"}


def strings() -> list[str]:
    return json.loads((DATA / "tricky_strings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def gemma_tokenizer(gemma: Path) -> Tokenizer:
    return load_tokenizer(GGUFFile.open(gemma).metadata)


@pytest.mark.real_model
class TestGemma:
    def test_ids_are_those_of_llama_cpp(self, gemma_tokenizer: Tokenizer) -> None:
        expected = json.loads((DATA / "gemma3_tricky_ids.json").read_text(encoding="utf-8"))["ids"]
        got = [gemma_tokenizer.encode(text, add_bos=False) for text in strings()]
        assert got == expected

    def test_bytes_come_back(self, gemma_tokenizer: Tokenizer) -> None:
        for text in strings():
            decoded = gemma_tokenizer.decode_bytes(gemma_tokenizer.encode(text, add_bos=False))
            assert decoded == text.replace("▁", " ").encode()

    def test_what_the_file_says(self, gemma_tokenizer: Tokenizer) -> None:
        assert (gemma_tokenizer.vocab_size, gemma_tokenizer.bos_id, gemma_tokenizer.eos_id) == (262144, 2, 1)
        assert gemma_tokenizer.add_bos
        assert gemma_tokenizer.eog_ids == {1, 106}
        assert gemma_tokenizer.chat_template is None

    def test_a_closing_html_tag_is_one_token(self, gemma_tokenizer: Tokenizer) -> None:
        """As in Gemma's own tokenizer; llama.cpp 0.3.36 takes "</s>" for an end of sequence."""
        assert gemma_tokenizer.encode("</s>", add_bos=False) == [212]


@cache
def vocabulary(name: str) -> tuple[Tokenizer, list[str], list[list[int]]]:
    """A tokenizer with llama.cpp's test texts and ids for it, from the folder PINFER_TEST_VOCABS."""
    folder = os.environ.get("PINFER_TEST_VOCABS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("PINFER_TEST_VOCABS names no folder of llama.cpp's ggml-vocab-*.gguf files")
    path = Path(folder) / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        *texts, rest = file.read().split("\n__ggml_vocab_test__\n")
    assert not rest
    lines = Path(f"{path}.out").read_text(encoding="utf-8").splitlines()
    ids = [[int(token_id) for token_id in line.split()] for line in lines]
    return load_tokenizer(GGUFFile.open(path).metadata), texts, ids


@pytest.mark.real_model
@pytest.mark.parametrize("name", SUPPORTED)
class TestLlamaCppVocabularies:
    def test_golden_ids(self, name: str) -> None:
        tokenizer, texts, expected = vocabulary(name)
        assert len(texts) == len(expected)
        assert [tokenizer.encode(text, add_bos=False) for text in texts] == expected

    def test_bytes_come_back(self, name: str) -> None:
        tokenizer, texts, _ = vocabulary(name)
        for text in [*texts, *strings()]:
            expected = text.replace("▁", " ") if name in ("llama-spm", "phi-3") else text
            kept = expected.encode().translate(None, LACKING.get(name, b""))
            assert tokenizer.decode_bytes(tokenizer.encode(text, add_bos=False)) == kept
