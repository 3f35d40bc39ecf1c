"""Gemma 3: QK norm, norms after attention and FFN too, GELU, five sliding layers to each global one."""

from __future__ import annotations

import torch

from pinfer.config import ModelConfig
from pinfer.models.layers import Attention, AttentionWeights, KVCache, RMSNorm, Rope
from pinfer.models.transformer import Block, dense_ffn
from pinfer.models.weights import WeightSource


class Gemma3Block(Block):
    def __init__(self, weights: WeightSource, config: ModelConfig, layer: int, rope: Rope) -> None:
        super().__init__()
        prefix = f"blk.{layer}."

        def norm(name: str) -> RMSNorm:
            return RMSNorm(weights.vector(f"{prefix}{name}.weight"), config.norm_eps)

        self.attention_norm = norm("attn_norm")
        self.attention = Attention(AttentionWeights.load(weights, prefix), config, layer, rope)
        self.post_attention_norm = norm("post_attention_norm")
        self.ffn_norm = norm("ffn_norm")
        self.ffn = dense_ffn(weights, config, prefix)
        self.post_ffn_norm = norm("post_ffw_norm")

    def forward(self, x: torch.Tensor, cache: KVCache, opens: bool = False) -> torch.Tensor:
        """x: float32 [T, D] residual; returns the same after this layer."""
        h = self.post_attention_norm(self.attention(self.attention_norm(x), cache), residual=x)
        return self.post_ffn_norm(self.ffn(self.ffn_norm(h), residual=h, opens=opens), residual=h)
