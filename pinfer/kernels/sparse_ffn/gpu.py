"""sparse_ffn in Triton: one fused persistent kernel over the active list, then a sum of partial rows.

Program p takes neurons p, p + P, p + 2P, … of the list: gate row · x, leave early where the
activation is zero (exact for ReLU), up row · x, and h · down row into registers. Each program
writes one partial row; `_combine_kernel` adds them in order. No atomics, so results repeat
bitwise. The count is read on the device: the host never waits for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, INTS, Build
from pinfer.kernels.dequantize.gpu import weights_at
from pinfer.kernels.rounding import rounded_for
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.sparse_ffn.reference import check_inputs
from pinfer.quant import BY_NAME, QuantTensor

PROGRAMS_PER_SM = 2
WEIGHTS_PER_WARP = 256  # at D = 4096, 1,024 spill for most types and 512 for Q6_K on sm_86 and sm_89
COMBINE_BLOCK, COMBINE_WARPS = 1024, 4
PROGRAMS_INTERPRETED = 3  # without a device: few, as each costs the interpreter 0.3 ms


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        h = tl.where(g < 0.0, 0.0, g)  # NaN passes through: it must not look like an inactive neuron
    elif ACTIVATION == "relu2":
        h = tl.where(g < 0.0, 0.0, g * g)
    elif ACTIVATION == "silu":
        h = g * _sigmoid(g)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "unknown activation")
        # 0.5 (1 + tanh z) = sigmoid(2 z)
        h = g * _sigmoid(2 * 0.7978845608028654 * (g + 0.044715 * g * g * g))
    return h


@triton.jit
def _sparse_ffn_kernel(
    x_ptr, gate_ptr, gate_stride, up_ptr, up_stride, down_ptr, down_stride,
    indices_ptr, count_ptr, mask_ptr, gate_values_ptr, partial_ptr, tokens, neurons, width,
    ACTIVATION: tl.constexpr, GATE_TYPE: tl.constexpr, UP_TYPE: tl.constexpr, DOWN_TYPE: tl.constexpr,
    HAS_UP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_GATE_VALUES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    x = tl.load(x_ptr + token * width + column, mask=inside, other=0.0).to(tl.float32)  # [D]
    partial = tl.zeros([BLOCK_D], tl.float32)
    for k in range(program, tl.load(count_ptr), tl.num_programs(0)):
        n = tl.load(indices_ptr + k).to(tl.int64)
        wanted = True
        if HAS_MASK:
            wanted = tl.load(mask_ptr + token * neurons + n) != 0
        if wanted:
            if HAS_GATE_VALUES:
                g = tl.load(gate_values_ptr + token * neurons + n)
            else:
                g = tl.sum(weights_at(gate_ptr + n * gate_stride, column, inside, GATE_TYPE) * x, axis=0)
            h = _activate(g, ACTIVATION)
            if h != 0.0:
                if HAS_UP:
                    h *= tl.sum(weights_at(up_ptr + n * up_stride, column, inside, UP_TYPE) * x, axis=0)
                partial += h * weights_at(down_ptr + n * down_stride, column, inside, DOWN_TYPE)
    tl.store(partial_ptr + (program * tokens + token) * width + column, partial, mask=inside)


@triton.jit
def _combine_kernel(partial_ptr, out_ptr, programs, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    row_ptr = partial_ptr + at
    for _ in range(programs):
        total += tl.load(row_ptr, mask=at < size, other=0.0)
        row_ptr += size
    tl.store(out_ptr + at, total, mask=at < size)


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
    check_inputs(x, gate, up, down, active, activation, mask, gate_values)
    if int8 and up is not None and up.type.block_size != gate.type.block_size:
        raise NotImplementedError(f"int8 with gate in {gate.type} and up in {up.type}: their blocks differ")
    x = (rounded_for(x.float(), gate) if int8 else x).contiguous()
    tokens, width = x.shape
    programs = _programs(x.device)
    partial = torch.empty(programs, tokens, width, dtype=torch.float32, device=x.device)
    out = torch.empty(tokens, width, dtype=torch.float32, device=x.device)
    up_or_gate = gate if up is None else up
    _sparse_ffn_kernel[(programs, tokens)](
        x, gate.blocks, gate.blocks.stride(0), up_or_gate.blocks, up_or_gate.blocks.stride(0),
        down.blocks, down.blocks.stride(0), active.indices, active.count,
        active.count if mask is None else mask.contiguous().view(torch.uint8),
        x if gate_values is None else gate_values.contiguous(),
        partial, tokens, gate.rows, width,
        ACTIVATION=activation, GATE_TYPE=gate.type.name, UP_TYPE=up_or_gate.type.name, DOWN_TYPE=down.type.name,
        HAS_UP=up is not None, HAS_MASK=mask is not None, HAS_GATE_VALUES=gate_values is not None,
        BLOCK_D=(block_d := triton.next_power_of_2(width)), num_warps=_warps(block_d),
    )  # fmt: skip
    size = tokens * width
    grid = (triton.cdiv(size, COMBINE_BLOCK),)
    _combine_kernel[grid](partial, out, programs, size, BLOCK=COMBINE_BLOCK, num_warps=COMBINE_WARPS)
    return out


def _warps(block_d: int) -> int:
    """Enough threads that a row's weights, x and the partial sums stay in registers for every type."""
    return min(16, max(4, block_d // WEIGHTS_PER_WARP))


def builds() -> list[Build]:
    arguments = {
        **dict.fromkeys(("x_ptr", "gate_values_ptr", "partial_ptr"), FLOATS),
        **dict.fromkeys(("gate_ptr", "up_ptr", "down_ptr", "mask_ptr"), BYTES),
        **dict.fromkeys(("indices_ptr", "count_ptr"), INTS),
        **dict.fromkeys(("gate_stride", "up_stride", "down_stride"), "i64"),
        **dict.fromkeys(("tokens", "neurons", "width"), "i32"),
    }

    def build(gate: str, down: str, block_d: int = 4096, activation: str = "silu", **flags: bool) -> Build:
        types = {"GATE_TYPE": gate, "UP_TYPE": gate, "DOWN_TYPE": down}
        switches = {"HAS_UP": True, "HAS_MASK": False, "HAS_GATE_VALUES": False, **flags}
        constants = {"ACTIVATION": activation, **types, **switches, "BLOCK_D": block_d}
        label = f"sparse_ffn {' '.join(str(value) for value in constants.values())}"
        return Build(label, _sparse_ffn_kernel, arguments, constants, _warps(block_d))

    combine = {"partial_ptr": FLOATS, "out_ptr": FLOATS, "programs": "i32", "size": "i32"}
    return [
        Build("combine", _combine_kernel, combine, {"BLOCK": COMBINE_BLOCK}, COMBINE_WARPS),
        *(build(name, name) for name in BY_NAME),
        # As models run: K-quant gate and up, down transposed to Q8_0. At 8,192 (70B) K-quants decoded
        # byte by byte do spill, at 16 warps too: that width needs repacked blocks.
        *(build(name, "Q8_0", block_d) for name in ("Q4_K", "Q6_K") for block_d in (512, 1024, 2048, 4096)),
        build("Q8_0", "Q8_0", 8192),
        *(build("Q8_0", "Q8_0", activation=name, HAS_MASK=True) for name in ("relu", "relu2", "gelu_tanh")),
        build("Q8_0", "Q8_0", activation="relu", HAS_UP=False),
        build("Q8_0", "Q8_0", activation="relu", HAS_MASK=True, HAS_GATE_VALUES=True),
    ]


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
