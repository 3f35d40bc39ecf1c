"""A text's sequences, dealt out."""

from __future__ import annotations

import itertools

import pytest
import torch

from pinfer.solve.parts import VALIDATION_SEQUENCES, deal


@pytest.mark.parametrize("count", [16, 17, 23, 60, 400])
def test_every_sequence_is_dealt_once_and_from_all_over(count: int) -> None:
    parts = deal([torch.tensor([number, number]) for number in range(count)], 6)
    numbers = [[int(one[0]) for one in part] for part in parts]
    assert sorted(itertools.chain.from_iterable(numbers)) == list(range(count))
    assert len(parts.validation) == min(VALIDATION_SEQUENCES, count // 4)
    assert len(parts.search) == min(16, count // 4)
    for part in numbers:
        assert part == sorted(part)
        assert part[0] < count / 3
        assert part[-1] > count / 2
        assert max(b - a for a, b in itertools.pairwise(part)) <= count / len(part) + 3


def test_deeper_models_are_searched_on_fewer() -> None:
    sequences = [torch.tensor([1, 2])] * 100
    assert [len(deal(sequences, n_layers).search) for n_layers in (4, 8, 18, 32, 80)] == [16, 16, 7, 4, 4]


def test_too_few_say_so() -> None:
    with pytest.raises(ValueError, match="gives 15 sequences; 16 are needed"):
        deal([torch.tensor([1, 2])] * 15, 6)
