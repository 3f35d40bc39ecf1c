"""Neuron-major down rows: exact for floats and tiled scales, a small known error otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from pinfer.kernels.cases import random_blocks
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.planes import repack
from pinfer.kernels.transpose import quantize_q8_0, transpose_weights
from pinfer.quant import BF16, F16, F32, Q4_K, Q6_K, Q8_0, QuantTensor


def measured(weight: QuantTensor, turned: QuantTensor) -> float:
    original = dequantize(weight)
    return float((dequantize(turned).T - original).square().mean().sqrt() / original.square().mean().sqrt())


@pytest.mark.parametrize("kind", [F32, F16, BF16], ids=str)
def test_floats_are_transposed_exactly(kind, generator: torch.Generator) -> None:
    weight = random_blocks(generator, kind, 33, 50)
    turned, error = transpose_weights(weight)
    assert turned.type is kind
    assert turned.shape == (50, 33)
    assert torch.equal(dequantize(turned), dequantize(weight).T)
    assert error == 0


@pytest.mark.parametrize("kind", [F32, Q8_0], ids=str)
def test_rows_in_planes_are_refused(kind, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match="laid out for a GPU"):
        transpose_weights(repack(random_blocks(generator, kind, 32, 64)))


def test_tiles_that_share_a_scale_are_transposed_exactly(generator: torch.Generator) -> None:
    scales = torch.rand(2, 3, generator=generator).half()  # one a 32 x 32 tile
    quants = torch.randint(-127, 128, (64, 96), generator=generator).to(torch.int8)
    blocks = torch.cat(
        [
            scales.repeat_interleave(32, 0)[..., None].view(torch.uint8),
            quants.view(64, 3, 32).view(torch.uint8),
        ],
        dim=-1,
    )
    weight = QuantTensor(blocks.flatten(1), Q8_0, 96)
    turned, error = transpose_weights(weight)
    assert torch.equal(dequantize(turned), dequantize(weight).T)
    assert error == 0


@pytest.mark.parametrize(("kind", "limit"), [(Q8_0, 0.008), (Q6_K, 0.008), (Q4_K, 0.008)], ids=str)
def test_other_types_lose_what_q8_0_loses(kind, limit: float, generator: torch.Generator) -> None:
    weight = random_blocks(generator, kind, 64, 256)
    turned, error = transpose_weights(weight)
    assert turned.type is Q8_0
    assert 0 < error < limit
    assert error == pytest.approx(measured(weight, turned), rel=1e-4)


def test_a_width_without_whole_blocks_is_kept_in_f16(generator: torch.Generator) -> None:
    weight = random_blocks(generator, Q8_0, 33, 64)
    turned, error = transpose_weights(weight)
    assert turned.type is F16
    assert 0 < error < 5e-4
    assert error == pytest.approx(measured(weight, turned), rel=1e-4)


def test_quantize_q8_0_is_as_good_as_the_gguf_package(generator: torch.Generator) -> None:
    values = torch.randn(200, 32, generator=generator)
    values[0] = 0
    ours = dequantize(QuantTensor(quantize_q8_0(values), Q8_0, 32))
    theirs = quantize(values.numpy(), GGMLQuantizationType.Q8_0)
    reference = dequantize(QuantTensor(torch.from_numpy(theirs.astype(np.uint8)), Q8_0, 32))
    torch.testing.assert_close(ours, reference, atol=0.03, rtol=0)  # one step of the largest scale
    assert (ours - values).square().mean() <= (reference - values).square().mean() * 1.01
