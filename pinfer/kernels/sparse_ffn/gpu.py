"""sparse_ffn in Triton: one fused persistent kernel over the active list, then a sum of partial rows.

    y = Σ over active neurons i of act(g_i · x) · (u_i · x) · d_i

Program p of P takes the p-th of P even parts of the list, ROWS neurons at a time: gate rows · x, up
rows · x, and h · down rows into registers. It writes one partial row; `_combine_kernel` adds them in
order with the residual and a partial result from elsewhere (a cold shard's). No atomics, so results
repeat bitwise; the count is read on the device, so the host never waits for it.

The rows' loads come before the sums that need them: a sum over a row ends in a barrier that no load
is moved across, and the gate's 16 bytes a thread alone would leave memory idle. Under EARLY_EXIT, the
rule for ReLU where the list comes from a guess, up and down are asked for only once the gate is
known to be active: inactive rows cost a third of their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, INTS, Build
from pinfer.kernels.glu.gpu import activate
from pinfer.kernels.planes import repack
from pinfer.kernels.rounding import rounded_for
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.sparse_ffn.reference import check_inputs
from pinfer.kernels.tiles import (
    add_rows,
    dots,
    groups_of,
    load_raw,
    load_x,
    no_sums,
    store_sums,
    sums_of,
    warps_here,
    warps_of_64,
    wide_share,
)
from pinfer.quant import BY_NAME, QuantTensor

COMBINE_BLOCK, COMBINE_WARPS = 256, 2
PROGRAMS_INTERPRETED = 3  # without a device: few, as each costs the interpreter 0.3 ms


@dataclass(frozen=True)
class Launch:
    """How the fused kernel is cut: neurons at a time, warps a program, programs on a multiprocessor."""

    rows: int
    num_warps: int
    programs_per_sm: int

    @classmethod
    def of(cls, width: int) -> Launch:
        """A thread for each group of 32 weights, 256 threads where the width allows it.

        More groups a thread spill at 128 registers; fewer leave loads narrower than 16 bytes. Two
        programs of 256 threads fill the registers of a multiprocessor.
        """
        groups = triton.next_power_of_2(-(-width // 32))
        rows = max(1, min(16, 256 // groups))
        num_warps = min(32, max(1, rows * groups // 32))
        return cls(rows, num_warps, max(1, 16 // num_warps))


@triton.jit
def _sparse_ffn_kernel(
    x_ptr, gate_ptr, gate_stride, up_ptr, up_stride, down_ptr, down_stride,
    indices_ptr, count_ptr, mask_ptr, gate_values_ptr, partial_ptr, tokens, neurons,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, DOWN_TYPE: tl.constexpr,
    HAS_UP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GATE_VALUES: tl.constexpr, EARLY_EXIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    token = tl.program_id(1).to(tl.int64)
    g = tl.arange(0, BLOCK_G)
    x = load_x(x_ptr + token * WIDTH, g, WIDTH, GROUPS, GATE_TYPE)
    x_sums = sums_of(x, GATE_TYPE)
    x_up, x_up_sums = x, x_sums
    if UP_TYPE != GATE_TYPE:
        x_up = load_x(x_ptr + token * WIDTH, g, WIDTH, GROUPS, UP_TYPE)
        x_up_sums = sums_of(x_up, UP_TYPE)
    sums, minima = no_sums(ROWS, BLOCK_G)
    count = tl.load(count_ptr).to(tl.int64)
    last = (count * (program + 1) // programs).to(tl.int32)
    for first in range((count * program // programs).to(tl.int32), last, ROWS):
        k = first + tl.arange(0, ROWS)
        n = tl.load(indices_ptr + k, mask=k < last, other=0).to(tl.int64)  # [ROWS]
        wanted = k < last
        if HAS_MASK:
            wanted &= tl.load(mask_ptr + token * neurons + n, mask=wanted, other=0) != 0
        if HAS_GATE_VALUES:
            gate = tl.load(gate_values_ptr + token * neurons + n, mask=wanted, other=0.0)
        else:
            raw_gate = load_raw(gate_ptr + n * gate_stride, wanted, g, GROUPS, GATE_TYPE)
        if EARLY_EXIT:
            gate = dots(raw_gate, x, x_sums, GATE_TYPE)
            wanted &= activate(gate, ACTIVATION) != 0.0
        if HAS_UP:
            raw_up = load_raw(up_ptr + n * up_stride, wanted, g, GROUPS, UP_TYPE)
        raw_down = load_raw(down_ptr + n * down_stride, wanted, g, GROUPS, DOWN_TYPE)
        if not EARLY_EXIT and not HAS_GATE_VALUES:
            gate = dots(raw_gate, x, x_sums, GATE_TYPE)
        h = tl.where(wanted, activate(gate, ACTIVATION), 0.0)
        if HAS_UP:
            h *= dots(raw_up, x_up, x_up_sums, UP_TYPE)
        sums, minima = add_rows(sums, minima, raw_down, h, DOWN_TYPE)
    store_sums(partial_ptr + (program * tokens + token) * WIDTH, sums, minima, g, WIDTH, GROUPS, DOWN_TYPE)


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


def sparse_ffn(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    *,
    activation: str,
    mask: torch.Tensor | None = None,
    gate_values: torch.Tensor | None = None,
    int8: bool = False,
) -> torch.Tensor:
    """As the reference. Weights in blocks are repacked at every call: `repack` them once."""
    check_inputs(x, gate, up, down, active, activation, mask, gate_values)
    if int8 and up is not None and up.type.block_size != gate.type.block_size:
        raise NotImplementedError(f"int8 with gate in {gate.type} and up in {up.type}: their blocks differ")
    x = rounded_for(x.float(), gate) if int8 else x
    return combine(partials(x, gate, up, down, active, activation, mask, gate_values))


def partials(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    activation: str,
    mask: torch.Tensor | None = None,
    gate_values: torch.Tensor | None = None,
) -> torch.Tensor:
    """The fused kernel alone, for inputs as the reference's: float32 [programs, T, D], whose sum is y."""
    gate, down = repack(gate), repack(down)
    up_or_gate = gate if up is None else repack(up)
    tokens, width = x.shape
    launch, groups = Launch.of(width), groups_of(gate)
    x = x.contiguous()
    programs = _programs(x.device, launch)
    partial = torch.empty(programs, tokens, width, dtype=torch.float32, device=x.device)
    _sparse_ffn_kernel[(programs, tokens)](
        x, gate.blocks, gate.blocks.stride(0), up_or_gate.blocks, up_or_gate.blocks.stride(0),
        down.blocks, down.blocks.stride(0), active.indices, active.count,
        active.count if mask is None else mask.contiguous().view(torch.uint8),
        x if gate_values is None else gate_values.contiguous(),
        partial, tokens, gate.rows,
        WIDTH=width, GROUPS=groups, ACTIVATION=activation,
        GATE_TYPE=gate.type.name, UP_TYPE=up_or_gate.type.name, DOWN_TYPE=down.type.name,
        HAS_UP=up is not None, HAS_MASK=mask is not None, HAS_GATE_VALUES=gate_values is not None,
        EARLY_EXIT=activation in ("relu", "relu2") and gate_values is None,
        ROWS=launch.rows, BLOCK_G=triton.next_power_of_2(groups), num_warps=warps_here(launch.num_warps), num_stages=1,
    )  # fmt: skip
    return partial


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
    _combine_kernel[(triton.cdiv(size, COMBINE_BLOCK),)](
        partial, partial if residual is None else residual.contiguous(),
        partial if external is None else external.contiguous(), out, programs, size,
        HAS_RESIDUAL=residual is not None, HAS_EXTERNAL=external is not None, BLOCK=COMBINE_BLOCK,
        num_warps=COMBINE_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def _programs(device: torch.device, launch: Launch) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return launch.programs_per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def builds() -> list[Build]:
    """Every type at 7B's width, those that models have at 13B's and 70B's, and every switch of the kernel."""
    shape = [build_of(name, name, 4096) for name in BY_NAME]
    shape += [build_of(name, "Q8_0", width) for name in ("Q4_K", "Q5_K", "Q6_K") for width in (4096, 5120, 8192)]
    shape += [build_of(name, name, width) for name in ("F16", "BF16", "Q8_0", "Q4_0") for width in (5120, 8192)]
    shape += [build_of("Q8_0", "Q8_0", width) for width in (640, 2048)]
    return [
        *shape,
        *(build_of("Q4_K", "Q8_0", 4096, activation=name) for name in ("relu", "relu2", "gelu_tanh")),
        build_of("Q8_0", "Q8_0", 4096, HAS_MASK=True),
        build_of("Q8_0", "Q8_0", 4096, activation="relu", HAS_GATE_VALUES=True, HAS_MASK=True),
        build_of("F16", "F16", 4096, activation="relu", HAS_UP=False),
        _combine_build(False),
        _combine_build(True),
    ]


def build_of(gate: str, down: str, width: int, activation: str = "silu", **switches: bool) -> Build:
    """The build that `partials` launches for matrices of these types and width."""
    strides = ("gate_stride", "up_stride", "down_stride")
    arguments = {
        **dict.fromkeys(("x_ptr", "gate_values_ptr", "partial_ptr"), FLOATS),
        **dict.fromkeys(("gate_ptr", "up_ptr", "down_ptr", "mask_ptr"), BYTES),
        **dict.fromkeys(("indices_ptr", "count_ptr"), INTS),
        **dict.fromkeys(strides, "i64"),
        **dict.fromkeys(("tokens", "neurons"), "i32"),
    }
    switches = {"HAS_UP": True, "HAS_MASK": False, "HAS_GATE_VALUES": False, **switches}
    launch, groups = Launch.of(width), -(-width // 32)
    constants = {
        "WIDTH": width, "GROUPS": groups, "ACTIVATION": activation,
        "GATE_TYPE": gate, "UP_TYPE": gate, "DOWN_TYPE": down, **switches,
        "EARLY_EXIT": activation in ("relu", "relu2") and not switches["HAS_GATE_VALUES"],
        "ROWS": launch.rows, "BLOCK_G": triton.next_power_of_2(groups),
    }  # fmt: skip
    on = " ".join(name.lower() for name, value in switches.items() if value)
    label = f"sparse_ffn {gate} down {down} D={width} {activation} {on}"
    return Build(
        label,
        _sparse_ffn_kernel,
        arguments,
        constants,
        launch.num_warps,
        multiples_of_16=strides,
        wide_share=wide_share(BY_NAME[gate], BY_NAME[down]),
        warps_of_64=warps_of_64(launch.num_warps),
    )


def _combine_build(with_more: bool) -> Build:
    arguments = {
        **dict.fromkeys(("partial_ptr", "residual_ptr", "external_ptr", "out_ptr"), FLOATS),
        "programs": "i32", "size": "i32",
    }  # fmt: skip
    constants = {"HAS_RESIDUAL": with_more, "HAS_EXTERNAL": with_more, "BLOCK": COMBINE_BLOCK}
    label = "combine with residual and external" if with_more else "combine"
    return Build(label, _combine_kernel, arguments, constants, COMBINE_WARPS, multiples_of_16=("size",))
