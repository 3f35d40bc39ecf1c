"""tally in Triton: totals += (count · tokens, tokens), in one launch of one thread where torch takes five.

A mask is added up by torch: up to 512 · 28,672 flags are work for many programs, and a sum of
integers is the same in any order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import INTS, LONGS, Build
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.tally.reference import check_inputs


@triton.jit
def _tally_kernel(count_ptr, totals_ptr, factor, tokens):
    tl.store(totals_ptr, tl.load(totals_ptr) + tl.load(count_ptr).to(tl.int64) * factor)
    tl.store(totals_ptr + 1, tl.load(totals_ptr + 1) + tokens)


def tally(active: Active, totals: torch.Tensor, *, tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    check_inputs(totals, tokens, mask)
    if mask is None:
        _tally_kernel[(1,)](active.count, totals, tokens, tokens, num_warps=1, num_stages=1)
    else:
        _tally_kernel[(1,)](mask.sum(dtype=torch.int64), totals, 1, tokens, num_warps=1, num_stages=1)
    return totals


def builds() -> list[Build]:
    integers = {"factor": "i32", "tokens": "i32"}
    return [
        Build(label, _tally_kernel, {"count_ptr": count, "totals_ptr": LONGS, **integers}, {}, 1)
        for label, count in (("tally a list", INTS), ("tally a mask", LONGS))
    ]
