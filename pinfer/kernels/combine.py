"""Partial results of a kernel's programs, added in order: what stands where others use atomics.

The order is fixed, so results repeat bitwise, and nothing has to be zeroed before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, Build

BLOCK, NUM_WARPS = 256, 2


@triton.jit
def _combine_kernel(
    partial_ptr, residual_ptr, external_ptr, out_ptr, programs, size,
    HAS_RESIDUAL: tl.constexpr, HAS_EXTERNAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0)
    if HAS_EXTERNAL:
        total += tl.load(external_ptr + at, mask=inside, other=0.0)
    row_ptr = partial_ptr + at
    for _ in range(programs):
        total += tl.load(row_ptr, mask=inside, other=0.0)
        row_ptr += size
    tl.store(out_ptr + at, total, mask=inside)


def combine(
    partial: torch.Tensor, residual: torch.Tensor | None = None, external: torch.Tensor | None = None
) -> torch.Tensor:
    """The sum over partial float32 [P, T, D], in order, on top of a residual and another device's part [T, D]."""
    programs, tokens, width = partial.shape
    for name, part in (("residual", residual), ("external", external)):
        if part is not None and (part.shape != (tokens, width) or part.dtype != torch.float32):
            raise ValueError(f"{name} is {part.dtype} {list(part.shape)}, expected torch.float32 [{tokens}, {width}]")
    out = torch.empty(tokens, width, dtype=torch.float32, device=partial.device)
    size = tokens * width
    _combine_kernel[(triton.cdiv(size, BLOCK),)](
        partial, partial if residual is None else residual.contiguous(),
        partial if external is None else external.contiguous(), out, programs, size,
        HAS_RESIDUAL=residual is not None, HAS_EXTERNAL=external is not None, BLOCK=BLOCK,
        num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    return [_build(with_more=False), _build(with_more=True)]


def _build(with_more: bool) -> Build:
    arguments = {
        **dict.fromkeys(("partial_ptr", "residual_ptr", "external_ptr", "out_ptr"), FLOATS),
        "programs": "i32", "size": "i32",
    }  # fmt: skip
    constants = {"HAS_RESIDUAL": with_more, "HAS_EXTERNAL": with_more, "BLOCK": BLOCK}
    label = "combine with residual and external" if with_more else "combine"
    return Build(label, _combine_kernel, arguments, constants, NUM_WARPS, multiples_of_16=("size",))
