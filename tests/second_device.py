"""A second device without a GPU: real numbers on the CPU that claim to lie elsewhere, on torch's device "meta".

Inside `second_device()` every tensor made on or copied to ELSEWHERE is a `There`, and an operation of torch or of the
op registry whose tensors lie on both devices raises WrongDevice: what a GPU would do, whoever forgot to copy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pinfer.engine.devices import Device
from pinfer.kernels.registry import Op
from pinfer.overlap import Cold, Lane, Place, Traffic
from pinfer.quant import QuantTensor

ELSEWHERE, CPU = torch.device("meta"), torch.device("cpu")
COPIES = ("aten::_to_copy", "aten::copy_")


class WrongDevice(RuntimeError):
    pass


class There(torch.Tensor):
    """A tensor whose numbers are in `here`, on the CPU."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        one = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device="meta",
        )
        one.here = here
        return one

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name, device = func._schema.name, kwargs.get("device")
    where = {one.device for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor) and one.dim()}
    if len(where) > 1 and name not in COPIES:
        raise WrongDevice(f"{name} of tensors on {', '.join(sorted(map(str, where)))}")
    if device == ELSEWHERE:
        kwargs = kwargs | {"device": CPU}
    result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name == "aten::copy_":
        return args[0]
    there = (
        device == ELSEWHERE
        if device is not None
        else ELSEWHERE in where or any(isinstance(one, There) for one in tree_flatten((args, kwargs))[0])
    )
    return tree_map(_there, result) if there else result


def _here(value: Any) -> Any:
    return value.here if isinstance(value, There) else _fields(value, _here)


def _there(value: Any) -> Any:
    wanted = isinstance(value, torch.Tensor) and not isinstance(value, There)
    return There(value) if wanted else _fields(value, _there)


def _fields(value: Any, change: Callable[[Any], Any]) -> Any:
    """A dataclass (a weight, a list of neurons) with its fields changed; anything else as it is."""
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, Op)):
        return value
    return dataclasses.replace(
        value, **{one.name: change(getattr(value, one.name)) for one in dataclasses.fields(value)}
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, (type, Op)):
            found += _tensors([getattr(leaf, one.name) for one in dataclasses.fields(leaf)])
    return found


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[list[str]]:
    """The block runs with two devices; gives the names of the ops that ran elsewhere."""
    ran: list[str] = []
    call = Op.__call__

    def checked(op: Op, *args: Any, **kwargs: Any) -> Any:
        where = {one.device for one in _tensors((args, kwargs))}
        if len(where) != 1:
            raise WrongDevice(f"op {op.name} of tensors on {', '.join(sorted(map(str, where)))}")
        result = call(op, *tree_map(_here, args), **tree_map(_here, kwargs))
        if where == {CPU}:
            return result
        ran.append(op.name)
        return tree_map(_there, result)

    with mock.patch.object(Op, "__call__", checked), _Mode():
        yield ran


class SecondDevice(Device):
    """What `second_device` emulates, as a device to place on; `forgets` leaves out what it is true of."""

    name, torch_device, rearranged = "second", ELSEWHERE, False

    def __init__(self, limit: int | None = None, forgets: Callable[[Any], bool] = lambda _: False) -> None:
        super().__init__(limit)
        self.forgets = forgets

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.forgets(tensor) else super().put(tensor)

    def put_weight(self, weight: QuantTensor) -> QuantTensor:
        return weight if self.forgets(weight) else super().put_weight(weight)

    def lane(self, places: int | Sequence[Place]) -> Lane:
        return Copying()


class Copying(Lane):
    """One part after the other, with its inputs and its result copied."""

    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        y = hot()
        return [y, *(part.copied(lambda one: one.to(CPU)).compute().to(y.device) for part in cold)]

    def close(self) -> None:
        pass
