"""Blocks: sizes are checked where a tensor is made."""

import gguf
import pytest
import torch

from pinfer.quant import BY_ID, BY_NAME, Q4_K, Q8_0, QUANT_TYPES, QuantTensor


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_geometry_is_the_gguf_packages(kind) -> None:
    assert gguf.GGMLQuantizationType(kind.ggml_id).name == kind.name
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind.ggml_id)] == (kind.block_size, kind.block_bytes)
    assert BY_ID[kind.ggml_id] is kind
    assert BY_NAME[kind.name] is kind


def test_rows_of_part_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="100 columns are no multiple of Q4_K's block of 256"):
        Q4_K.row_bytes(100)


def test_blocks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected|must be uint8 \[rows, 34\]"):
        QuantTensor(torch.zeros(2, 33, dtype=torch.uint8), Q8_0, 32)
    with pytest.raises(ValueError, match="float32"):
        QuantTensor(torch.zeros(2, 34), Q8_0, 32)


def test_bits_per_weight() -> None:
    assert Q4_K.bits_per_weight == 4.5
    assert Q8_0.bits_per_weight == 8.5


def test_rows_are_views_and_indexed_rows_are_copies() -> None:
    weight = QuantTensor(torch.arange(4 * 34, dtype=torch.uint8).view(4, 34), Q8_0, 32)
    assert weight[1:3].blocks.data_ptr() == weight.blocks[1].data_ptr()
    assert torch.equal(weight[torch.tensor([3, 0])].blocks, weight.blocks[[3, 0]])
    assert weight.shape == (4, 32)
    assert weight.nbytes == 136
