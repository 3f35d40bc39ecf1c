"""TEAL's sparse FFN (Liu et al. 2024, "Training-Free Activation Sparsity in Large Language Models", §4.4), batch 1.

y = Σ over j with |x_j| > t of x_j · w_j for each of gate, up and down: what a skipped input would
have multiplied is never read. As the paper describes its kernel: the comparison with the threshold
sits in the mask of the weights' load, weights lie input-major so that a kept input is one
contiguous run, and the sum over inputs is split over programs that add into a zeroed fp16 output
by atomics. A second implementation, made from that description; no code of the authors is in it.

Launches: gate and up (one grid), then down, which forms silu(gate) * up as it loads; before them
one memset of all outputs. The paper launches gate and up apart, so this is no slower than theirs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

# Inputs by outputs of a program's tile, and warps: the quickest for a shape is reported.
VARIANTS: tuple[dict[str, Any], ...] = tuple(
    {"block_inputs": inputs, "block_outputs": outputs, "num_warps": warps}
    for inputs, outputs, warps in ((16, 512, 4), (32, 256, 4), (16, 1024, 8), (64, 128, 4), (32, 512, 8), (64, 256, 8))
)


@triton.jit
def _teal_kernel(
    x_ptr, up_values_ptr, weight_ptr, out_ptr, threshold, inputs, outputs,
    GATED: tl.constexpr, BLOCK_INPUTS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
    column = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    matrix = tl.program_id(2).to(tl.int64)
    x = tl.load(x_ptr + row, mask=row < inputs, other=0.0).to(tl.float32)  # [BLOCK_INPUTS]
    if GATED:
        up = tl.load(up_values_ptr + row, mask=row < inputs, other=0.0).to(tl.float32)
        x = x / (1.0 + tl.exp(-x)) * up
    kept = (tl.abs(x) > threshold) & (row < inputs)  # a threshold below zero keeps every input
    at = (matrix * inputs + row.to(tl.int64))[:, None] * outputs + column[None, :]
    mask = kept[:, None] & (column < outputs)[None, :]
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_INPUTS, BLOCK_OUTPUTS]
    partial = tl.sum(weight * tl.where(kept, x, 0.0)[:, None], axis=0)
    out = out_ptr + matrix * outputs + column
    tl.atomic_add(out, partial.to(out_ptr.dtype.element_ty), mask=column < outputs, sem="relaxed")


def teal_ffn(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    x_threshold: float,
    hidden_threshold: float,
    *,
    block_inputs: int = 32,
    block_outputs: int = 256,
    num_warps: int = 4,
) -> torch.Tensor:
    """The FFN of one token with small inputs of each product left out.

    x: [1, D] of any float dtype, which the sums take too; gate_up: [2, D, N] and down [N, D], input-major;
    thresholds: magnitudes at or below are skipped. Returns [1, D]. Not repeatable bit by bit: atomics.
    """
    _, width, neurons = gate_up.shape
    out = torch.zeros(2 * neurons + width, dtype=x.dtype, device=x.device)
    hidden, result = out[: 2 * neurons], out[2 * neurons :]
    options = {"BLOCK_INPUTS": block_inputs, "BLOCK_OUTPUTS": block_outputs, "num_warps": num_warps}
    grid = (triton.cdiv(width, block_inputs), triton.cdiv(neurons, block_outputs), 2)
    _teal_kernel[grid](x, x, gate_up, hidden, x_threshold, width, neurons, GATED=False, **options)
    grid = (triton.cdiv(neurons, block_inputs), triton.cdiv(width, block_outputs), 1)
    up_values = hidden[neurons:]
    _teal_kernel[grid](hidden, up_values, down, result, hidden_threshold, neurons, width, GATED=True, **options)
    return result[None]


def reference(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, x_threshold: float, hidden_threshold: float
) -> torch.Tensor:
    """The definition in fp32: inputs of magnitude at most the threshold count as zero."""
    kept = torch.where(x.float().abs() > x_threshold, x.float(), 0.0)
    hidden = F.silu(kept @ gate_up[0].float()) * (kept @ gate_up[1].float())
    hidden = torch.where(hidden.abs() > hidden_threshold, hidden, 0.0)
    return (hidden @ down.float()).to(x.dtype)


def make_inputs(
    generator: torch.Generator, *, neurons: int, width: int, density: float, dtype: torch.dtype = torch.float16
) -> dict[str, Any]:
    """Random weights and one token, with thresholds at the magnitudes that keep a share `density` of each input."""
    device = generator.device

    def weights(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=device) / shape[-2] ** 0.5).to(dtype)

    gate_up, down = weights(2, width, neurons), weights(neurons, width)
    x = torch.randn(1, width, generator=generator, device=device).to(dtype)
    x_threshold = _keeping(density, x)
    kept = torch.where(x.float().abs() > x_threshold, x.float(), 0.0)
    hidden = F.silu(kept @ gate_up[0].float()) * (kept @ gate_up[1].float())
    thresholds = {"x_threshold": x_threshold, "hidden_threshold": _keeping(density, hidden)}
    return {"x": x, "gate_up": gate_up, "down": down, **thresholds}


def _keeping(density: float, values: torch.Tensor) -> float:
    """A magnitude that a share `density` of the values exceeds, between two of them so that rounding moves none."""
    ordered = values.float().abs().flatten().sort(descending=True).values
    keep = round(density * ordered.numel())
    if keep >= ordered.numel():
        return -1.0
    return float(ordered[0] * 2 if keep == 0 else (ordered[keep - 1] + ordered[keep]) / 2)


def bytes_moved(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, x_threshold: float, hidden_threshold: float
) -> int:
    """Rows of kept inputs, and each vector written and read once."""
    kept = torch.where(x.float().abs() > x_threshold, x.float(), 0.0)
    hidden = F.silu(kept @ gate_up[0].float()) * (kept @ gate_up[1].float())
    rows, hidden_rows = int((kept != 0).sum()), int((hidden.abs() > hidden_threshold).sum())
    neurons, width = down.shape
    return x.element_size() * (2 * rows * neurons + hidden_rows * width + 4 * neurons + 2 * width)
