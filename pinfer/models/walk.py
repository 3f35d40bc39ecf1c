"""A dense walk through a model layer by layer: every sequence through one layer, then all through the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pinfer.models.layers import KVCache
from pinfer.models.transformer import Transformer


class LayerWalk:
    """Sequences on their way through a model's layers.

    `residuals[i]` float32 [T_i, D] is what the next layer, number `layer`, reads of sequence i. Beside
    them one layer's cache of keys and values is held, whatever the number of layers and sequences.
    """

    def __init__(
        self, model: Transformer, sequences: Sequence[torch.Tensor], residuals: list[torch.Tensor] | None = None
    ) -> None:
        """sequences: int64 [T_i] each. residuals: those of an earlier walk, to go on from; set `layer` then."""
        longest = max(len(tokens) for tokens in sequences)
        for rope in model.ropes:
            rope.reserve(longest)
        self.model, self.layer = model, 0
        self._cache = KVCache.of_one_layer(model.config, longest)
        if residuals is None:
            residuals = [model.embedded(tokens, torch.zeros(1, dtype=torch.int64)) for tokens in sequences]
        self.residuals = residuals

    def step(self, sequence: int) -> None:
        """Take one sequence through the layer; its residual is replaced."""
        self.residuals[sequence] = self.model.blocks[self.layer](self.residuals[sequence], self._cache)

    def advance(self) -> None:
        """Take every sequence through the layer and go on to the next one."""
        for sequence in range(len(self.residuals)):
            self.step(sequence)
        self.layer += 1

    def rest(self, sequence: int) -> torch.Tensor:
        """What the head reads of one sequence, float32 [T, D], if it went through all layers left; the walk stays."""
        x = self.residuals[sequence]
        for block in self.model.blocks[self.layer :]:
            x = block(x, self._cache, opens=True)
        return self.model.norm(x)
