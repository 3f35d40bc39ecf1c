"""Llama's wiring: a norm, attention, a norm, an FFN, each pair added to the residual.

Mistral, Qwen, Phi-3, OPT, Bamboo and the mixtures of experts are wired alike. They differ in what their files and
configurations say: biases, QK norms, the kind of norm, positions, the activation, the experts.
"""

from __future__ import annotations

import torch

from pinfer.config import ModelConfig
from pinfer.kernels.ops import add
from pinfer.models.ffns import build_ffn
from pinfer.models.layers import Attention, AttentionWeights, KVCache, Rope, load_norm
from pinfer.models.transformer import Block
from pinfer.models.weights import WeightSource


class LlamaBlock(Block):
    def __init__(self, weights: WeightSource, config: ModelConfig, layer: int, rope: Rope | None) -> None:
        super().__init__()
        prefix = f"blk.{layer}."
        self.attention_norm = load_norm(weights, config, prefix + "attn_norm")
        self.attention = Attention(AttentionWeights.load(weights, prefix), config, layer, rope)
        self.ffn_norm = load_norm(weights, config, prefix + "ffn_norm")
        self.ffn = build_ffn(weights, config, prefix)

    def forward(self, x: torch.Tensor, cache: KVCache, opens: bool = False) -> torch.Tensor:
        """x: float32 [T, D] residual; returns the same after this layer."""
        h = add(x, self.attention(self.attention_norm(x), cache))
        return add(h, self.ffn(self.ffn_norm(h), residual=h, opens=opens))
