"""Decode steps of the shipped model: dense, sparse (exact), and the two-shard hybrid, in one group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pinfer.config import RunConfig
from pinfer.engine import load_engine

RUNS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "exact": {"method": "exact"},
    "hybrid": {"method": "exact", "cold_fraction": 0.5},
}
PROMPT = "The function returns the number of bytes that were written to the file, or"


@pytest.mark.parametrize("name", RUNS)
def bench_decode_step(benchmark: BenchmarkFixture, name: str) -> None:
    engine = load_engine(RunConfig(**RUNS[name]))
    tokens = torch.tensor(engine.tokenizer.encode(PROMPT))

    def prefilled() -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = engine.model.new_cache()
        with engine.computing():
            engine.model(tokens, cache)
        return (cache,), {}

    def steps(cache: Any) -> None:
        with engine.computing():
            for token in tokens[:8]:
                engine.model(token[None], cache)

    benchmark.group = "decode 8 tokens, shipped model"
    benchmark.pedantic(steps, setup=prefilled, rounds=15, warmup_rounds=2)
