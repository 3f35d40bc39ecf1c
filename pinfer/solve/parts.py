"""Deals a text's sequences out to those who must not see each other's: fitting, searching, validating."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

# At most; 8,192 tokens give the loss a standard error of a few thousandths of a nat. What a longer text
# has beyond is fitted on.
VALIDATION_SEQUENCES = 32
# KL tells layers apart on few tokens, and the search takes a time that grows with the square of the layers.
SEARCH_SEQUENCES, SEARCH_LAYERS = (4, 16), 128
LEAST = 16


class Parts(NamedTuple):
    """Sequences int64 [T] each, every part from all over the text."""

    fit: list[torch.Tensor]
    search: list[torch.Tensor]
    validation: list[torch.Tensor]


def deal(sequences: Sequence[torch.Tensor], n_layers: int) -> Parts:
    """A quarter of the sequences, at most so many, to search and to validation each, the rest to fitting.

    A model of many layers is searched on fewer sequences.

    ValueError for fewer than LEAST.
    """
    if len(sequences) < LEAST:
        raise ValueError(
            f"the text gives {len(sequences)} sequences; {LEAST} are needed to fit, search and validate on"
        )
    quarter = len(sequences) // 4
    validation, others = _every_so_many(list(sequences), min(VALIDATION_SEQUENCES, quarter))
    least, most = SEARCH_SEQUENCES
    search, fit = _every_so_many(others, min(max(least, min(most, SEARCH_LAYERS // n_layers)), quarter))
    return Parts(fit, search, validation)


def _every_so_many(sequences: list[torch.Tensor], count: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`count` of them taken evenly, each from the middle of its span, and the others."""
    taken = {(2 * i + 1) * len(sequences) // (2 * count) for i in range(count)}
    return [sequences[i] for i in sorted(taken)], [one for i, one in enumerate(sequences) if i not in taken]
