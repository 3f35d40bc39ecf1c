"""The layers that all families share: norm, rotary embedding, cache, attention.

Activations are float32 [T, …] for the T tokens of one sequence; weights stay in their blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from pinfer.config import ModelConfig, RopeConfig
from pinfer.kernels.ops import attention, layer_norm, quant_matmul, rms_norm, rope
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


class LayerNorm(nn.Module):
    """(x - mean) / deviation · weight + bias over the last dimension (Ba et al. 2016); `bias` may be None."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = weight, bias, eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: float32 [..., D]; the normed x, added to `residual` where it is given."""
        return layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


def load_norm(weights: WeightSource, config: ModelConfig, name: str) -> RMSNorm | LayerNorm:
    """The norm of that name ("blk.3.attn_norm"), of the kind that the model has."""
    weight = weights.vector(f"{name}.weight")
    if config.norm == "rms":
        return RMSNorm(weight, config.norm_eps)
    return LayerNorm(weight, optional_vector(weights, f"{name}.bias"), config.norm_eps)


def optional_vector(weights: WeightSource, name: str) -> torch.Tensor | None:
    return weights.vector(name) if weights.has(name) else None


CPU = torch.device("cpu")
ROPE_POSITIONS = 1024  # tabulated at first


class Rope(nn.Module):
    """Rotary embedding (Su et al. 2021); the table of cos and sin grows with the positions asked for.

    `factors` float32 [dim / 2] divides the frequencies (Llama 3's and Phi-3's long-context scaling). Every device that
    rotates has a table of its own (`add_device`), the CPU always.
    """

    per_device = True  # see `models.weights`

    def __init__(self, config: RopeConfig, factors: torch.Tensor | None = None) -> None:
        super().__init__()
        self.dim, self.interleaved = config.dim, config.style == "interleaved"
        self.frequency = _frequencies(config) if factors is None else _frequencies(config) / factors.double()
        self._size = config.attention_factor  # of the turned pairs
        self._tables = {CPU: (torch.empty(0), torch.empty(0))}
        self._tabulate(ROPE_POSITIONS)

    def _tabulate(self, positions: int) -> None:
        angle = torch.outer(torch.arange(positions, dtype=torch.float64), self.frequency)
        cos, sin = ((self._size * part).float() for part in (angle.cos(), angle.sin()))  # [positions, dim / 2]
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


def _frequencies(config: RopeConfig) -> torch.Tensor:
    """Radians a position, float64 [dim / 2]: scaled as a whole, or by YaRN, each dimension by how often it turns."""
    pairs = torch.arange(0, config.dim, 2, dtype=torch.float64)
    frequency = config.base ** (-pairs / config.dim)
    if config.yarn is None:
        return frequency / config.scale
    assert config.original_context is not None  # RopeConfig asks for it
    context, dim, slowness = config.original_context, config.dim, math.log(config.base)

    def turning(times: float) -> float:
        """The dimension, out of dim / 2, that turns so often over the original context."""
        return dim * math.log(context / (2 * math.pi * times)) / (2 * slowness)

    first, last = math.floor(turning(config.yarn.beta_fast)), math.ceil(turning(config.yarn.beta_slow))
    first, last = max(first, 0), min(last, dim - 1)
    scaled = ((pairs / 2 - first) / max(0.001, last - first)).clamp(0, 1)  # 0: kept, 1: scaled
    return frequency * (1 - scaled + scaled / config.scale)


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
    """query [H · head_dim, D], key and value [KV · head_dim, D], output [D, H · head_dim].

    Biases float32 [rows] and norms float32 [head_dim], or None.
    """

    query: QuantTensor
    key: QuantTensor
    value: QuantTensor
    output: QuantTensor
    query_bias: torch.Tensor | None
    key_bias: torch.Tensor | None
    value_bias: torch.Tensor | None
    output_bias: torch.Tensor | None
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None

    @classmethod
    def load(cls, weights: WeightSource, prefix: str) -> AttentionWeights:
        """The attention of layer `prefix` ("blk.3."), with the biases and QK norms that the file has."""

        def matrix(part: str) -> QuantTensor:
            return weights.tensor(f"{prefix}attn_{part}.weight")

        def vector(part: str) -> torch.Tensor | None:
            return optional_vector(weights, f"{prefix}attn_{part}")

        return cls(
            matrix("q"), matrix("k"), matrix("v"), matrix("output"),
            vector("q.bias"), vector("k.bias"), vector("v.bias"), vector("output.bias"),
            vector("q_norm.weight"), vector("k_norm.weight"),
        )  # fmt: skip


class Attention(nn.Module):
    """Causal self-attention over a cache, with grouped keys, an optional window, optional QK norm and softcap.

    `rope` None leaves queries and keys unturned: positions are in x.
    """

    def __init__(self, weights: AttentionWeights, config: ModelConfig, layer: int, rope: Rope | None) -> None:
        super().__init__()
        self.weights, self.config, self.layer, self.rope = weights, config, layer, rope
        self.window = config.sliding_window if config.is_sliding(layer) else None
        norms = (weights.query_norm, weights.key_norm)
        self.query_norm, self.key_norm = (None if n is None else RMSNorm(n, config.norm_eps) for n in norms)

    def forward(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """x: float32 [T, D], the tokens after `cache.length`; returns float32 [T, D]."""
        weights = self.weights
        query, key = self._heads(x, weights.query, weights.query_bias), self._heads(x, weights.key, weights.key_bias)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        position = cache.position_on(x.device)
        if self.rope is not None:
            query, key = self.rope(query, position), self.rope(key, position)
        keys, values = cache.layers[self.layer]
        mixed = attention(
            query, key, self._heads(x, weights.value, weights.value_bias), keys, values, position,
            scale=self.config.attention_scale, window=self.window, softcap=self.config.attention_softcap,
        )  # fmt: skip
        return quant_matmul(mixed.view(x.shape[0], -1), weights.output, weights.output_bias)

    def _heads(self, x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None) -> torch.Tensor:
        return quant_matmul(x, weight, bias).view(x.shape[0], -1, self.config.head_dim)
