"""ctypes views of torch tensors for the C++ core."""

from __future__ import annotations

import ctypes

import torch

from pinfer.kernels.cpp.build import CoreError, load_core
from pinfer.quant import QuantTensor

# Some 100 µs of work on one core. The shipped model decodes at 300 tokens/s on one thread and at 115
# where two that sleep are woken for each of its small matrices.
WORTH_WAKING = 400_000

ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3}


class Matrix(ctypes.Structure):
    """`pinfer_matrix` of core.cpp."""

    _fields_ = (
        ("blocks", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def matrix(weight: QuantTensor) -> Matrix:
    blocks = weight.blocks
    if blocks.device.type != "cpu" or (blocks.shape[1] > 1 and blocks.stride(1) != 1):
        raise ValueError(f"{weight!r} must be in CPU memory with contiguous rows")
    if not load_core().pinfer_knows_type(weight.type.ggml_id):
        raise CoreError(f"the C++ core does not know weight type {weight.type}")
    return Matrix(blocks.data_ptr(), blocks.stride(0), weight.rows, weight.columns, weight.type.ggml_id)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def floats(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous float32 on the CPU, without a copy where it is that already."""
    return tensor.to(device="cpu", dtype=torch.float32).contiguous()


def threads(multiplications: int) -> ctypes.c_int32:
    """torch's own number, so that both use one pool of the same size; 1 where waking it would cost more."""
    return ctypes.c_int32(torch.get_num_threads() if multiplications >= WORTH_WAKING else 1)
