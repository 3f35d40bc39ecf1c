"""ctypes mirrors of abi.h, views of torch tensors, and the running of single steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch

from pinfer.kernels.cpp.build import CoreError, load_core
from pinfer.quant import QuantTensor

# Some 100 µs of work on one core. Where two threads that sleep are woken for each small matrix, the
# shipped model decodes at a third of the speed it has on one.
WORTH_WAKING = 400_000

ACTIVATION_CODES = {"silu": 0, "gelu_tanh": 1, "relu": 2, "relu2": 3, "drelu": 4, "gelu": 5}  # vectors.h


class Matrix(ctypes.Structure):
    """`pinfer_matrix`; all zeros stands for none."""

    _fields_ = (
        ("blocks", c_void_p),
        ("row_stride", c_int64),
        ("rows", c_int64),
        ("columns", c_int64),
        ("type", c_int32),
    )


class Arguments(ctypes.Structure):
    """The arguments of one step; `KIND` is its number in `pinfer_kind`."""

    KIND = -1


class Dequantize(Arguments):
    KIND = 0
    _fields_ = (("w", Matrix), ("out", c_void_p))


class Embed(Arguments):
    KIND = 1
    _fields_ = (("w", Matrix), ("ids", c_void_p), ("tokens", c_int64), ("scale", c_float), ("out", c_void_p))


class Matmul(Arguments):
    KIND = 2
    _fields_ = (
        ("w", Matrix),
        ("x", c_void_p),
        ("tokens", c_int64),
        ("int8", c_int32),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("scratch", c_void_p),
    )


class SelectActive(Arguments):
    KIND = 3
    _fields_ = (
        ("scores", c_void_p),
        ("tokens", c_int64),
        ("neurons", c_int64),
        ("threshold", c_void_p),
        ("threshold_stride", c_int64),
        ("indices", c_void_p),
        ("count", c_void_p),
    )


class SignScores(Arguments):
    KIND = 13
    _fields_ = (
        ("x", c_void_p),
        ("signs", c_void_p),
        ("tokens", c_int64),
        ("neurons", c_int64),
        ("columns", c_int64),
        ("scores", c_void_p),
        ("packed", c_void_p),
    )


class SparseFFN(Arguments):
    KIND = 4
    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("x", c_void_p),
        ("tokens", c_int64),
        ("indices", c_void_p),
        ("count", c_void_p),
        ("mask", c_void_p),
        ("gate_values", c_void_p),
        ("shift", c_void_p),
        ("gate_bias", c_void_p),
        ("cutoff", c_float),
        ("activation", c_int32),
        ("int8", c_int32),
        ("y", c_void_p),
        ("hidden", c_void_p),
        ("scratch", c_void_p),
    )


class InputSparse(Arguments):
    KIND = 5
    _fields_ = (
        ("w", Matrix),
        ("x", c_void_p),
        ("tokens", c_int64),
        ("threshold", c_void_p),
        ("y", c_void_p),
        ("hidden", c_void_p),
    )


class RMSNorm(Arguments):
    KIND = 6
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("residual", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("eps", c_float),
        ("y", c_void_p),
    )


class Add(Arguments):
    KIND = 7
    _fields_ = (("a", c_void_p), ("b", c_void_p), ("count", c_int64), ("y", c_void_p))


class GLU(Arguments):
    KIND = 8
    _fields_ = (
        ("gate", c_void_p),
        ("up", c_void_p),
        ("shift", c_void_p),
        ("gate_bias", c_void_p),
        ("count", c_int64),
        ("neurons", c_int64),
        ("activation", c_int32),
        ("magnitude", c_int32),
        ("cutoff", c_float),
        ("y", c_void_p),
    )


class Rope(Arguments):
    KIND = 9
    _fields_ = (
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("start", c_void_p),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("dim", c_int64),
        ("interleaved", c_int32),
        ("y", c_void_p),
    )


class Attention(Arguments):
    KIND = 10
    _fields_ = (
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("start", c_void_p),
        ("tokens", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("context", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("y", c_void_p),
        ("scores", c_void_p),
    )


class Tally(Arguments):
    KIND = 11
    _fields_ = (
        ("count", c_void_p),
        ("mask", c_void_p),
        ("tokens", c_int64),
        ("neurons", c_int64),
        ("totals", c_void_p),
    )


class TallyKept(Arguments):
    KIND = 14
    _fields_ = (
        ("x", c_void_p),
        ("tokens", c_int64),
        ("inputs", c_int64),
        ("threshold", c_void_p),
        ("totals", c_void_p),
    )


class TopK(Arguments):
    KIND = 12
    _fields_ = (
        ("scores", c_void_p),
        ("count", c_int64),
        ("k", c_int64),
        ("values", c_void_p),
        ("indices", c_void_p),
    )


class SplitActive(Arguments):
    KIND = 15
    _fields_ = (
        ("indices", c_void_p),
        ("count", c_void_p),
        ("parts", c_int64),
        ("bounds", c_void_p),
        ("out", c_void_p),
        ("counts", c_void_p),
    )


class Copy(Arguments):
    KIND = 16
    _fields_ = (("source", c_void_p), ("nbytes", c_int64), ("target", c_void_p))


class LayerNorm(Arguments):
    KIND = 17
    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("eps", c_float),
        ("y", c_void_p),
    )


class Softcap(Arguments):
    KIND = 18
    _fields_ = (("x", c_void_p), ("count", c_int64), ("cap", c_float), ("y", c_void_p))


class Job(ctypes.Structure):
    """`pinfer_job`."""

    _fields_ = (
        ("worker", c_void_p),
        ("steps", c_void_p),
        ("count", c_int64),
        ("next", c_void_p),
        ("ticket", c_int64),
        ("status", c_int32),
        ("refused", c_int32),
    )


class Fork(Arguments):
    KIND = 64
    _fields_ = (("job", c_void_p),)


class Join(Arguments):
    KIND = 65
    _fields_ = (("job", c_void_p),)


class Await(Arguments):
    KIND = 66
    _fields_ = (("flag", c_void_p), ("epoch", c_void_p), ("timeout_s", c_double))


class Raise(Arguments):
    KIND = 67
    _fields_ = (("flag", c_void_p), ("epoch", c_void_p), ("timeout_s", c_double))


class CheckList(Arguments):
    KIND = 68
    _fields_ = (("indices", c_void_p), ("count", c_void_p), ("neurons", c_int64))


class Mark(Arguments):
    KIND = 69
    _fields_ = (("mark", c_void_p), ("totals", c_void_p), ("seconds", c_double), ("seconds_per_active", c_double))


class Pace(Arguments):
    KIND = 70
    _fields_ = Mark._fields_


class _Step(ctypes.Structure):
    _fields_ = (("kind", c_int32), ("arguments", c_void_p))


class NotRecordable(RuntimeError):
    """Something was computed outside the core, which a program would not repeat; the message names it."""


class StepFailed(RuntimeError):
    """A program that waits for another thread or a device did not get to its end; the message says why."""


TIMED_OUT = 1
_FAILURES = {  # pinfer_status
    TIMED_OUT: "a part that runs elsewhere did not end in time",
    2: "a list that came from elsewhere names neurons that are not there",
    3: "the worker is stopped, or belongs to the process that this one was forked from",
}


def check(status: int) -> None:
    """StepFailed for a status that is not 0."""
    if status:
        raise StepFailed(_FAILURES.get(status, f"the core gave status {status}"))


# Told of every step that runs; see program.py.
_listener: ContextVar[Callable[[Arguments, tuple[object, ...]], None] | None] = ContextVar("pinfer_steps", default=None)


@contextmanager
def listening(listener: Callable[[Arguments, tuple[object, ...]], None]) -> Iterator[None]:
    """Tell `listener` of each step of the block, with the objects that own its memory."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


# What runs a step instead of the calling thread's team; see worker.py.
_runner: ContextVar[Callable[[Any, tuple[object, ...]], None] | None] = ContextVar("pinfer_runner", default=None)


@contextmanager
def running_on(runner: Callable[[Any, tuple[object, ...]], None]) -> Iterator[None]:
    """Have `runner` run the steps of the block: it is given an array of one, and what owns its memory."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def run(arguments: Arguments, multiplications: int, *kept: object) -> None:
    """Run one step now; `kept` owns the memory that its pointers name, for a program that records it."""
    if (listener := _listener.get()) is not None:
        listener(arguments, kept)
    if (runner := _runner.get()) is not None:
        runner(steps([arguments]), (arguments, *kept))
    else:
        check(load_core().pinfer_run(steps([arguments]), 1, threads_for(multiplications)))


def steps(arguments: list[Arguments]) -> ctypes.Array[_Step]:
    """The array that `pinfer_run` takes; the arguments must outlive it."""
    return (_Step * len(arguments))(*(_Step(one.KIND, ctypes.addressof(one)) for one in arguments))


def threads_for(multiplications: int) -> int:
    """torch's own number, so that both use one pool of the same size; 1 where waking it would cost more."""
    return torch.get_num_threads() if multiplications >= WORTH_WAKING else 1


def matrix(weight: QuantTensor | None) -> Matrix:
    """A view of a weight's blocks; CoreError for a type that the core does not know."""
    if weight is None:
        return Matrix()
    blocks = weight.blocks
    if blocks.device.type != "cpu" or (blocks.shape[1] > 1 and blocks.stride(1) != 1):
        raise ValueError(f"{weight!r} must be in CPU memory with contiguous rows")
    if weight.layout != "blocks":
        raise ValueError(f"{weight!r} is laid out for a GPU: the C++ core reads blocks")
    if not load_core().pinfer_knows_type(weight.type.ggml_id):
        raise CoreError(f"the C++ core does not know weight type {weight.type}")
    return Matrix(blocks.data_ptr(), blocks.stride(0), weight.rows, weight.columns, weight.type.ggml_id)


def pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def floats(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous float32 on the CPU, without a copy where it is that already."""
    if tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous():
        return tensor
    return _copied(tensor.to(device="cpu", dtype=torch.float32))


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its elements side by side, without a copy where they are already."""
    return tensor if tensor.is_contiguous() else _copied(tensor)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    if _listener.get() is not None:  # a program would keep this step's copy
        raise NotRecordable(f"an op was given {tensor.dtype} {list(tensor.shape)} that it had to copy")
    return tensor.contiguous()


ALIGNMENT = 64


def scratch(tokens: int, columns: int, copies: int = 1) -> torch.Tensor:
    """uint8 memory for `copies` packings of tokens rounded to int8; `aligned` gives its first usable address."""
    return torch.empty(copies * load_core().pinfer_scratch(tokens, columns) + ALIGNMENT, dtype=torch.uint8)


def aligned(memory: torch.Tensor) -> int:
    return -(-memory.data_ptr() // ALIGNMENT) * ALIGNMENT
