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

from pinfer.kernels.activation import ACTIVATIONS
from pinfer.kernels.dequantize.gpu import weights_at
from pinfer.kernels.select_active.reference import Active
from pinfer.quant import QuantTensor

PROGRAMS_PER_SM = 2
PROGRAMS_INTERPRETED = 3  # without a device: few, as each costs the interpreter 0.3 ms


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _activate(g, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        h = tl.maximum(g, 0.0)
    elif ACTIVATION == "relu2":
        h = tl.maximum(g, 0.0) * tl.maximum(g, 0.0)
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
) -> torch.Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    x = x.contiguous()
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
        BLOCK_D=triton.next_power_of_2(width),
    )  # fmt: skip
    size = tokens * width
    _combine_kernel[(triton.cdiv(size, 1024),)](partial, out, programs, size, BLOCK=1024)
    return out


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
