"""Gemma 2 and 3: norms after attention and FFN too, GELU, sliding layers between global ones; Gemma 3 with QK norms,
Gemma 2 with capped scores and logits."""

from __future__ import annotations

import torch

from pinfer.config import ModelConfig
from pinfer.models.ffns import build_ffn
from pinfer.models.layers import Attention, AttentionWeights, KVCache, Rope, load_norm
from pinfer.models.transformer import Block
from pinfer.models.weights import WeightSource


class GemmaBlock(Block):
    def __init__(self, weights: WeightSource, config: ModelConfig, layer: int, rope: Rope | None) -> None:
        super().__init__()
        prefix = f"blk.{layer}."
        self.attention_norm = load_norm(weights, config, prefix + "attn_norm")
        self.attention = Attention(AttentionWeights.load(weights, prefix), config, layer, rope)
        self.post_attention_norm = load_norm(weights, config, prefix + "post_attention_norm")
        self.ffn_norm = load_norm(weights, config, prefix + "ffn_norm")
        self.ffn = build_ffn(weights, config, prefix)
        self.post_ffn_norm = load_norm(weights, config, prefix + "post_ffw_norm")

    def forward(self, x: torch.Tensor, cache: KVCache, opens: bool = False) -> torch.Tensor:
        """x: float32 [T, D] residual; returns the same after this layer."""
        h = self.post_attention_norm(self.attention(self.attention_norm(x), cache), residual=x)
        return self.post_ffn_norm(self.ffn(self.ffn_norm(h), residual=h, opens=opens), residual=h)
