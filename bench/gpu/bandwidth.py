"""What this GPU's memory delivers: a large copy and a read-only sum, the roof of every other figure.

copy: bytes read plus bytes written over time; read: bytes read over time. Buffers exceed the L2
cache many times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 4096, 8  # 16 floats a thread: four 16-byte loads in flight
READ_PROGRAMS_PER_SM = 8  # 8 x 8 warps fill an SM's 64


@triton.jit
def _copy_kernel(from_ptr, to_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=at < size), mask=at < size)


@triton.jit
def _read_kernel(from_ptr, sums_ptr, size, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(tl.cdiv(size, step)):
        sums += tl.load(from_ptr + at, mask=at < size, other=0.0)
        at += step
    tl.store(sums_ptr + tl.program_id(0), tl.sum(sums, axis=0))


def copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy float32 [size] to float32 [size]."""
    grid = (triton.cdiv(source.numel(), BLOCK),)
    _copy_kernel[grid](source, target, source.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)


def read(source: torch.Tensor, sums: torch.Tensor) -> None:
    """Sum float32 [size] into one partial sum a program, float32 [programs]."""
    _read_kernel[(sums.numel(),)](source, sums, source.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS)


def read_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return 3
    return READ_PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
