"""Inputs that the ops' tests and benchmarks are made of.

Random blocks of any type, cheap at any size: the scale fields are set so that the weights have
about unit variance over √columns, the quants are uniform bits.
"""

from __future__ import annotations

import math

import torch

from pinfer.quant import BF16, BY_NAME, F16, F32, QuantTensor, QuantType

BENCH_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")

# Where each type keeps its fp16 scale and (or None) its fp16 minimum, and the root mean square of
# what the scale multiplies when every other bit is random.
_SCALES: dict[str, tuple[int, int | None, float]] = {
    "Q8_0": (0, None, 74),
    "Q4_0": (0, None, 4.6),
    "Q4_1": (0, 2, 8.8),
    "Q5_0": (0, None, 9.2),
    "Q5_1": (0, 2, 18),
    "Q2_K": (80, 82, 16),
    "Q3_K": (108, None, 37),
    "Q4_K": (0, 2, 322),
    "Q5_K": (0, 2, 650),
    "Q6_K": (208, None, 1365),
    "IQ4_NL": (0, None, 70),
    "IQ4_XS": (0, None, 1300),
}


def columns_for(name: str) -> int:
    """A width that is awkward for kernels yet whole in blocks: odd where the type allows it."""
    size = BY_NAME[name].block_size
    return {1: 123, 32: 96, 256: 512}[size]


def random_blocks(generator: torch.Generator, kind: QuantType, rows: int, columns: int) -> QuantTensor:
    """A random QuantTensor on the generator's device."""
    device = generator.device
    if kind in (F32, F16, BF16):
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind.name]
        dense = torch.randn(rows, columns, generator=generator, device=device) / math.sqrt(columns)
        return QuantTensor.from_dense(dense.to(dtype))
    shape = (rows * columns // kind.block_size, kind.block_bytes)
    blocks = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
    at, minimum_at, spread = _SCALES[kind.name]
    _set_halves(blocks, at, generator, 1 / (spread * math.sqrt(columns)))
    if minimum_at is not None:
        sign = -1 if kind.name in ("Q4_1", "Q5_1") else 1  # these two add their minimum
        _set_halves(blocks, minimum_at, generator, sign / math.sqrt(columns) * (1 if sign < 0 else 1 / 32))
    return QuantTensor(blocks.view(rows, kind.row_bytes(columns)), kind, columns)


def _set_halves(blocks: torch.Tensor, at: int, generator: torch.Generator, size: float) -> None:
    jitter = 0.5 + torch.rand(blocks.shape[0], 1, generator=generator, device=blocks.device)
    blocks[:, at : at + 2] = (size * jitter).half().view(torch.uint8)


def random_floats(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)
