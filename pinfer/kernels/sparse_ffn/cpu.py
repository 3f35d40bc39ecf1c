"""sparse_ffn on the CPU core: neuron by neuron for a few tokens, through GEMM for many."""

from __future__ import annotations

import ctypes

import torch

from pinfer.kernels.activation import activate
from pinfer.kernels.cpp.binding import ACTIVATION_CODES, floats, matrix, pointer, threads
from pinfer.kernels.cpp.build import load_core
from pinfer.kernels.dequantize.cpu import dequantize
from pinfer.kernels.quant_matmul.cpu import GEMM_CHUNK_WEIGHTS, GEMM_FROM_TOKENS
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.sparse_ffn.reference import check_inputs
from pinfer.quant import QuantTensor


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
    check_inputs(x, gate, up, down, active, activation, mask, gate_values)
    x = floats(x)
    gate_values = None if gate_values is None else floats(gate_values)
    if x.shape[0] >= GEMM_FROM_TOKENS:
        return _through_gemm(x, gate, up, down, active, activation, mask, gate_values)
    out = torch.empty(x.shape[0], down.columns)
    count = int(active.count)
    bytes_mask = None if mask is None else mask.contiguous().view(torch.uint8)
    load_core().pinfer_sparse_ffn(
        ctypes.byref(matrix(gate)), None if up is None else ctypes.byref(matrix(up)), ctypes.byref(matrix(down)),
        pointer(x), ctypes.c_int64(x.shape[0]), pointer(active.indices), ctypes.c_int64(count),
        pointer(bytes_mask), pointer(gate_values), ctypes.c_int32(ACTIVATION_CODES[activation]), pointer(out),
        threads(3 * count * x.numel()),
    )  # fmt: skip
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
) -> torch.Tensor:
    """The same sum in runs of neurons, each unpacked once; the union of many tokens is nearly all of them."""
    out = torch.zeros(x.shape[0], down.columns)
    for listed in active.indices[: int(active.count)].long().split(max(1, GEMM_CHUNK_WEIGHTS // down.columns)):
        pre = x @ dequantize(gate[listed]).T if gate_values is None else gate_values[:, listed]
        hidden = activate(activation, pre)
        if up is not None:
            hidden = hidden * (x @ dequantize(up[listed]).T)
        if mask is not None:
            hidden = torch.where(mask[:, listed], hidden, 0.0)
        out += hidden @ dequantize(down[listed])
    return out
