"""attention: causal, over a cache that it also writes; grouped keys, an optional window."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.attention.reference import attention as reference
from pinfer.kernels.registry import Op


def _make_inputs(
    generator: torch.Generator,
    *,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    start: int,
    window: int | None = None,
    softcap: float | None = None,
    room: int = 3,
) -> dict[str, Any]:
    cache = (kv_heads, start + tokens + room, head_dim)
    return {
        "query": cases.random_floats(generator, tokens, heads, head_dim),
        "key": cases.random_floats(generator, tokens, kv_heads, head_dim),
        "value": cases.random_floats(generator, tokens, kv_heads, head_dim),
        "keys": cases.random_floats(generator, *cache),
        "values": cases.random_floats(generator, *cache),
        "start": torch.tensor([start], device=generator.device),
        "scale": head_dim**-0.5,
        "window": window,
        "softcap": softcap,
    }


def _bytes_moved(
    query: torch.Tensor, key: torch.Tensor, start: torch.Tensor, window: int | None = None, **_: Any
) -> int:
    seen = int(start) + query.shape[0]
    seen = seen if window is None else min(seen, window + query.shape[0] - 1)
    return 4 * (2 * seen * key.shape[1] * key.shape[2] + 2 * query.numel() + 2 * key.numel())


OP = Op(
    name="attention",
    reference=reference,
    triton="pinfer.kernels.attention.gpu:attention",
    cpu="pinfer.kernels.attention.cpu:attention",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "heads": 4, "kv_heads": 4, "head_dim": 32, "start": 0},
        {"tokens": 1, "heads": 6, "kv_heads": 2, "head_dim": 20, "start": 37},
        {"tokens": 1, "heads": 4, "kv_heads": 1, "head_dim": 64, "start": 40, "window": 9},
        {"tokens": 1, "heads": 7, "kv_heads": 1, "head_dim": 64, "start": 150},
        {"tokens": 1, "heads": 3, "kv_heads": 3, "head_dim": 16, "start": 40, "window": 1},
        {"tokens": 1, "heads": 32, "kv_heads": 2, "head_dim": 24, "start": 33},
        {"tokens": 2, "heads": 6, "kv_heads": 2, "head_dim": 24, "start": 70, "window": 50},
        {"tokens": 5, "heads": 4, "kv_heads": 2, "head_dim": 31, "start": 3, "window": 4},
        {"tokens": 16, "heads": 2, "kv_heads": 2, "head_dim": 16, "start": 0},
        {"tokens": 19, "heads": 2, "kv_heads": 1, "head_dim": 16, "start": 2, "window": 7},
        {"tokens": 45, "heads": 3, "kv_heads": 1, "head_dim": 20, "start": 21, "room": 0},
        *(
            {"tokens": tokens, "heads": 4, "kv_heads": 2, "head_dim": 24, "start": 37, "window": window, "softcap": cap}
            for tokens, window, cap in ((1, None, 50.0), (1, 9, 0.3), (3, None, 1.0), (19, 7, 0.7))
        ),
        {"tokens": 140, "heads": 1, "kv_heads": 1, "head_dim": 8, "start": 3, "window": 30, "softcap": 2.0},
    ),
    bench_cases=({"tokens": 1, "heads": 32, "kv_heads": 32, "head_dim": 128, "start": 1000},),
    bytes_moved=_bytes_moved,
    tolerance=2e-6,
)
