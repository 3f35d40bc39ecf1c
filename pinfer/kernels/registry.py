"""The op registry: every kernel operation with its reference, its fast implementations and its contract.

Dispatch, the tests, the benchmarks and the ahead-of-time check (which asks the row's Triton module
for its `builds()`) iterate over these rows, so a new row brings its own test. A row that lacks a
reference, an implementation, test cases or a tolerance cannot be made.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from pinfer.kernels.aot import interpreting
from pinfer.quant import QuantTensor

BACKENDS = ("reference", "cpu", "triton")
_forced: ContextVar[str] = ContextVar("pinfer_backend", default="auto")
_int8: ContextVar[bool] = ContextVar("pinfer_int8", default=False)
Observer = Callable[["Op"], contextlib.AbstractContextManager[None]]
_observer: ContextVar[Observer | None] = ContextVar("pinfer_observer", default=None)


class BackendUnavailable(RuntimeError):
    """An implementation cannot run on this machine: no compiler, no Triton, or no device for it."""


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op of the block on one backend; `auto` goes by the tensors' device.

    A forced backend that cannot run raises BackendUnavailable: it never falls back silently.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend {name!r} is none of auto, {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def use_int8(enabled: bool = True) -> Iterator[None]:
    """Round activations to int8 before products with quantised weights, in every op of the block that can."""
    token = _int8.set(enabled)
    try:
        yield
    finally:
        _int8.reset(token)


def settings() -> tuple[str, bool]:
    """The forced backend, or auto, and whether activations are rounded to int8, at this point."""
    return _forced.get(), _int8.get()


def backend_on(device: torch.device) -> str:
    """The backend on which an op runs at this point whose first tensor is on `device`."""
    forced = _forced.get()
    return _backend_for(device) if forced == "auto" else forced


@contextlib.contextmanager
def observe_ops(observer: Observer) -> Iterator[None]:
    """Enter `observer(op)` around every op call of the block; recording a program does."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def check_backend(name: str, device: torch.device) -> None:
    """BackendUnavailable if ops on this device cannot run on that backend; `auto` always can."""
    if name == "triton" and device.type == "cpu" and not interpreting():
        raise BackendUnavailable("backend triton needs a GPU, or TRITON_INTERPRET=1 to emulate one slowly on the CPU")
    if name == "cpu":
        from pinfer.kernels.cpp import load_core

        load_core()


@dataclass(frozen=True)
class Op:
    """One kernel operation.

    reference:   plain fp32 torch; it defines the result.
    triton, cpu: `module:function` of the other implementations, with the reference's signature,
                 imported on first use because Triton and the compiler are optional. None where torch
                 is good enough on that device: the reference runs there.
    make_inputs: `(generator, **case) -> kwargs` for any implementation.
    cases:       sizes and options that tests run, among them empty, full and indivisible ones.
    bench_cases: model-sized ones, for `bench/`.
    bytes_moved: `(**kwargs) -> int`, the least bytes a perfect kernel reads and writes.
    tolerance:   largest relative RMS error against the reference; 0 asks for equality.
    takes_int8:  whether it has an `int8` argument, which `use_int8` then sets.
    """

    name: str
    reference: Callable[..., Any]
    triton: str | None
    cpu: str | None
    make_inputs: Callable[..., dict[str, Any]]
    cases: tuple[Mapping[str, Any], ...]
    bench_cases: tuple[Mapping[str, Any], ...]
    bytes_moved: Callable[..., int]
    tolerance: float
    takes_int8: bool = False

    def __post_init__(self) -> None:
        for field in ("reference", "make_inputs", "bytes_moved"):
            if not callable(getattr(self, field)):
                raise TypeError(f"op {self.name!r} has no {field}")
        if self.triton is None and self.cpu is None:
            raise TypeError(f"op {self.name!r} has a reference alone: name an implementation, or call torch")
        for field in ("triton", "cpu"):
            target = getattr(self, field)
            if target is not None and not (isinstance(target, str) and ":" in target):
                raise TypeError(f"op {self.name!r} names no {field} implementation as 'module:function'")
        if not self.cases or not self.bench_cases:
            raise TypeError(f"op {self.name!r} has no test or benchmark cases")
        if not 0 <= self.tolerance <= 0.05:
            raise ValueError(f"op {self.name!r}: a tolerance of {self.tolerance} tests nothing (at most 0.05)")

    def implementation(self, backend: str) -> Callable[..., Any]:
        """The callable behind `reference`, `cpu` or `triton`; BackendUnavailable if it cannot load."""
        if backend == "reference":
            return self.reference
        return self._triton if backend == "triton" else self._cpu

    @cached_property
    def _triton(self) -> Callable[..., Any]:
        return self.reference if self.triton is None else _load(self.triton)

    @cached_property
    def _cpu(self) -> Callable[..., Any]:
        return self.reference if self.cpu is None else _load(self.cpu)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the forced backend, or on the one for the first tensor argument's device."""
        backend = _forced.get()
        if backend == "auto":
            backend = _backend_for(_device_of(args, kwargs))
            if self.takes_int8 and backend == "triton":  # a GPU beside the core, which alone gains by rounding
                kwargs.setdefault("int8", False)
        elif backend == "triton":
            check_backend(backend, _device_of(args, kwargs))
        if self.takes_int8:
            kwargs.setdefault("int8", _int8.get())
        run, observer = self.implementation(backend), _observer.get()
        if observer is None:
            return run(*args, **kwargs)
        with observer(self):
            return run(*args, **kwargs)


def _load(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise BackendUnavailable(f"{target} cannot be imported: {error}") from error


def _device_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, (torch.Tensor, QuantTensor)):
            return value.device
    raise TypeError("an op needs at least one tensor argument")


def _backend_for(device: torch.device) -> str:
    if device.type == "cuda":
        return "triton"
    from pinfer.kernels.cpp import core_available

    return "cpu" if core_available() else "reference"
