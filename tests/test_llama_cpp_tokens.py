"""Tokenizers of folders, written as GGUF, in llama.cpp: the same ids but where it has no key for what differs.

Needs llama-cpp-python, in this environment or in that of the interpreter $PINFER_LLAMA_PYTHON.
"""

from __future__ import annotations

import json
import subprocess
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from pinfer.formats.gguf_writer import write_gguf
from pinfer.formats.huggingface.tokenizer import tokenizer_metadata
from pinfer.formats.tokenizer import load_tokenizer
from tests.hf_tokenizers import FAMILIES
from tests.test_llama_cpp import INTERPRETER

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(INTERPRETER is None, reason="no llama-cpp-python; $PINFER_LLAMA_PYTHON names an interpreter"),
]
MARKED = ["<s>a</s> b", "<|im_start|>user\nhi<|im_end|>", "[INST] x [/INST] y", "<|user|>\n hi<|end|>\n", "a<table>"]
ROWS = 960
SHAPE = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32}
SHAPE |= {"attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-5, "vocab_size": ROWS}


def texts() -> list[str]:
    path = Path(__file__).parent / "data" / "tricky_strings.json"
    return [*json.loads(path.read_text(encoding="utf-8")), *MARKED]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], list[list[list[int]]]]]:
    """By family: our metadata, and llama.cpp's ids of each text."""
    folder = tmp_path_factory.mktemp("tokens")
    jobs, written = [], {}
    for name, build in FAMILIES.items():
        build(folder / name)
        written[name] = tokenizer_metadata(folder / name, vocab_size=ROWS)
        head = {"general.architecture": "llama"} | {f"llama.{key}": value for key, value in SHAPE.items()}
        write_gguf(folder / f"{name}.gguf", head | written[name], [])
        jobs.append([str(folder / f"{name}.gguf"), texts()])
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).with_name("llama_cpp_tokens.py")
    command = [str(INTERPRETER), str(script), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (metadata, ids) for (name, metadata), ids in zip(written.items(), lines, strict=True)}


def differs(metadata: dict[str, Any], text: str) -> bool:
    """Whether llama.cpp lacks what this text needs: composition, tokens that swallow spaces, a prefix at the start."""
    composed = metadata.get("tokenizer.pinfer.normalizer") and not unicodedata.is_normalized("NFC", text)
    special = any(mark in text for mark in ("<s>", "</s>", "[INST]", "<unk>"))
    prefixed = metadata.get("tokenizer.pinfer.space_prefix") and special
    return bool(composed or prefixed or (metadata.get("tokenizer.pinfer.rstrip_ids") and "<|user|>" in text))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_ids_there(name: str, answers: dict[str, tuple[dict[str, Any], list[list[list[int]]]]]) -> None:
    metadata, theirs = answers[name]
    tokenizer = load_tokenizer(metadata)
    compared = 0
    for text, (plain, special) in zip(texts(), theirs, strict=True):
        if not differs(metadata, text):
            compared += 1
            assert tokenizer.encode(text, add_bos=False) == plain, text
            assert tokenizer.encode(text, parse_special=True) == special, text
    assert compared > 100
