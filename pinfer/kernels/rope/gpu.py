"""rope in Triton: a few heads of one token a program; the position is read on the device.

    out = x cos ∓ partner sin        (Su et al. 2021): pairs (2i, 2i + 1), or (i, i + dim / 2)

Each number is loaded twice, in its own place and as its partner's partner: the second comes from L1,
and one path serves both layouts and the numbers past `dim`, which do not turn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, LONGS, Build
from pinfer.kernels.rope.reference import check_inputs

BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, start_ptr, out_ptr, heads, positions,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    head, column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
    if INTERLEAVED:
        pair, partner, is_second = column // 2, column ^ 1, column % 2 == 1
    else:
        is_second = column >= DIM // 2
        partner = tl.where(is_second, column - DIM // 2, column + DIM // 2)
        pair = tl.minimum(column, partner)
    position = tl.load(start_ptr) + token + tl.zeros_like(column)  # [D], all the same
    # A position that the table lacks gives NaN: the host does not wait for `start` to refuse it.
    known = (column < DIM) & (position >= 0) & (position < positions)
    angle = position * (DIM // 2) + pair
    cos = tl.load(cos_ptr + angle, mask=known, other=float("nan")).to(tl.float32)  # [D]
    sin = tl.load(sin_ptr + angle, mask=known, other=float("nan")).to(tl.float32)  # [D]
    row = (token.to(tl.int64) * heads + head)[:, None] * HEAD_DIM
    inside = (head < heads)[:, None] & (column < HEAD_DIM)[None, :]
    turns = inside & (column < DIM)[None, :]
    x = tl.load(x_ptr + row + column[None, :], mask=inside, other=0.0).to(tl.float32)  # [H, D]
    other = tl.load(x_ptr + row + partner[None, :], mask=turns, other=0.0).to(tl.float32)  # [H, D]
    turned = x * cos[None, :] + tl.where(is_second[None, :], other, -other) * sin[None, :]
    tl.store(out_ptr + row + column[None, :], tl.where(turns, turned, x), mask=inside)


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """As the reference; on a GPU, positions that pass the table give NaN."""
    check_inputs(x, cos, sin, start)
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    blocks = _blocks(head_dim)
    _rope_kernel[(tokens, triton.cdiv(heads, blocks["BLOCK_H"]))](
        x, cos, sin, start, out, heads, cos.shape[0],
        HEAD_DIM=head_dim, DIM=2 * cos.shape[1], INTERLEAVED=interleaved, **blocks, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def _blocks(head_dim: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(head_dim)
    return {"BLOCK_H": max(1, BLOCK // block_d), "BLOCK_D": block_d}


def builds() -> list[Build]:
    arguments = {**dict.fromkeys(("x_ptr", "cos_ptr", "sin_ptr", "out_ptr"), FLOATS), "start_ptr": LONGS}
    arguments |= {"heads": "i32", "positions": "i32"}

    def build(head_dim: int, dim: int, interleaved: bool) -> Build:
        constants = {"HEAD_DIM": head_dim, "DIM": dim, "INTERLEAVED": interleaved, **_blocks(head_dim)}
        label = f"rope {' '.join(f'{name}={value}' for name, value in constants.items())}"
        return Build(label, _rope_kernel, arguments, constants, NUM_WARPS)

    sizes = ((64, 64), (128, 128), (256, 256), (128, 64), (80, 32), (96, 96))
    return [build(head_dim, dim, interleaved) for head_dim, dim in sizes for interleaved in (False, True)]
