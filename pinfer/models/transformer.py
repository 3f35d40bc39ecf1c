"""The decoder around a family's blocks: embed, blocks, final norm, head."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from pinfer.config import ModelConfig, RopeConfig
from pinfer.kernels.ops import add, embed, quant_matmul, softcap
from pinfer.models.ffns import Experts, single_ffns
from pinfer.models.layers import CPU, Attention, KVCache, LayerNorm, RMSNorm, Rope, load_norm
from pinfer.models.weights import WeightSource


class Block(nn.Module):
    """One layer of a family: `block(x, cache, opens=False) -> x`, with an `ffn` that may be replaced.

    `opens` says that the first row is the first token of its sequence. x comes on the block's `device`, where its
    attention, norms, keys and values are; an `ffn` on another one fetches x and brings y back.
    """

    attention_norm: RMSNorm | LayerNorm
    attention: Attention
    ffn: nn.Module

    @property
    def device(self) -> torch.device:
        return self.attention_norm.weight.device


BlockBuilder = Callable[[WeightSource, ModelConfig, int, Rope | None], Block]


class Transformer(nn.Module):
    """A model over memory-mapped weights; always built dense (`sparsify` replaces its FFNs)."""

    def __init__(self, weights: WeightSource, config: ModelConfig, build_block: BlockBuilder, context: int) -> None:
        super().__init__()
        self.config, self.context = config, context
        self.embedding = weights.tensor("token_embd.weight")  # [V, D]
        self.position_embedding = None  # [positions, D] where they are learned
        if config.rope is None:
            self.position_embedding = weights.tensor("position_embd.weight")[config.position_offset :]
        self.long_rope = _turns_by_long_factors(weights, config.rope, context)
        rope = None if config.rope is None else Rope(config.rope, _frequency_factors(weights, self.long_rope))
        local = rope if config.rope_local is None else Rope(config.rope_local)
        self.ropes = tuple({id(one): one for one in (rope, local) if one is not None}.values())
        ropes = [local if config.is_sliding(layer) else rope for layer in range(config.n_layers)]
        self.blocks = nn.ModuleList(
            build_block(weights, config, layer, ropes[layer]) for layer in range(config.n_layers)
        )
        self.norm = load_norm(weights, config, "output_norm")
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
        product = quant_matmul(_on(states, self.head.device), self.head)
        return product if self.config.logit_softcap is None else softcap(product, self.config.logit_softcap)

    def compute(
        self, tokens: torch.Tensor, cache: KVCache, *, last_only: bool = False, opens: bool = False
    ) -> torch.Tensor:
        """`forward` by ops alone, without its checks: what a step program records. The cache's length stays.

        opens: whether the cache is empty, which the host need not know of it here.
        """
        x = self._blocks(tokens, cache, opens)
        return self.logits(self._normed(x[-1:] if last_only else x))

    def embedded(self, tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """What the first block reads of tokens int64 [T], the first of them at `position` int64 [1], on the CPU.

        Returns float32 [T, D], where the embedding is.
        """
        x = embed(tokens, self.embedding, scale=self.config.embedding_scale)
        if self.position_embedding is None:
            return x
        positions = position if tokens.shape[0] == 1 else position + torch.arange(tokens.shape[0])
        return add(x, embed(positions, self.position_embedding))

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
        return self._through(self.embedded(tokens, cache.position), cache, opens)

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
        """Every FFN in order, of layers with experts each expert's: what is made sparse, fitted and counted by itself."""
        return [ffn for block in self.layers for ffn in single_ffns(block.ffn)]

    def replace_ffns(self, replaced: Callable[[int, nn.Module], nn.Module]) -> None:
        """Put `replaced(number, ffn)` in place of every one of `ffns`, one after the other."""
        number = 0
        for block in self.layers:
            if isinstance(block.ffn, Experts):
                for place, ffn in enumerate(block.ffn.ffns):
                    block.ffn.ffns[place] = replaced(number + place, ffn)
                number += len(block.ffn.ffns)
            else:
                block.ffn = replaced(number, block.ffn)
                number += 1

    def ffn_name(self, number: int) -> str:
        """Where the FFN of that number is: "layer 3", or "layer 3, expert 0"."""
        if self.config.experts is None:
            return f"layer {number}"
        layer, expert = divmod(number, self.config.experts.count)
        return f"layer {layer}, expert {expert}"


def _on(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """x on that device. Where it is there already, nothing is called that a recorded step would not repeat."""
    return x if x.device == device else x.to(device)


def _turns_by_long_factors(weights: WeightSource, rope: RopeConfig | None, context: int) -> bool:
    """Whether a run of that context takes the second of Phi-3's two kinds of factors, as llama.cpp chooses."""
    if rope is None or not weights.has("rope_factors_long.weight"):
        return False
    assert rope.original_context is not None  # `check_tensors` asks for it
    return context > rope.original_context


def _frequency_factors(weights: WeightSource, long: bool) -> torch.Tensor | None:
    """Llama 3's, or of Phi-3's two kinds the long or the short one; None without."""
    for name in ("rope_freqs", f"rope_factors_{'long' if long else 'short'}"):
        if weights.has(f"{name}.weight"):
            return weights.vector(f"{name}.weight")
    return None
