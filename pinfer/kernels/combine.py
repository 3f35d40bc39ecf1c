"""Partial results of a kernel's programs, added in a fixed order: what stands where others use atomics.

So results repeat bitwise, and nothing has to be zeroed before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, Build

PARTS, BLOCK, NUM_WARPS = 16, 64, 4  # loads at a time: 264 partial rows in turn would be 264 waits


@triton.jit
def _combine_kernel(
    partial_ptr, residual_ptr, external_ptr, out_ptr, programs, size,
    HAS_RESIDUAL: tl.constexpr, HAS_EXTERNAL: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    part = tl.arange(0, PARTS)
    sums = tl.zeros([PARTS, BLOCK], tl.float32)
    for first in range(0, programs, PARTS):
        row = (first + part).to(tl.int64)[:, None] * size
        sums += tl.load(partial_ptr + row + at[None, :], mask=(first + part < programs)[:, None] & inside, other=0.0)
    total = tl.sum(sums, axis=0)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0)
    if HAS_EXTERNAL:
        total += tl.load(external_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + at, total, mask=inside)


def combine(
    partial: torch.Tensor, residual: torch.Tensor | None = None, external: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum over partial float32 [P, T, D], in a fixed order, with a residual and another device's part [T, D]."""
    programs, tokens, width = partial.shape
    for name, part in (("residual", residual), ("external", external)):
        if part is not None and (part.shape != (tokens, width) or part.dtype != torch.float32):
            raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, expected torch.float32 [{tokens}, {width}]")
    out = torch.empty(tokens, width, dtype=torch.float32, device=partial.device)
    size = tokens * width
    _combine_kernel[(triton.cdiv(size, BLOCK),)](
        partial, partial if residual is None else residual.contiguous(),
        partial if external is None else external.contiguous(), out, programs, size,
        HAS_RESIDUAL=residual is not None, HAS_EXTERNAL=external is not None, PARTS=PARTS, BLOCK=BLOCK,
        num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def summed(partial: torch.Tensor) -> torch.Tensor:
    """The sum over partial float32 [P, T, D]: itself, without a copy, where there is one part."""
    return partial[0] if partial.shape[0] == 1 else combine(partial)


def builds() -> list[Build]:
    return [_build(with_more=False), _build(with_more=True)]


def _build(with_more: bool) -> Build:
    arguments = {
        **dict.fromkeys(("partial_ptr", "residual_ptr", "external_ptr", "out_ptr"), FLOATS),
        "programs": "i32", "size": "i32",
    }  # fmt: skip
    constants = {"HAS_RESIDUAL": with_more, "HAS_EXTERNAL": with_more, "PARTS": PARTS, "BLOCK": BLOCK}
    label = "combine with residual and external" if with_more else "combine"
    return Build(label, _combine_kernel, arguments, constants, NUM_WARPS, multiples_of_16=("size",), wide_share=0.9)
