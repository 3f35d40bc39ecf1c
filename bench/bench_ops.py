"""Every op of the registry on this CPU at model sizes, in groups with the torch reference.

    make bench

`extra_info` carries the bytes a perfect kernel would move and the GB/s that makes of the median.
A speed is only taken after the result has passed the op's tolerance. A 7B layer's matrices are
larger than most caches, but not all: figures to quote come from rotating weights.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from pinfer.kernels import ops
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.registry import Op
from tests.test_kernels import agrees


def all_cases() -> list[Any]:
    return [
        pytest.param(op, case, backend, id=f"{op.name}-{'-'.join(map(str, case.values()))}-{backend}")
        for op in ops.OPS
        for case in op.bench_cases
        for backend in ("reference", "cpu")
    ]


@pytest.mark.parametrize(("op", "case", "backend"), all_cases())
def bench_op(benchmark: BenchmarkFixture, op: Op, case: dict[str, Any], backend: str) -> None:
    if backend == "cpu" and core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    inputs = op.make_inputs(torch.Generator().manual_seed(1), **case)
    if backend != "reference":
        assert agrees(op, backend, inputs)
    benchmark.group = f"{op.name} {' '.join(f'{k}={v}' for k, v in case.items())}"
    run = op.implementation(backend)
    benchmark.pedantic(lambda: run(**inputs), rounds=5, warmup_rounds=1)
    n_bytes = op.bytes_moved(**inputs)
    benchmark.extra_info.update(bytes=n_bytes, gb_per_s=n_bytes / benchmark.stats.stats.median / 1e9)
