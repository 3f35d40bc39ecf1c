"""The layers that all families share: norm, rotary embedding, cache, attention.

Activations are float32 [T, …] for the T tokens of one sequence; weights stay in their blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pinfer.config import ModelConfig, RopeConfig
from pinfer.kernels.ops import attention, quant_matmul, rms_norm, rope
from pinfer.models.weights import WeightSource
from pinfer.quant import QuantTensor


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension (Zhang & Sennrich 2019)."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: float32 [..., D]; the normed x, added to `residual` where it is given."""
        return rms_norm(x, self.weight, eps=self.eps, residual=residual)


CPU = torch.device("cpu")
ROPE_POSITIONS = 1024  # tabulated at first


class Rope(nn.Module):
    """Rotary embedding (Su et al. 2021); the table of cos and sin grows with the positions asked for.

    `factors` float32 [dim / 2] divides the frequencies (Llama 3's long-context scaling). Every device that
    rotates has a table of its own (`add_device`), the CPU always.
    """

    per_device = True  # see `models.weights`

    def __init__(self, config: RopeConfig, factors: torch.Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.interleaved = config.dim, config.style == "interleaved"
        frequency = config.base ** (-torch.arange(0, config.dim, 2, dtype=torch.float64) / config.dim) / config.scale
        self.frequency = frequency if factors is None else frequency / factors.double()  # float64 [dim / 2]
        self._tables = {CPU: (torch.empty(0), torch.empty(0))}
        self._tabulate(ROPE_POSITIONS)

    def _tabulate(self, positions: int) -> None:
        angle = torch.outer(torch.arange(positions, dtype=torch.float64), self.frequency)
        cos, sin = angle.cos().float(), angle.sin().float()  # [positions, dim / 2]
        self._tables = {device: (cos.to(device), sin.to(device)) for device in self._tables}

    @property
    def positions(self) -> int:
        """How many the tables cover."""
        return self._tables[CPU][0].shape[0]

    @property
    def nbytes(self) -> int:
        """Of one device's table."""
        return sum(table.nbytes for table in self._tables[CPU])

    def add_device(self, device: torch.device) -> None:
        """Keep a table there too."""
        cos, sin = self._tables[CPU]
        self._tables[device] = (cos.to(device), sin.to(device))

    def reserve(self, positions: int) -> None:
        """Make the tables cover this many positions; they move when they grow."""
        if positions > self.positions:
            self._tabulate(max(positions, 2 * self.positions))

    def forward(self, x: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, head_dim], the tokens at positions start (int64 [1]), start + 1, …, all within the table."""
        cos, sin = self._tables[x.device]
        return rope(x, cos, sin, start, interleaved=self.interleaved)


class KVCache:
    """Keys and values of one sequence: per layer [2, kv_heads, context, head_dim], and how many positions are filled.

    Memory is reserved for the whole context; the CPU's is taken page by page as it fills. `position` int64 [1]
    holds the number of filled positions where kernels read it, once on the CPU and once on each of the `devices`
    that layers lie on (one a layer; None: all on the CPU).
    """

    def __init__(self, config: ModelConfig, context: int, devices: Sequence[torch.device] | None = None) -> None:
        shape = (2, config.n_kv_heads, context, config.head_dim)
        devices = devices or [CPU] * config.n_layers
        self.layers = [torch.empty(shape, device=device) for device in devices]
        self.context = context
        with torch.inference_mode(False):  # they are set outside of inference as well
            self.position = torch.zeros(1, dtype=torch.int64)
            self._positions = {one: torch.zeros(1, dtype=torch.int64, device=one) for one in {*devices} - {CPU}}
            self._positions[CPU] = self.position

    def position_on(self, device: torch.device) -> torch.Tensor:
        """The number of filled positions, int64 [1], where a layer of that device reads it."""
        return self._positions[device]

    @classmethod
    def of_one_layer(cls, config: ModelConfig, context: int) -> KVCache:
        """A cache that all layers share, for sequences that start anew in every layer (see `LayerWalk`)."""
        cache = cls(dataclasses.replace(config, n_layers=1, sliding=()), context)
        cache.layers *= config.n_layers
        return cache

    @property
    def length(self) -> int:
        return int(self.position)

    @length.setter
    def length(self, value: int) -> None:
        for position in self._positions.values():
            position.fill_(value)


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
        position = cache.position_on(x.device)
        query, key = self.rope(query, position), self.rope(key, position)
        keys, values = cache.layers[self.layer]
        mixed = attention(
            query, key, self._heads(x, self.weights.value), keys, values, position,
            scale=self.config.attention_scale, window=self.window,
        )  # fmt: skip
        return quant_matmul(mixed.view(x.shape[0], -1), self.weights.output)

    def _heads(self, x: torch.Tensor, weight: QuantTensor) -> torch.Tensor:
        return quant_matmul(x, weight).view(x.shape[0], -1, self.config.head_dim)
