"""Deja Vu's sparse FFN (Liu et al. 2023, "Contextual Sparsity for Efficient LLMs at Inference Time", §4), batch 1.

y = Σ over the K listed neurons i of silu(g_i · x)(u_i · x) d_i. As the paper describes it: a small
network scores the neurons, the K best are listed, K being fixed beforehand; a gather product reads
the listed rows of gate and up, a second one the listed rows of down, kept neuron-major, and splits
its sum over programs that add into a zeroed output. The paper's models have no gate: gate and up
share the first launch here. A second implementation, made from that description.

The predictor, two dense products and a top-k, is timed on its own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

PREDICTOR_RANK = 1024
# Neurons by columns of a tile in both launches, and warps: the quickest for a shape is reported.
VARIANTS: tuple[dict[str, Any], ...] = tuple(
    {"block_neurons": neurons, "block_width": width, "num_warps": warps}
    for neurons, width, warps in ((4, 512, 4), (8, 512, 4), (2, 1024, 4), (16, 256, 4), (8, 1024, 8), (32, 128, 4))
)


@triton.jit(do_not_specialize=["listed"])  # any K without another compile
def _gather_glu_kernel(
    x_ptr, gate_ptr, up_ptr, indices_ptr, hidden_ptr, listed, width,
    BLOCK_NEURONS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    row = tl.load(indices_ptr + k, mask=k < listed, other=0).to(tl.int64) * width
    gate = tl.zeros([BLOCK_NEURONS], tl.float32)
    up = tl.zeros([BLOCK_NEURONS], tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)
        mask = (k < listed)[:, None] & (column < width)[None, :]
        x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_WIDTH]
        at = row[:, None] + column[None, :]
        gate += tl.sum(tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32) * x, axis=1)
        up += tl.sum(tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32) * x, axis=1)
    hidden = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(hidden_ptr + k, hidden.to(hidden_ptr.dtype.element_ty), mask=k < listed)


@triton.jit(do_not_specialize=["listed"])
def _gather_transposed_kernel(
    hidden_ptr, down_ptr, indices_ptr, out_ptr, listed, width,
    BLOCK_NEURONS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_NEURONS + tl.arange(0, BLOCK_NEURONS)
    column = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    row = tl.load(indices_ptr + k, mask=k < listed, other=0).to(tl.int64) * width
    hidden = tl.load(hidden_ptr + k, mask=k < listed, other=0.0).to(tl.float32)  # [BLOCK_NEURONS]
    mask = (k < listed)[:, None] & (column < width)[None, :]
    down = tl.load(down_ptr + row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    partial = tl.sum(down * hidden[:, None], axis=0)
    tl.atomic_add(out_ptr + column, partial.to(out_ptr.dtype.element_ty), mask=column < width, sem="relaxed")


def deja_vu_ffn(
    x: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    indices: torch.Tensor,
    *,
    block_neurons: int = 8,
    block_width: int = 512,
    num_warps: int = 4,
) -> torch.Tensor:
    """The listed neurons of an FFN for one token.

    x: [1, D] of any float dtype, which the sums take too; gate, up, down: [N, D]; indices: int32 [K].
    Returns [1, D]. Not repeatable bit by bit: atomics.
    """
    listed, width = indices.numel(), x.shape[1]
    hidden = torch.empty(listed, dtype=x.dtype, device=x.device)
    out = torch.zeros(width, dtype=x.dtype, device=x.device)
    options = {"BLOCK_NEURONS": block_neurons, "BLOCK_WIDTH": block_width, "num_warps": num_warps}
    tiles = triton.cdiv(listed, block_neurons)
    if tiles:
        _gather_glu_kernel[(tiles,)](x, gate, up, indices, hidden, listed, width, **options)
        grid = (tiles, triton.cdiv(width, block_width))
        _gather_transposed_kernel[grid](hidden, down, indices, out, listed, width, **options)
    return out[None]


def reference(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """The definition in fp32."""
    listed = indices.long()
    hidden = F.silu(x.float() @ gate[listed].float().T) * (x.float() @ up[listed].float().T)
    return (hidden @ down[listed].float()).to(x.dtype)


def make_inputs(
    generator: torch.Generator, *, neurons: int, width: int, density: float, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Random weights, one token, and the K = density · N best of random scores, ascending."""
    device = generator.device

    def weights() -> torch.Tensor:
        return (torch.randn(neurons, width, generator=generator, device=device) / width**0.5).to(dtype)

    scores = torch.rand(neurons, generator=generator, device=device)
    indices = scores.topk(round(density * neurons)).indices.sort().values.int()
    x = torch.randn(1, width, generator=generator, device=device).to(dtype)
    return {"x": x, "gate": weights(), "up": weights(), "down": weights(), "indices": indices}


def bytes_moved(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, indices: torch.Tensor
) -> int:
    """The listed rows of three matrices, the list twice, and each vector written and read once."""
    listed, width = indices.numel(), gate.shape[1]
    return x.element_size() * (3 * listed * width + 2 * listed + 2 * width) + 2 * 4 * listed


def predict(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, listed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The predictor: x [1, D] through first [R, D], ReLU and second [N, R]; the best scores [K] and their indices."""
    scores = F.linear(F.relu(F.linear(x, first)), second)[0]
    best = scores.topk(listed)
    return best.values, best.indices.int()


def predict_reference(
    x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, listed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return predict(x.float(), first.float(), second.float(), listed)


def predictor_inputs(
    generator: torch.Generator, *, neurons: int, width: int, density: float, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    device, rank = generator.device, min(PREDICTOR_RANK, width)
    x = torch.randn(1, width, generator=generator, device=device).to(dtype)
    first = (torch.randn(rank, width, generator=generator, device=device) / width**0.5).to(dtype)
    second = (torch.randn(neurons, rank, generator=generator, device=device) / rank**0.5).to(dtype)
    return {"x": x, "first": first, "second": second, "listed": max(1, round(density * neurons))}


def predictor_bytes(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, listed: int) -> int:
    return x.element_size() * (first.numel() + second.numel() + x.numel()) + 4 * listed
