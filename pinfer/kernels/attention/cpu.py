"""attention on the CPU core for a few tokens; torch's fused attention for many."""

from __future__ import annotations

import torch

from pinfer.kernels.attention.reference import attention as attention_reference
from pinfer.kernels.attention.reference import check_inputs
from pinfer.kernels.cpp.binding import Attention, floats, pointer, run

# The core reads the keys once for each token; torch's blocked attention once for many.
MANY_TOKENS = 16
CAPPED_TOKENS = 128  # at a time where scores are capped: all of them are in memory then
SCORES_PADDING = 64  # kernels.cpp writes whole vectors past a row of scores


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    tokens, heads, head_dim = query.shape
    if tokens > MANY_TOKENS:
        return _by_torch(query, key, value, keys, values, start, scale, window, softcap)
    check_inputs(query, key, value, keys, values, start, softcap)
    if not (keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype == torch.float32):
        raise ValueError("the cache must be contiguous float32")
    query, key, value = floats(query), floats(key), floats(value)
    kv_heads, context, _ = keys.shape
    out = torch.empty(query.shape)
    scores = torch.empty(torch.get_num_threads(), context + SCORES_PADDING)
    arguments = Attention(
        pointer(query), pointer(key), pointer(value), pointer(keys), pointer(values), pointer(start),
        tokens, heads, kv_heads, head_dim, context, window or 0, scale, softcap or 0.0, pointer(out), pointer(scores),
    )  # fmt: skip
    work = 2 * tokens * heads * head_dim * (int(start) + tokens)
    run(arguments, work, query, key, value, keys, values, start, out, scores)
    return out


def _by_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The reference, for many tokens."""
    check_inputs(query, key, value, keys, values, start, softcap)
    tokens = query.shape[0]
    step = tokens if softcap is None else CAPPED_TOKENS
    parts = []
    for first in range(0, tokens, step):
        some = slice(first, first + step)
        parts.append(
            attention_reference(
                query[some],
                key[some],
                value[some],
                keys,
                values,
                start + first,
                scale=scale,
                window=window,
                softcap=softcap,
            )
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts)
