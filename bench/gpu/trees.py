"""Inputs and results of ops as trees of tensors: copying, comparing, counting bytes, repacking."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pinfer.kernels.select_active.reference import Active
from pinfer.quant import QuantTensor


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """The same tree with `function` applied to every tensor, those inside dataclasses included."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, one) for key, one in value.items()}
    if isinstance(value, tuple):
        items = [map_tensors(function, one) for one in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(function, one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{name: map_tensors(function, one) for name, one in fields.items()})
    return value


def tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def clone(value: Any) -> Any:
    """Its own memory for every tensor: ops may write to their inputs, and timed copies must not share lines."""
    return map_tensors(torch.clone, value)


def restore(value: Any, pristine: Any) -> None:
    """Write the pristine contents back into the same memory, as a captured graph needs."""
    for mine, theirs in zip(tensors(value), tensors(pristine), strict=True):
        mine.copy_(theirs)


def held_bytes(value: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def relative_error(result: Any, expected: Any) -> float:
    """Relative RMS error, the largest of a tuple's; infinite where shapes, types or index lists differ.

    NaN compares as an error of NaN, which no tolerance admits.
    """
    if expected is None or result is None:
        return 0.0 if expected is result else float("inf")
    if isinstance(expected, Active):
        count = int(expected.count)
        same = int(result.count) == count and torch.equal(result.indices[:count].cpu(), expected.indices[:count].cpu())
        return 0.0 if same else float("inf")
    if isinstance(expected, tuple):
        errors = [relative_error(one, other) for one, other in zip(result, expected, strict=True)]
        return next((error for error in errors if error != error), max(errors))
    if result.shape != expected.shape or result.dtype.is_floating_point != expected.dtype.is_floating_point:
        return float("inf")
    wanted, given = expected.double(), result.to(expected.device).double()
    scale = wanted.square().mean().sqrt()
    error = (given - wanted).square().mean().sqrt()
    return float(error / scale) if scale > 0 else float(error)


def same_bits(one: Any, other: Any) -> bool:
    """Bitwise equality; of an index list, only the part that counts. NaN equals the same NaN."""
    if isinstance(one, Active):
        count = int(one.count)
        return count == int(other.count) and torch.equal(one.indices[:count], other.indices[:count])
    if isinstance(one, tuple):
        return len(one) == len(other) and all(same_bits(a, b) for a, b in zip(one, other, strict=True))
    if not isinstance(one, torch.Tensor):
        return bool(one == other)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def repacked(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with every weight laid out for 16-byte loads, as a model on a GPU holds them."""
    try:
        from pinfer.kernels.planes import repack
    except ModuleNotFoundError as error:
        if error.name != "pinfer.kernels.planes":
            raise
        return inputs
    return {key: repack(value) if isinstance(value, QuantTensor) else value for key, value in inputs.items()}


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN or wild integers, so that a kernel that forgets an output is caught."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

    torch.empty = lambda *args, **kwargs: poison(empty(*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: poison(empty_like(*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like
