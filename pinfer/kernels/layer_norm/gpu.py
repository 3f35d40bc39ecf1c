"""layer_norm in Triton: one program a row, in float32.

    out = (x - mean(x)) / sqrt(var(x) + eps) · weight (+ bias) (+ residual)        (Ba et al. 2016)

Rows of up to 16,384 numbers stay in registers between the sums and the product; wider ones are read three times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, Build
from pinfer.kernels.layer_norm.reference import check_inputs
from pinfer.kernels.rms_norm.gpu import blocks_of


@triton.jit
def _layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, width, eps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, IN_REGISTERS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK_D)
    if IN_REGISTERS:
        mask = column < width
        x = tl.load(x_ptr + row + column, mask=mask, other=0.0).to(tl.float32)  # [D]
        # Asked for before the sums are waited for.
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)  # [D]
        x = tl.where(mask, x - tl.sum(x, axis=0) / width, 0.0)
        out = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * weight
        if HAS_BIAS:
            out += tl.load(bias_ptr + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            out += tl.load(residual_ptr + row + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row + column, out, mask=mask)
    else:
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, width, BLOCK_D):
            total += tl.load(x_ptr + row + first + column, mask=first + column < width, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=0) / width
        squares = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, width, BLOCK_D):
            mask = first + column < width
            x = tl.load(x_ptr + row + first + column, mask=mask, other=0.0).to(tl.float32)
            x = tl.where(mask, x - mean, 0.0)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        for first in range(0, width, BLOCK_D):
            mask = first + column < width
            x = tl.load(x_ptr + row + first + column, mask=mask, other=0.0).to(tl.float32)
            out = (x - mean) * scale * tl.load(weight_ptr + first + column, mask=mask, other=0.0).to(tl.float32)
            if HAS_BIAS:
                out += tl.load(bias_ptr + first + column, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                out += tl.load(residual_ptr + row + first + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + row + first + column, out, mask=mask)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    check_inputs(x, weight, bias, residual)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    width = weight.numel()
    blocks, warps = blocks_of(width)
    _layer_norm_kernel[(x.numel() // max(1, width),)](
        x, weight, weight if bias is None else bias.contiguous(), x if residual is None else residual.contiguous(),
        out, width, eps, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, **blocks,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    """The widths of OPT and Falcon, 7B to 66B, the widest row in registers and one that is wider."""
    pointers = ("x_ptr", "weight_ptr", "bias_ptr", "residual_ptr", "out_ptr")
    arguments = {**dict.fromkeys(pointers, FLOATS), "width": "i32", "eps": "fp32"}

    def build(width: int, has_bias: bool, has_residual: bool) -> Build:
        blocks, warps = blocks_of(width)
        label = f"layer_norm D={width}{' + bias' if has_bias else ''}{' + residual' if has_residual else ''}"
        constants = {"HAS_BIAS": has_bias, "HAS_RESIDUAL": has_residual, **blocks}
        wide = 1.0 if blocks["BLOCK_D"] >= 1024 else None  # fewer numbers than 128 a warp: 4 or 8 bytes a thread
        return Build(
            label, _layer_norm_kernel, arguments, constants, warps, multiples_of_16=("width",), wide_share=wide
        )

    widths = (128, 768, 4096, 4544, 8192, 16_384, 18_432)
    return [
        *(build(width, True, has_residual) for width in widths for has_residual in (False, True)),
        *(build(width, False, False) for width in (4096, 18_432)),
    ]
