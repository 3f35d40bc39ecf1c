"""Named cards and memories: found in any spelling, refused with what is known."""

from __future__ import annotations

import pytest

from pinfer.placement.named import CARDS, MEMORIES, find_card, find_memory


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("rtx4090", "RTX 4090"),
        ("RTX-4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx 2080ti", "RTX 2080 Ti"),
        ("a100-40gb", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h200", "H200"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_cards_in_any_spelling(spelling: str, name: str) -> None:
    assert find_card(spelling).name == name


@pytest.mark.parametrize("spelling", ["a100", "4090 laptop", "rtx4080", "h100 pcie", "", "nvidia", "4090d"])
def test_cards_that_are_not_in_the_table(spelling: str) -> None:
    with pytest.raises(ValueError, match=r"unknown GPU .*RTX 2080 Ti, .*A100 40GB, .*L4"):
        find_card(spelling)


def test_every_name_of_the_tables_is_found() -> None:
    assert [find_card(card.name) for card in CARDS.values()] == list(CARDS.values())
    assert [find_memory(memory.name) for memory in MEMORIES.values()] == list(MEMORIES.values())


def test_memory_bandwidth_is_that_of_its_channels() -> None:
    assert find_memory("ddr4 3200, dual channel").bandwidth == 51.2e9
    assert find_memory("DDR5-5600").bandwidth == 89.6e9
    assert find_memory("EPYC-12").bandwidth == 460.8e9
    with pytest.raises(ValueError, match="unknown memory 'ddr3'; known are DDR4-3200"):
        find_memory("ddr3")
