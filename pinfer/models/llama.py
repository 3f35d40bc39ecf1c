"""Llama: pre-norm attention and a gated FFN; SiLU as published, ReLU in ReGLU variants, dReLU in TurboSparse's."""

from __future__ import annotations

import torch

from pinfer.config import ModelConfig
from pinfer.kernels.ops import add
from pinfer.models.layers import Attention, AttentionWeights, KVCache, RMSNorm, Rope
from pinfer.models.transformer import Block, dense_ffn
from pinfer.models.weights import WeightSource


class LlamaBlock(Block):
    def __init__(self, weights: WeightSource, config: ModelConfig, layer: int, rope: Rope) -> None:
        super().__init__()
        prefix = f"blk.{layer}."
        self.attention_norm = RMSNorm(weights.vector(prefix + "attn_norm.weight"), config.norm_eps)
        self.attention = Attention(AttentionWeights.load(weights, prefix), config, layer, rope)
        self.ffn_norm = RMSNorm(weights.vector(prefix + "ffn_norm.weight"), config.norm_eps)
        self.ffn = dense_ffn(weights, config, prefix)

    def forward(self, x: torch.Tensor, cache: KVCache, opens: bool = False) -> torch.Tensor:
        """x: float32 [T, D] residual; returns the same after this layer."""
        h = add(x, self.attention(self.attention_norm(x), cache))
        return add(h, self.ffn(self.ffn_norm(h), residual=h, opens=opens))
