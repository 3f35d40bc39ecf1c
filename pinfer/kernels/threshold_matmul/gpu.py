"""threshold_matmul in Triton: for one token, product, threshold, flags and counts are one launch; then compaction.

A program takes TILE rows, one tile of `compact`. Several tokens multiply first and compare then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, INTS, Build
from pinfer.kernels.glu.gpu import activate, glu
from pinfer.kernels.planes import repack
from pinfer.kernels.quant_matmul.gpu import quant_matmul
from pinfer.kernels.rounding import rounded_for
from pinfer.kernels.select_active.gpu import compact, load_threshold, select_with_mask
from pinfer.kernels.threshold_matmul.reference import Thresholded, check_inputs
from pinfer.kernels.tiles import build_over_rows, dots, groups_of, load_raw, load_x, rows_and_warps, sums_of, warps_here
from pinfer.quant import BY_NAME, QuantTensor

TILE = 32  # rows a program: 344 programs for 7B's 11,008 neurons, 896 for 70B's


@triton.jit
def _threshold_matmul_kernel(
    x_ptr, weight_ptr, row_stride, threshold_ptr, shift_ptr, bias_ptr, values_ptr, flags_ptr, tile_counts_ptr, rows,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr, MAGNITUDE_OF: tl.constexpr, CUTOFF: tl.constexpr,
    PER_NEURON: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    g = tl.arange(0, BLOCK_G)
    x = load_x(x_ptr, g, WIDTH, GROUPS, TYPE)
    x_sums = sums_of(x, TYPE)
    begin = tl.program_id(0) * TILE
    end = tl.minimum(begin + TILE, rows)
    count = tl.zeros([ROWS], tl.int32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        wanted = row < end
        raw = load_raw(weight_ptr + row.to(tl.int64) * row_stride, wanted, g, GROUPS, TYPE)
        value = dots(raw, x, x_sums, TYPE)  # [ROWS]
        if HAS_BIAS:
            value += tl.load(bias_ptr + row, mask=wanted, other=0.0)
        score = value
        if MAGNITUDE_OF != "":
            score = activate(value, MAGNITUDE_OF, CUTOFF)
            if HAS_SHIFT:
                score -= tl.load(shift_ptr + row, mask=wanted, other=0.0)
            score = tl.abs(score)
        threshold = load_threshold(threshold_ptr, row, end, PER_NEURON)
        active = tl.where(score <= threshold, 0, tl.where(wanted, 1, 0))  # NaN is active
        tl.store(values_ptr + row, value, mask=wanted)
        tl.store(flags_ptr + row, active.to(tl.uint8), mask=wanted)
        count += active
    tl.store(tile_counts_ptr + tl.program_id(0), tl.sum(count, axis=0))


def threshold_matmul(
    x: torch.Tensor,
    weight: QuantTensor,
    threshold: torch.Tensor,
    *,
    magnitude_of: str | None = None,
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
    int8: bool = False,
) -> Thresholded:
    """As the reference. Weights in blocks are repacked at every call: `repack` them once."""
    check_inputs(x, weight, threshold, magnitude_of, shift, gate_bias, cutoff)
    weight = repack(weight)
    if x.shape[0] != 1:
        values = quant_matmul(x, weight, gate_bias, int8=int8)
        scores = values
        if magnitude_of is not None:
            scores = glu(values, activation=magnitude_of, magnitude=True, shift=shift, cutoff=cutoff)
        return Thresholded(*select_with_mask(scores, threshold), values)
    x = (rounded_for(x.float(), weight) if int8 else x).contiguous()
    groups, tiles = groups_of(weight), triton.cdiv(weight.rows, TILE)
    block_g = triton.next_power_of_2(groups)
    rows, num_warps = rows_and_warps(block_g)
    values = torch.empty(1, weight.rows, dtype=torch.float32, device=x.device)
    flags = torch.empty(weight.rows, dtype=torch.uint8, device=x.device)
    tile_counts = torch.empty(tiles, dtype=torch.int32, device=x.device)
    _threshold_matmul_kernel[(tiles,)](
        x, weight.blocks, weight.blocks.stride(0), threshold.contiguous(),
        threshold if shift is None else shift.contiguous(),
        threshold if gate_bias is None else gate_bias.contiguous(), values, flags, tile_counts, weight.rows,
        WIDTH=weight.columns, GROUPS=groups, TYPE=weight.type.name, MAGNITUDE_OF=magnitude_of or "",
        CUTOFF=float(cutoff), PER_NEURON=threshold.numel() > 1, HAS_SHIFT=shift is not None,
        HAS_BIAS=gate_bias is not None, TILE=TILE, ROWS=rows, BLOCK_G=block_g,
        num_warps=warps_here(num_warps), num_stages=1,
    )  # fmt: skip
    return Thresholded(compact(flags, tile_counts, TILE), None, values)


def builds() -> list[Build]:
    """The gate of 7B in every type, and second matrices of low-rank predictors in 8 and 4 bits."""
    return [
        *(_build(name, 4096, "silu") for name in BY_NAME),
        *(_build(name, rank, "") for name in ("Q8_0", "Q4_0") for rank in (128, 1024)),
        _build("Q4_K", 8192, "gelu_tanh"),
        _build("Q4_K", 4096, "silu", shifted=True),
        _build("Q4_K", 4096, "relu", cutoff=0.01),
        _build("F16", 4096, "", biased=True),
        _build("Q8_0", 8192, "relu", biased=True),
    ]


def _build(
    name: str, columns: int, magnitude_of: str, *, shifted: bool = False, biased: bool = False, cutoff: float = 0.0
) -> Build:
    arguments = {
        **dict.fromkeys(("x_ptr", "threshold_ptr", "shift_ptr", "bias_ptr", "values_ptr"), FLOATS), "tile_counts_ptr": INTS,
        **dict.fromkeys(("weight_ptr", "flags_ptr"), BYTES), "row_stride": "i64", "rows": "i32",
    }  # fmt: skip
    block_g = triton.next_power_of_2(-(-columns // 32))
    rows, num_warps = rows_and_warps(block_g)
    constants = {
        "WIDTH": columns, "GROUPS": -(-columns // 32), "TYPE": name, "MAGNITUDE_OF": magnitude_of,
        "CUTOFF": cutoff, "PER_NEURON": not magnitude_of or shifted, "HAS_SHIFT": shifted, "HAS_BIAS": biased, "TILE": TILE, "ROWS": rows, "BLOCK_G": block_g,
    }  # fmt: skip
    on = "".join(f" {word}" for word, given in (("shifted", shifted), ("biased", biased), ("cutoff", cutoff)) if given)
    strides, label = ("row_stride", "rows"), f"threshold_matmul {name} columns={columns} {magnitude_of}{on}"
    return build_over_rows(
        label,
        _threshold_matmul_kernel,
        arguments,
        constants,
        num_warps,
        name,
        strides=strides,
        rows_share=0.95 if biased else 1.0,
    )
