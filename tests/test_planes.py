"""Rows in planes: the same weights, bit for bit, and what kernels read of them."""

from __future__ import annotations

import math

import pytest
import torch

from pinfer.kernels import cases, ops
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.planes import repack
from pinfer.quant import Q6_K, QUANT_TYPES, WRITTEN_TYPES, QuantTensor, QuantType, planes_row_bytes


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
@pytest.mark.parametrize("widths", [1, 2, 5])
def test_repacking_keeps_every_weight_bit_for_bit(kind: QuantType, widths: int, generator: torch.Generator) -> None:
    """Random bytes: infinite and NaN scales too."""
    weight = cases.random_blocks(generator, kind, 7, widths * cases.columns_for(kind.name))
    weight.blocks.random_(0, 256, generator=generator)
    packed = repack(weight)
    assert packed.blocks.shape[1] == planes_row_bytes(kind, weight.columns)
    assert packed.blocks.shape[1] % 32 == 0
    expected, found = dequantize(weight), dequantize(packed)
    assert torch.equal(expected.isnan(), found.isnan())
    sound = ~expected.isnan()
    assert torch.equal(expected[sound].view(torch.int32), found[sound].view(torch.int32))


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_rows_in_planes_can_be_picked(kind: QuantType, generator: torch.Generator) -> None:
    weight = cases.random_blocks(generator, kind, 9, cases.columns_for(kind.name))
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(dequantize(repack(weight)[rows]), dequantize(weight[rows]))
    assert repack(repack(weight)[2:5]).layout == "planes"


def test_repacking_in_chunks_is_the_same(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = cases.random_blocks(generator, Q6_K, 11, 512)
    whole = repack(weight).blocks
    monkeypatch.setattr("pinfer.kernels.planes.CHUNK_WEIGHTS", 3 * 512)
    assert torch.equal(repack(weight).blocks, whole)


def test_planes_take_little_more_than_blocks() -> None:
    for kind in WRITTEN_TYPES:  # the others have their levels stored as numbers
        more = 8 * planes_row_bytes(kind, 4096) / 4096 - kind.bits_per_weight
        assert 0 <= more <= 0.27, f"{kind}: {more} bits a weight"


def test_whole_float_rows_are_not_copied() -> None:
    weight = QuantTensor.from_dense(torch.randn(3, 64).half())
    assert repack(weight).blocks.data_ptr() == weight.blocks.data_ptr()


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_kernels_read_either_layout(kind: QuantType, generator: torch.Generator) -> None:
    inputs = ops.quant_matmul.make_inputs(
        generator, type=kind.name, tokens=1, rows=5, columns=cases.columns_for(kind.name)
    )
    run = ops.quant_matmul.implementation("triton")
    assert torch.equal(run(**inputs), run(inputs["x"], repack(inputs["weight"])))


def test_the_cpu_core_refuses_planes(generator: torch.Generator) -> None:
    inputs = ops.quant_matmul.make_inputs(generator, type="Q8_0", tokens=1, rows=5, columns=64)
    with pytest.raises(ValueError, match="laid out for a GPU"):
        ops.quant_matmul.implementation("cpu")(inputs["x"], repack(inputs["weight"]))


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e7])
def test_quants_as_denormals_are_exact_at_any_size(size: float, generator: torch.Generator) -> None:
    """One weight at a time: x picks a column, so that nothing but the scaling of quants can round."""
    for kind in QUANT_TYPES:
        weight = cases.random_blocks(generator, kind, 3, 256)
        expected = dequantize(weight) * size
        for column in range(0, 256, 37):
            x = torch.zeros(1, 256)
            x[0, column] = size
            found = ops.quant_matmul.implementation("triton")(x, weight)[0]
            scale = max(float(expected.abs().max()), math.ulp(0))
            assert float((found - expected[:, column]).abs().max()) <= 1e-6 * scale, (kind, column)
