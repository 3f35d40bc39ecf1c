"""Falcon: attention and FFN beside each other, both on the layer's input; one norm for both (7B) or one each (40B)."""

from __future__ import annotations

import torch

from pinfer.config import ModelConfig
from pinfer.kernels.ops import add
from pinfer.models.ffns import build_ffn
from pinfer.models.layers import Attention, AttentionWeights, KVCache, Rope, load_norm
from pinfer.models.transformer import Block
from pinfer.models.weights import WeightSource


class FalconBlock(Block):
    def __init__(self, weights: WeightSource, config: ModelConfig, layer: int, rope: Rope | None) -> None:
        super().__init__()
        prefix = f"blk.{layer}."
        first = load_norm(weights, config, prefix + "attn_norm")  # the FFN's, and attention's where it is the only one
        two = weights.has(prefix + "attn_norm_2.weight")
        self.attention_norm = load_norm(weights, config, prefix + "attn_norm_2") if two else first
        self.attention = Attention(AttentionWeights.load(weights, prefix), config, layer, rope)
        self.ffn_norm = first if two else None
        self.ffn = build_ffn(weights, config, prefix)

    def forward(self, x: torch.Tensor, cache: KVCache, opens: bool = False) -> torch.Tensor:
        """x: float32 [T, D] residual; returns the same after this layer."""
        normed = self.attention_norm(x)
        h = add(x, self.attention(normed, cache))
        ffn_input = normed if self.ffn_norm is None else self.ffn_norm(x)
        return add(h, self.ffn(ffn_input, residual=x, opens=opens))
