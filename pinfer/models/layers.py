"""The layers that all families share: norm, rotary embedding, cache, attention.

Activations are float32 [T, …] for the T tokens of one sequence; weights stay in their blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from pinfer.config import ModelConfig, RopeConfig
from pinfer.kernels.ops import quant_matmul
from pinfer.models.weights import WeightSource
from pinfer.quant import QuantTensor


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


ROPE_POSITIONS = 1024  # tabulated at first


class Rope(nn.Module):
    """Rotary embedding (Su et al. 2021); the table of cos and sin grows with the positions asked for.

    `factors` float32 [dim / 2] divides the frequencies (Llama 3's long-context scaling).
    """

    def __init__(self, config: RopeConfig, factors: torch.Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.interleaved = config.dim, config.style == "interleaved"
        frequency = config.base ** (-torch.arange(0, config.dim, 2, dtype=torch.float64) / config.dim) / config.scale
        self.frequency = frequency if factors is None else frequency / factors.double()  # float64 [dim / 2]
        self._tabulate(ROPE_POSITIONS)

    def _tabulate(self, positions: int) -> None:
        angle = torch.outer(torch.arange(positions, dtype=torch.float64), self.frequency)
        self.cos, self.sin = angle.cos().float()[:, None], angle.sin().float()[:, None]  # [positions, 1, dim / 2]

    def forward(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate x [T, heads, head_dim], the tokens at positions start, start + 1, …"""
        end = start + x.shape[0]
        if end > self.cos.shape[0]:
            self._tabulate(2 * end)
        cos, sin = self.cos[start:end], self.sin[start:end]
        rotated, rest = x[..., : self.dim], x[..., self.dim :]
        if self.interleaved:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
        else:
            a, b = rotated.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


class KVCache:
    """Keys and values of one sequence: per layer [2, kv_heads, context, head_dim], and how many positions are filled.

    Memory is reserved for the whole context and taken page by page as it fills.
    """

    def __init__(self, config: ModelConfig, context: int) -> None:
        shape = (2, config.n_kv_heads, context, config.head_dim)
        self.layers = [torch.empty(shape) for _ in range(config.n_layers)]
        self.context = context
        self.length = 0

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Store keys and values [T, kv_heads, head_dim] after `length`; returns all of them [2, kv_heads, S, head_dim]."""
        end = self.length + keys.shape[0]
        if end > self.context:
            raise ValueError(f"{end} tokens do not fit the context of {self.context}")
        cache = self.layers[layer]
        cache[0, :, self.length : end] = keys.transpose(0, 1)
        cache[1, :, self.length : end] = values.transpose(0, 1)
        return cache[:, :, :end]


@dataclass(frozen=True)
class AttentionWeights:
    """query [H · head_dim, D], key and value [KV · head_dim, D], output [D, H · head_dim]; norms [head_dim] or None."""

    query: QuantTensor
    key: QuantTensor
    value: QuantTensor
    output: QuantTensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None

    @classmethod
    def load(cls, weights: WeightSource, prefix: str) -> AttentionWeights:
        """The attention of layer `prefix` ("blk.3."), with QK norms where the file has them."""

        def matrix(name: str) -> QuantTensor:
            return weights.tensor(f"{prefix}attn_{name}.weight")

        def norm(name: str) -> torch.Tensor | None:
            full = f"{prefix}attn_{name}_norm.weight"
            return weights.vector(full) if weights.has(full) else None

        return cls(matrix("q"), matrix("k"), matrix("v"), matrix("output"), norm("q"), norm("k"))


class Attention(nn.Module):
    """Causal self-attention over a cache, with grouped keys, an optional window and optional QK norm."""

    def __init__(self, weights: AttentionWeights, config: ModelConfig, layer: int, rope: Rope) -> None:
        super().__init__()
        self.weights, self.config, self.layer, self.rope = weights, config, layer, rope
        self.window = config.sliding_window if config.is_sliding(layer) else None
        norms = (weights.query_norm, weights.key_norm)
        self.query_norm, self.key_norm = (None if n is None else RMSNorm(n, config.norm_eps) for n in norms)

    def forward(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """x: float32 [T, D], the tokens after `cache.length`; returns float32 [T, D]."""
        query, key = self._heads(x, self.weights.query), self._heads(x, self.weights.key)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = self.rope(query, cache.length), self.rope(key, cache.length)
        keys, values = cache.append(self.layer, key, self._heads(x, self.weights.value))
        mixed = self._attend(query.transpose(0, 1), keys, values, cache.length)
        return quant_matmul(mixed.transpose(0, 1).reshape(x.shape[0], -1), self.weights.output)

    def _heads(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return quant_matmul(x, weight).view(x.shape[0], -1, self.config.head_dim)

    def _attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
        """query [heads, T, head_dim] from position `start` over keys, values [kv_heads, S, head_dim]."""
        tokens, first = query.shape[1], 0
        if self.window is not None:
            first = max(0, start - self.window + 1)  # nothing earlier is seen by any of these tokens
            keys, values = keys[:, first:], values[:, first:]
        if tokens == 1:
            return self._attend_one(query, keys, values)
        mask = self._mask(start - first, tokens, keys.shape[1])
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, scale=self.config.attention_scale, enable_gqa=True
        )[0]

    def _attend_one(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """One token sees everything kept: the heads of a group go through its keys together, which reads them once."""
        grouped = query.view(keys.shape[0], -1, self.config.head_dim)  # [kv_heads, group, head_dim]
        mixed = F.scaled_dot_product_attention(
            grouped[None], keys[None], values[None], scale=self.config.attention_scale
        )
        return mixed.view(-1, 1, self.config.head_dim)

    def _mask(self, start: int, tokens: int, seen: int) -> torch.Tensor:
        """bool [T, S]: token start + i sees position j where start + i - window < j <= start + i."""
        age = (start + torch.arange(tokens))[:, None] - torch.arange(seen)[None, :]
        visible = age >= 0
        return visible if self.window is None else visible & (age < self.window)
