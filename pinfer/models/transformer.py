"""The decoder around a family's blocks: embed, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from pinfer.config import ModelConfig
from pinfer.ffn import DenseFFN
from pinfer.kernels.ops import embed, quant_matmul
from pinfer.models.layers import CPU, Attention, KVCache, RMSNorm, Rope
from pinfer.models.weights import WeightSource


class Block(nn.Module):
    """One layer of a family: `block(x, cache, opens=False) -> x`, with an `ffn` that may be replaced.

    `opens` says that the first row is the first token of its sequence. x comes on the block's `device`, where its
    attention, norms, keys and values are; an `ffn` on another one fetches x and brings y back.
    """

    attention_norm: RMSNorm
    attention: Attention
    ffn: nn.Module

    @property
    def device(self) -> torch.device:
        return self.attention_norm.weight.device


BlockBuilder = Callable[[WeightSource, ModelConfig, int, Rope], Block]


class Transformer(nn.Module):
    """A model over memory-mapped weights; always built dense (`sparsify` replaces its FFNs)."""

    def __init__(self, weights: WeightSource, config: ModelConfig, build_block: BlockBuilder, context: int) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.embedding = weights.tensor("token_embd.weight")  # [V, D]
        factors = weights.vector("rope_freqs.weight") if weights.has("rope_freqs.weight") else None
        rope = Rope(config.rope, factors)
        local = rope if config.rope_local is None else Rope(config.rope_local)
        self.ropes = (rope,) if local is rope else (rope, local)
        ropes = [local if config.is_sliding(layer) else rope for layer in range(config.n_layers)]
        self.blocks = nn.ModuleList(
            build_block(weights, config, layer, ropes[layer]) for layer in range(config.n_layers)
        )
        self.norm = RMSNorm(weights.vector("output_norm.weight"), config.norm_eps)
        self.head = weights.tensor("output.weight") if weights.has("output.weight") else self.embedding

    def forward(self, tokens: torch.Tensor, cache: KVCache, *, last_only: bool = False) -> torch.Tensor:
        """Run tokens int64 [T] after the cache's; returns logits float32 [T, V], or [1, V] with `last_only`.

        ValueError if they do not fit the cache.
        """
        self._make_room(tokens, cache)
        logits = self.compute(tokens, cache, last_only=last_only, opens=cache.length == 0)
        cache.length += tokens.shape[0]
        return logits

    def states(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """`forward` up to the head: float32 [T, D], of which `logits` makes logits, as few rows at a time as memory asks."""
        self._make_room(tokens, cache)
        x = self._blocks(tokens, cache, cache.length == 0)
        cache.length += tokens.shape[0]
        return self._normed(x)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The head: float32 [T, V] of states float32 [T, D]."""
        return quant_matmul(_on(states, self.head.device), self.head)

    def compute(
        self, tokens: torch.Tensor, cache: KVCache, *, last_only: bool = False, opens: bool = False
    ) -> torch.Tensor:
        """`forward` by ops alone, without its checks: what a step program records. The cache's length stays.

        opens: whether the cache is empty, which the host need not know of it here.
        """
        x = self._blocks(tokens, cache, opens)
        return self.logits(self._normed(x[-1:] if last_only else x))

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the first block reads of tokens int64 [T]: float32 [T, D], where the embedding is."""
        return embed(tokens, self.embedding, scale=self.config.embedding_scale)

    def compute_embedded(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """`compute` of tokens that are embedded already, float32 [T, D]."""
        return self.logits(self._normed(self._through(x, cache, False)))

    @property
    def device(self) -> torch.device:
        """Where all but the embedding is; the CPU where that is in more than one place."""
        places = {block.device for block in self.layers} | {self.norm.weight.device, self.head.device}
        return places.pop() if len(places) == 1 else CPU

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(_on(x, self.norm.weight.device))

    def _blocks(self, tokens: torch.Tensor, cache: KVCache, opens: bool) -> torch.Tensor:
        return self._through(self.embedded(tokens), cache, opens)

    def _through(self, x: torch.Tensor, cache: KVCache, opens: bool) -> torch.Tensor:
        for block in self.layers:
            x = block(_on(x, block.device), cache, opens)
        return x

    def _make_room(self, tokens: torch.Tensor, cache: KVCache) -> None:
        if cache.length + tokens.shape[0] > cache.context:
            raise ValueError(f"{cache.length + tokens.shape[0]} tokens do not fit the context of {cache.context}")
        for rope in self.ropes:
            rope.reserve(cache.length + tokens.shape[0])

    def new_cache(self, context: int | None = None) -> KVCache:
        """A cache on the blocks' devices, of as many positions as the model has room for if not said."""
        return KVCache(self.config, context or self.context, [block.device for block in self.layers])

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return cast(list[Block], list(self.blocks))

    def ffns(self) -> list[nn.Module]:
        return [block.ffn for block in self.blocks]  # type: ignore[misc]


def _on(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on that device. Where it is there already, nothing is called that a recorded step would not repeat."""
    return x if x.device == device else x.to(device)


def dense_ffn(weights: WeightSource, config: ModelConfig, prefix: str) -> DenseFFN:
    """The FFN of layer `prefix` ("blk.3."), gated or not."""
    up = weights.tensor(prefix + "ffn_up.weight")
    down = weights.tensor(prefix + "ffn_down.weight")
    if not config.gated:
        return DenseFFN(up, None, down, config.activation)
    return DenseFFN(weights.tensor(prefix + "ffn_gate.weight"), up, down, config.activation)
