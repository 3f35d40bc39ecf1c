"""sparse_ffn on the CPU core: neuron by neuron for a few tokens, through GEMM for many."""

from __future__ import annotations

import torch

from pinfer.kernels.activation import hidden_of
from pinfer.kernels.cpp import binding
from pinfer.kernels.cpp.binding import ACTIVATION_CODES, floats, matrix, pointer
from pinfer.kernels.dequantize.cpu import dequantize
from pinfer.kernels.quant_matmul.cpu import GEMM_CHUNK_WEIGHTS, quant_matmul
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.sparse_ffn.reference import check_inputs, check_list
from pinfer.quant import QuantTensor

MANY_TOKENS = 16  # kernels.cpp keeps this many tokens of four rows


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
    check_inputs(x, gate, up, down, active, activation, mask, gate_values, shift, gate_bias, cutoff)
    x = floats(x)
    gate_values, shift, gate_bias = (None if one is None else floats(one) for one in (gate_values, shift, gate_bias))
    if x.shape[0] > MANY_TOKENS:
        return _through_gemm(x, gate, up, down, active, activation, mask, gate_values, shift, gate_bias, cutoff, int8)
    check_list(active, gate.rows)
    tokens = x.shape[0]
    out, hidden = torch.empty(tokens, down.columns), torch.empty(gate.rows, tokens)
    bytes_mask = None if mask is None else binding.contiguous(mask).view(torch.uint8)
    memory = binding.scratch(tokens, gate.columns, copies=2) if int8 else None
    arguments = binding.SparseFFN(
        matrix(gate), matrix(up), matrix(down), pointer(x), tokens, pointer(active.indices), pointer(active.count),
        pointer(bytes_mask), pointer(gate_values), pointer(shift), pointer(gate_bias), cutoff,
        ACTIVATION_CODES[activation], int8, pointer(out), pointer(hidden), None if memory is None else binding.aligned(memory),
    )  # fmt: skip
    kept = (
        gate.blocks,
        None if up is None else up.blocks,
        down.blocks,
        x,
        active,
        bytes_mask,
        gate_values,
        shift,
        gate_bias,
    )
    binding.run(arguments, 3 * int(active.count) * x.numel(), *kept, out, hidden, memory)
    return out


def _through_gemm(
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
    int8: bool,
) -> torch.Tensor:
    """The same sum in runs of neurons, each unpacked once; the union of many tokens is nearly all of them."""
    out = torch.zeros(x.shape[0], down.columns)
    for listed in active.indices[: int(active.count)].long().split(max(1, GEMM_CHUNK_WEIGHTS // down.columns)):
        shift_here, bias = (None if one is None else one[listed] for one in (shift, gate_bias))
        pre = quant_matmul(x, gate[listed], bias, int8=int8) if gate_values is None else gate_values[:, listed]
        up_values = None if up is None else quant_matmul(x, up[listed], int8=int8)
        hidden = hidden_of(activation, pre, up_values, shift_here, cutoff)
        if mask is not None:
            hidden = torch.where(mask[:, listed], hidden, 0.0)
        out += hidden @ dequantize(down[listed])
    return out
