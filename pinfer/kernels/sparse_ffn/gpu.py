"""sparse_ffn in Triton: for one token one fused persistent kernel over the active list, then a sum of partial rows.

    y = Σ over active neurons i of act(g_i · x) · (u_i · x) · d_i

Program p of P takes the p-th of P even parts of the list, ROWS neurons at a time: gate rows · x, up
rows · x, and h · down rows into registers. It writes one partial row; `_combine_kernel` adds them in
order with the residual and a partial result from elsewhere (a cold shard's). No atomics, so results
repeat bitwise; the count is read on the device, so the host never waits for it.

The rows' loads come before the sums that need them: a sum over a row ends in a barrier that no load
is moved across, and the gate's 16 bytes a thread alone would leave memory idle. Under EARLY_EXIT, the
rule for ReLU where the list comes from a guess, up and down are asked for only once the gate is
known to be active: inactive rows cost a third of their bytes.

Several tokens share the union of their lists, and each listed row is read once for all of them: gate
and up products on tensor cores, h [T, K] through memory with each token's mask applied, then the
sums of down rows on tensor cores (see `tensor_cores`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pinfer.kernels import combine as combining
from pinfer.kernels.activation import ZERO_BELOW_ZERO
from pinfer.kernels.aot import BYTES, FLOATS, INTS, Build
from pinfer.kernels.combine import combine
from pinfer.kernels.glu.gpu import activate, activate_up
from pinfer.kernels.planes import repack
from pinfer.kernels.rounding import rounded_for
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.sparse_ffn.reference import check_inputs, check_list
from pinfer.kernels.tensor_cores import products, products_build, row_sums, row_sums_build
from pinfer.kernels.tiles import (
    add_rows,
    build_over_rows,
    dots,
    groups_of,
    load_raw,
    load_x,
    no_sums,
    rows_and_warps,
    store_sums,
    sums_of,
    warps_here,
)
from pinfer.kernels.tuning import launch_for
from pinfer.quant import BY_NAME, QuantTensor

HIDDEN_BLOCK, HIDDEN_WARPS = 256, 2
PROGRAMS_INTERPRETED = 3  # without a device: few, as each costs the interpreter 0.3 ms


@dataclass(frozen=True)
class Launch:
    """How the fused kernel is cut: neurons at a time, warps a program, programs on a multiprocessor."""

    rows: int
    num_warps: int
    programs_per_sm: int

    @classmethod
    def of(cls, width: int) -> Launch:
        """The untuned choice. Two programs of 256 threads fill the registers of a multiprocessor."""
        rows, num_warps = rows_and_warps(triton.next_power_of_2(-(-width // 32)))
        return cls(rows, num_warps, max(1, 16 // num_warps))

    @classmethod
    def variants(cls, width: int) -> Iterator[Launch]:
        """What `tuning` tries."""
        groups, default = triton.next_power_of_2(-(-width // 32)), cls.of(width)
        for rows in {max(1, default.rows // 2), default.rows, 2 * default.rows}:
            for num_warps in {max(1, rows * groups // 64), max(1, rows * groups // 32)}:
                yield from (cls(rows, num_warps, programs) for programs in (1, 2, 3, 4, 6, 8) if num_warps <= 16)


@triton.jit
def _sparse_ffn_kernel(
    x_ptr, gate_ptr, gate_stride, up_ptr, up_stride, down_ptr, down_stride,
    indices_ptr, count_ptr, mask_ptr, gate_values_ptr, shift_ptr, bias_ptr, partial_ptr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, CUTOFF: tl.constexpr,
    GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, DOWN_TYPE: tl.constexpr,
    HAS_UP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GATE_VALUES: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr, EARLY_EXIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    g = tl.arange(0, BLOCK_G)
    x = load_x(x_ptr, g, WIDTH, GROUPS, GATE_TYPE)
    x_sums = sums_of(x, GATE_TYPE)
    x_up, x_up_sums = x, x_sums
    if UP_TYPE != GATE_TYPE:
        x_up = load_x(x_ptr, g, WIDTH, GROUPS, UP_TYPE)
        x_up_sums = sums_of(x_up, UP_TYPE)
    sums, minima = no_sums(ROWS, BLOCK_G)
    count = tl.load(count_ptr).to(tl.int64)
    last = (count * (program + 1) // programs).to(tl.int32)
    for first in range((count * program // programs).to(tl.int32), last, ROWS):
        k = first + tl.arange(0, ROWS)
        n = tl.load(indices_ptr + k, mask=k < last, other=0).to(tl.int64)  # [ROWS]
        wanted = k < last
        if HAS_MASK:
            wanted &= tl.load(mask_ptr + n, mask=wanted, other=0) != 0
        if HAS_GATE_VALUES:
            gate = tl.load(gate_values_ptr + n, mask=wanted, other=0.0)
        else:
            raw_gate = load_raw(gate_ptr + n * gate_stride, wanted, g, GROUPS, GATE_TYPE)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + n, mask=wanted, other=0.0)
        if EARLY_EXIT:
            gate = dots(raw_gate, x, x_sums, GATE_TYPE)
            if HAS_BIAS:
                gate += bias
            wanted &= activate(gate, ACTIVATION, CUTOFF) != 0.0
        if HAS_UP:
            raw_up = load_raw(up_ptr + n * up_stride, wanted, g, GROUPS, UP_TYPE)
        raw_down = load_raw(down_ptr + n * down_stride, wanted, g, GROUPS, DOWN_TYPE)
        if not EARLY_EXIT and not HAS_GATE_VALUES:
            gate = dots(raw_gate, x, x_sums, GATE_TYPE)
            if HAS_BIAS:
                gate += bias
        h = activate(gate, ACTIVATION, CUTOFF)
        if HAS_SHIFT:
            h -= tl.load(shift_ptr + n, mask=wanted, other=0.0)
        h = tl.where(wanted, h, 0.0)
        if HAS_UP:
            h *= activate_up(dots(raw_up, x_up, x_up_sums, UP_TYPE), ACTIVATION)
        sums, minima = add_rows(sums, minima, raw_down, h, DOWN_TYPE)
    store_sums(partial_ptr + program * WIDTH, sums, minima, g, WIDTH, GROUPS, DOWN_TYPE)


@triton.jit
def _hidden_kernel(
    partial_ptr, gate_values_ptr, shift_ptr, bias_ptr, mask_ptr, indices_ptr, count_ptr, out_ptr, tokens, neurons, parts,
    ACTIVATION: tl.constexpr, CUTOFF: tl.constexpr, HAS_UP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GATE_VALUES: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """h [T, N] by place in the list, of partial products [gate and up as far as there are, parts, T, N]."""
    count, token = tl.load(count_ptr), tl.program_id(0).to(tl.int64)
    size = tokens.to(tl.int64) * neurons
    for first in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        k = first + tl.arange(0, BLOCK)
        inside = k < count
        n = tl.load(indices_ptr + k, mask=inside, other=0).to(tl.int64)
        row_ptr = partial_ptr + token * neurons + k
        if HAS_GATE_VALUES:
            gate = tl.load(gate_values_ptr + token * neurons + n, mask=inside, other=0.0)
        else:
            gate = tl.zeros([BLOCK], tl.float32)
            for _ in range(parts):
                gate += tl.load(row_ptr, mask=inside, other=0.0)
                row_ptr += size
            if HAS_BIAS:
                gate += tl.load(bias_ptr + n, mask=inside, other=0.0)
        h = activate(gate, ACTIVATION, CUTOFF)
        if HAS_SHIFT:
            h -= tl.load(shift_ptr + n, mask=inside, other=0.0)
        if HAS_UP:
            up = tl.zeros([BLOCK], tl.float32)
            for _ in range(parts):
                up += tl.load(row_ptr, mask=inside, other=0.0)
                row_ptr += size
            h *= activate_up(up, ACTIVATION)
        if HAS_MASK:
            used = tl.load(mask_ptr + token * neurons + n, mask=inside, other=0) != 0
            h = tl.where(used, h, 0.0)
        tl.store(out_ptr + token * neurons + k, h, mask=inside)


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
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
    int8: bool = False,
) -> torch.Tensor:
    """As the reference. Weights in blocks are repacked at every call: `repack` them once."""
    check_inputs(x, gate, up, down, active, activation, mask, gate_values, shift, gate_bias, cutoff)
    if not x.is_cuda:
        check_list(active, gate.rows)  # the interpreter would crash
    if int8 and up is not None and up.type.block_size != gate.type.block_size:
        raise NotImplementedError(f"int8 with gate in {gate.type} and up in {up.type}: their blocks differ")
    x = rounded_for(x.float(), gate) if int8 else x
    return combine(partials(x, gate, up, down, active, activation, mask, gate_values, shift, gate_bias, cutoff))


def partials(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    activation: str,
    mask: torch.Tensor | None = None,
    gate_values: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> torch.Tensor:
    """What `combine` makes y of, for inputs as the reference's: float32 [parts, T, D], whose sum is y."""
    gate, up, down = repack(gate), None if up is None else repack(up), repack(down)
    mask, gate_values, shift, gate_bias = (
        None if one is None else one.contiguous() for one in (mask, gate_values, shift, gate_bias)
    )
    compute = _fused if x.shape[0] == 1 else _batched
    return compute(x.contiguous(), gate, up, down, active, activation, mask, gate_values, shift, gate_bias, cutoff)


def _fused(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    activation: str,
    mask: torch.Tensor | None,
    gate_values: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    cutoff: float,
) -> torch.Tensor:
    width = x.shape[1]
    groups, up_or_gate = groups_of(gate), gate if up is None else up
    biased = gate_bias is not None and gate_values is None
    launch = launch_for(
        "sparse_ffn", x.device, Launch.of(width), candidates=lambda: Launch.variants(width),
        width=width, gate=gate.type.name, up=up_or_gate.type.name, down=down.type.name, activation=activation,
        switches=f"{up is not None} {mask is not None} {gate_values is not None} {shift is not None}"
        + (" biased" if biased else "") + (" cutoff" if cutoff else ""),
    )  # fmt: skip
    programs = _programs(x.device, launch)
    partial = torch.empty(programs, 1, width, dtype=torch.float32, device=x.device)
    _sparse_ffn_kernel[(programs,)](
        x, gate.blocks, gate.blocks.stride(0), up_or_gate.blocks, up_or_gate.blocks.stride(0),
        down.blocks, down.blocks.stride(0), active.indices, active.count,
        active.count if mask is None else mask.view(torch.uint8), x if gate_values is None else gate_values,
        x if shift is None else shift, x if gate_bias is None else gate_bias, partial,
        WIDTH=width, GROUPS=groups, ACTIVATION=activation, CUTOFF=float(cutoff),
        GATE_TYPE=gate.type.name, UP_TYPE=up_or_gate.type.name, DOWN_TYPE=down.type.name,
        HAS_UP=up is not None, HAS_MASK=mask is not None, HAS_GATE_VALUES=gate_values is not None,
        HAS_SHIFT=shift is not None, HAS_BIAS=biased,
        EARLY_EXIT=activation in ZERO_BELOW_ZERO and gate_values is None and shift is None,
        ROWS=launch.rows, BLOCK_G=triton.next_power_of_2(groups), num_warps=warps_here(launch.num_warps), num_stages=1,
    )  # fmt: skip
    return partial


def _batched(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    activation: str,
    mask: torch.Tensor | None,
    gate_values: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    cutoff: float,
) -> torch.Tensor:
    tokens, neurons = x.shape[0], gate.rows
    read = [weight for weight in (gate if gate_values is None else None, up) if weight is not None]
    partial = products(x, read, active) if read else x.new_empty(0, 1, tokens, neurons)
    h = torch.empty(tokens, neurons, dtype=torch.float32, device=x.device)
    blocks = triton.cdiv(neurons, HIDDEN_BLOCK) if x.is_cuda else 1
    _hidden_kernel[(tokens, blocks)](
        partial, x if gate_values is None else gate_values, x if shift is None else shift,
        x if gate_bias is None else gate_bias, active.count if mask is None else mask.view(torch.uint8), active.indices, active.count, h,
        tokens, neurons, partial.shape[1],
        ACTIVATION=activation, CUTOFF=float(cutoff), HAS_UP=up is not None, HAS_MASK=mask is not None,
        HAS_GATE_VALUES=gate_values is not None, HAS_SHIFT=shift is not None, HAS_BIAS=gate_bias is not None,
        BLOCK=HIDDEN_BLOCK, num_warps=HIDDEN_WARPS, num_stages=1,
    )  # fmt: skip
    return row_sums(h, down, active)


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
        *(build_of("Q4_K", "Q8_0", 4096, activation=name) for name in ("relu", "relu2", "drelu", "gelu_tanh")),
        build_of("Q8_0", "Q8_0", 4096, HAS_MASK=True),
        build_of("Q8_0", "Q8_0", 4096, activation="relu", HAS_GATE_VALUES=True, HAS_MASK=True),
        build_of("F16", "F16", 4096, activation="relu", HAS_UP=False),
        build_of("Q4_K", "Q8_0", 4096, HAS_GATE_VALUES=True, HAS_SHIFT=True),
        build_of("Q4_K", "Q8_0", 4096, activation="relu", cutoff=0.01),
        *(build_of(name, "Q8_0", 4096, activation="relu", HAS_UP=False, HAS_BIAS=True) for name in ("F16", "Q4_K")),
        build_of("Q8_0", "Q8_0", 8192, activation="gelu", HAS_UP=False),
        *(products_build(name, 4096, listed=True) for name in BY_NAME),
        *(row_sums_build(name, 4096, listed=True) for name in BY_NAME),
        products_build("F32", 1120, listed=True),
        products_build("Q4_K", 5120, listed=True),
        row_sums_build("Q8_0", 8192, listed=True),
        _hidden_build("silu", HAS_UP=True, HAS_MASK=True, HAS_SHIFT=True),
        _hidden_build("drelu", HAS_UP=True, HAS_MASK=True, HAS_GATE_VALUES=True),
        _hidden_build("gelu_tanh"),
        _hidden_build("relu", cutoff=0.01, HAS_UP=True, HAS_MASK=True, HAS_BIAS=True),
        *combining.builds(),
    ]


def build_of(
    gate: str, down: str, width: int, activation: str = "silu", cutoff: float = 0.0, **switches: bool
) -> Build:
    """The build that `partials` launches for matrices of these types and width."""
    strides = ("gate_stride", "up_stride", "down_stride")
    arguments = {
        **dict.fromkeys(("x_ptr", "gate_values_ptr", "shift_ptr", "bias_ptr", "partial_ptr"), FLOATS),
        **dict.fromkeys(("gate_ptr", "up_ptr", "down_ptr", "mask_ptr"), BYTES),
        **dict.fromkeys(("indices_ptr", "count_ptr"), INTS),
        **dict.fromkeys(strides, "i64"),
    }
    off = dict.fromkeys(("HAS_MASK", "HAS_GATE_VALUES", "HAS_SHIFT", "HAS_BIAS"), False)
    switches = {"HAS_UP": True, **off, **switches}
    launch, groups = Launch.of(width), -(-width // 32)
    constants = {
        "WIDTH": width, "GROUPS": groups, "ACTIVATION": activation, "CUTOFF": cutoff,
        "GATE_TYPE": gate, "UP_TYPE": gate, "DOWN_TYPE": down, **switches,
        "EARLY_EXIT": activation in ZERO_BELOW_ZERO and not (switches["HAS_GATE_VALUES"] or switches["HAS_SHIFT"]),
        "ROWS": launch.rows, "BLOCK_G": triton.next_power_of_2(groups),
    }  # fmt: skip
    on = " ".join(name.lower() for name, value in switches.items() if value)
    label = f"sparse_ffn {gate} down {down} D={width} {activation} {on}{' cutoff' if cutoff else ''}"
    return build_over_rows(
        label, _sparse_ffn_kernel, arguments, constants, launch.num_warps, gate, down, strides=strides
    )


def _hidden_build(activation: str, cutoff: float = 0.0, **switches: bool) -> Build:
    arguments = {
        **dict.fromkeys(("partial_ptr", "gate_values_ptr", "shift_ptr", "bias_ptr", "out_ptr"), FLOATS), "mask_ptr": BYTES,
        **dict.fromkeys(("indices_ptr", "count_ptr"), INTS), **dict.fromkeys(("tokens", "neurons", "parts"), "i32"),
    }  # fmt: skip
    switches = {
        **dict.fromkeys(("HAS_UP", "HAS_MASK", "HAS_GATE_VALUES", "HAS_SHIFT", "HAS_BIAS"), False), **switches,
    }  # fmt: skip
    on = " ".join(name.lower() for name, value in switches.items() if value)
    constants = {"ACTIVATION": activation, "CUTOFF": cutoff, "BLOCK": HIDDEN_BLOCK, **switches}
    label = f"hidden {activation} {on}{' cutoff' if cutoff else ''}"
    return Build(label, _hidden_kernel, arguments, constants, HIDDEN_WARPS, multiples_of_16=("neurons",))
