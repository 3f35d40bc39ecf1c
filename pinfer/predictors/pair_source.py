"""What a predictor is trained on: pairs of an FFN's input and what its neurons contributed."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch


class Pairs(NamedTuple):
    """What an FFN read and what its neurons gave: inputs float32 [B, D], contribution float32 [B, N] >= 0.

    A contribution of 0 means not active; only ratios within a token count.
    """

    inputs: torch.Tensor
    contribution: torch.Tensor


class PairSource(Protocol):
    """The pairs of one layer, in a part to train on and a part to judge by."""

    @property
    def tokens(self) -> int: ...
    @property
    def validation_tokens(self) -> int: ...
    def take(self, tokens: torch.Tensor) -> Pairs:
        """Training tokens, int64 [B] ascending."""

    def validation(self, start: int, stop: int) -> Pairs:
        """Validation tokens start to stop."""


class HeldPairs:
    """Pairs in memory: a source for small layers."""

    def __init__(self, train: Pairs, validation: Pairs) -> None:
        self._train, self._validation = train, validation

    @property
    def tokens(self) -> int:
        return len(self._train.inputs)

    @property
    def validation_tokens(self) -> int:
        return len(self._validation.inputs)

    def take(self, tokens: torch.Tensor) -> Pairs:
        return Pairs(self._train.inputs[tokens], self._train.contribution[tokens])

    def validation(self, start: int, stop: int) -> Pairs:
        return Pairs(self._validation.inputs[start:stop], self._validation.contribution[start:stop])
