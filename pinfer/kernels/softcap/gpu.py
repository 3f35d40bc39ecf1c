"""softcap in Triton: one pass over the numbers.

out = cap · tanh(x / cap)        (Gemma 2, Gemma Team 2024)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, Build
from pinfer.kernels.softcap.reference import check_cap

BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def hyperbolic_tangent(x):
    """Cephes' polynomial near 0, where 1 - 2 / (exp(2 |x|) + 1) would cancel."""
    z, size = x * x, tl.abs(x)
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (p * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.minimum(size, 44.0)) + 1.0)  # 1 beyond 9; exp must not reach infinity
    return tl.where(size < 0.625, near, tl.where(x < 0.0, -far, tl.where(x == x, far, x)))


@triton.jit
def _softcap_kernel(x_ptr, out_ptr, size, cap, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, cap * hyperbolic_tangent(x / cap), mask=at < size)


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    check_cap(cap)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _softcap_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, out, x.numel(), cap, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return out


def builds() -> list[Build]:
    arguments = {"x_ptr": FLOATS, "out_ptr": FLOATS, "size": "i32", "cap": "fp32"}
    constants = {"BLOCK": BLOCK}
    return [
        Build("softcap", _softcap_kernel, arguments, constants, NUM_WARPS, multiples_of_16=("size",), wide_share=1.0)
    ]
