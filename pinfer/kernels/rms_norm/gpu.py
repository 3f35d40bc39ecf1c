"""rms_norm in Triton: one program a row, in float32.

    out = x / sqrt(mean(x²) + eps) · weight (+ residual)        (Zhang & Sennrich 2019)

Rows of up to 16,384 numbers stay in registers between the sum and the product; wider ones are read twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, Build
from pinfer.kernels.rms_norm.reference import check_inputs

MOST_IN_REGISTERS = 16_384
NUMBERS_PER_WARP = 256  # 8 a thread: two 16-byte loads of each input


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, width, eps,
    HAS_RESIDUAL: tl.constexpr, IN_REGISTERS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK_D)
    if IN_REGISTERS:
        mask = column < width
        x = tl.load(x_ptr + row + column, mask=mask, other=0.0).to(tl.float32)  # [D]
        # Asked for before the sum is waited for.
        weight = tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)  # [D]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row + column, mask=mask, other=0.0).to(tl.float32)  # [D]
        out = x * tl.rsqrt(tl.sum(x * x, axis=0) / width + eps) * weight
        if HAS_RESIDUAL:
            out += residual
        tl.store(out_ptr + row + column, out, mask=mask)
    else:
        squares = tl.zeros([BLOCK_D], tl.float32)
        for first in range(0, width, BLOCK_D):
            x = tl.load(x_ptr + row + first + column, mask=first + column < width, other=0.0).to(tl.float32)
            squares += x * x
        scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        for first in range(0, width, BLOCK_D):
            mask = first + column < width
            x = tl.load(x_ptr + row + first + column, mask=mask, other=0.0).to(tl.float32)
            out = x * scale * tl.load(weight_ptr + first + column, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                out += tl.load(residual_ptr + row + first + column, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + row + first + column, out, mask=mask)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, *, eps: float, residual: torch.Tensor | None = None
) -> torch.Tensor:
    check_inputs(x, weight, residual)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    width = weight.numel()
    blocks, warps = blocks_of(width)
    _rms_norm_kernel[(x.numel() // max(1, width),)](
        x, weight, x if residual is None else residual.contiguous(), out, width, eps,
        HAS_RESIDUAL=residual is not None, **blocks, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return out


def blocks_of(width: int) -> tuple[dict[str, int], int]:
    """The constants of a row of that width and a program's warps, for every norm."""
    block_d = min(4096 if width > MOST_IN_REGISTERS else MOST_IN_REGISTERS, triton.next_power_of_2(width))
    return {"IN_REGISTERS": width <= MOST_IN_REGISTERS, "BLOCK_D": block_d}, min(
        16, max(1, block_d // NUMBERS_PER_WARP)
    )


def builds() -> list[Build]:
    """Heads (QK norm), the widths of 7B to 70B models, the widest row in registers and one that is wider."""
    arguments = dict.fromkeys(("x_ptr", "weight_ptr", "residual_ptr", "out_ptr"), FLOATS)
    arguments |= {"width": "i32", "eps": "fp32"}

    def build(width: int, has_residual: bool) -> Build:
        blocks, warps = blocks_of(width)
        label = f"rms_norm D={width}{' + residual' if has_residual else ''}"
        constants = {"HAS_RESIDUAL": has_residual, **blocks}
        wide = 1.0 if blocks["BLOCK_D"] >= 1024 else None  # fewer numbers than 128 a warp: 4 or 8 bytes a thread
        return Build(label, _rms_norm_kernel, arguments, constants, warps, multiples_of_16=("width",), wide_share=wide)

    widths = (64, 128, 256, 2048, 4096, 5120, 8192, 16_384, 18_432)
    return [build(width, has_residual) for width in widths for has_residual in (False, True)]
