"""Causal attention over a cache of keys and values, in torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
    """Store T tokens' keys and values at positions start, start + 1, … and attend over all stored so far.

    query:        float32 [T, heads, head_dim].
    key, value:   float32 [T, kv_heads, head_dim]; heads / kv_heads queries share each of them.
    keys, values: float32 [kv_heads, context, head_dim], written in place.
    start:        int64 [1], on the device: a recorded program reads it anew.
    window:       positions seen, the own included; None sees all.
    softcap:      scores become softcap · tanh(score / softcap) before the softmax (Gemma 2); None leaves them.

    Returns float32 [T, heads, head_dim].
    """
    check_inputs(query, key, value, keys, values, start, softcap)
    first, tokens = int(start), query.shape[0]
    end = first + tokens
    keys[:, first:end] = key.transpose(0, 1)
    values[:, first:end] = value.transpose(0, 1)
    seen_from = 0 if window is None else max(0, first - window + 1)  # nothing earlier is seen by any token
    age = torch.arange(first, end)[:, None] - torch.arange(seen_from, end)[None, :]
    visible = age >= 0 if window is None else (age >= 0) & (age < window)
    if softcap is not None:
        seen = slice(seen_from, end)
        return _capped(query, keys[:, seen], values[:, seen], visible.to(query.device), scale, softcap)
    mixed = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys[None, :, seen_from:end],
        values[None, :, seen_from:end],
        attn_mask=visible.to(query.device),
        scale=scale,
        enable_gqa=True,
    )
    return mixed[0].transpose(0, 1).contiguous()


def _capped(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, visible: torch.Tensor, scale: float, cap: float
) -> torch.Tensor:
    """Attention with capped scores, which torch's fused one has not: keys and values [kv_heads, S, head_dim]."""
    tokens, heads, head_dim = query.shape
    kv_heads, positions, _ = keys.shape
    rows = query.transpose(0, 1).reshape(kv_heads, -1, head_dim)  # the queries that share a key head
    scores = (rows @ keys.transpose(1, 2) * scale).view(heads, tokens, positions)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~visible, float("-inf"))
    mixed = scores.softmax(dim=-1).view(kv_heads, -1, positions) @ values
    return mixed.view(heads, tokens, head_dim).transpose(0, 1).contiguous()


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    softcap: float | None = None,
) -> None:
    """ValueError unless the shapes belong together and the tokens fit; every implementation calls it.

    Only a start in CPU memory is looked at: a GPU's would have to be waited for.
    """
    tokens, heads, head_dim = query.shape
    kv_heads, context, _ = keys.shape
    if key.shape != (tokens, kv_heads, head_dim) or value.shape != key.shape or heads % kv_heads:
        raise ValueError(f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)} do not match")
    if keys.shape != values.shape or keys.shape[2] != head_dim:
        raise ValueError(f"the cache is {list(keys.shape)} and {list(values.shape)}, expected head_dim {head_dim}")
    if start.dtype != torch.int64 or start.numel() != 1:
        raise ValueError(f"start is {start.dtype} {list(start.shape)}, expected torch.int64 [1]")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}, expected a finite number above 0, or None")
    if tokens > context:
        raise ValueError(f"{tokens} tokens do not fit the context of {context}")
    if start.device.type != "cpu":
        return
    if not 0 <= int(start) <= context - tokens:
        raise ValueError(f"{int(start) + tokens} tokens do not fit the context of {context}")
