"""Programs: a sequence of ops recorded once and repeated in one call, one wake-up of the threads for all of it.

The ops of a decode step are the same for every token; what differs (token id, position, active
counts) lies in memory. So one step is run as usual while its calls into the core are noted, and
later ones repeat those calls without Python or torch, as a CUDA graph does on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.overrides import TorchFunctionMode

from pinfer.kernels.cpp.binding import Arguments, NotRecordable, check, listening, steps
from pinfer.kernels.cpp.build import load_core
from pinfer.kernels.registry import Op, observe_ops

# Torch calls that compute nothing: they make views, make memory that the core fills, or read a shape.
_HARMLESS = {
    "__get__", "__getitem__", "__iter__", "__len__", "data_ptr", "detach", "dim", "empty", "expand", "is_contiguous",
    "numel", "permute", "select", "size", "split", "squeeze", "stride", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Program:
    """Calls into the core in the order they were recorded, with the memory they use."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._arguments: list[Arguments] = []
        self._kept: list[tuple[object, ...]] = []
        self._steps: Any = None

    def __len__(self) -> int:
        return len(self._arguments)

    def append(self, arguments: Arguments, kept: tuple[object, ...]) -> None:
        """Add a call whose pointers name memory that the objects of `kept` own."""
        self._arguments.append(arguments)
        self._kept.append(kept)
        self._steps = None

    @property
    def steps(self) -> Any:
        """The array that the core runs; valid until something is added."""
        if self._steps is None:
            self._steps = steps(self._arguments)
        return self._steps

    def run(self) -> None:
        """Repeat every call, writing the same memory. StepFailed where it waits for what does not come."""
        check(load_core().pinfer_run(self.steps, len(self._arguments), self.threads))


# The program that is being recorded, if any.
_recorded: ContextVar[Program | None] = ContextVar("pinfer_program", default=None)


def recording() -> Program | None:
    """The program that the steps of this moment are noted in."""
    return _recorded.get()


@contextmanager
def noting(program: Program) -> Iterator[Program]:
    """Note the steps of the block, which run as usual, in a program: of a whole recording, or of a branch of one."""
    token = _recorded.set(program)
    try:
        with listening(program.append):
            yield program
    finally:
        _recorded.reset(token)


class _Watch(TorchFunctionMode):
    """Raises NotRecordable for torch arithmetic outside of ops, and remembers it if that is caught.

    A dispatch mode would see more, but its first use imports 75 MB of torch's compiler. What this one
    cannot see (compiled functions, copies made inside C++) `DecodeStep` catches by comparing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside_op = False
        self.problem: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        # Indexing makes a view only where nothing is gathered.
        gathers = name == "__getitem__" and not _is_slicing(args[1])
        if not self.inside_op and (name not in _HARMLESS or gathers):
            self.problem = f"torch's {name} is no op of the registry"
            raise NotRecordable(self.problem)
        return func(*args, **(kwargs or {}))


def _is_slicing(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts)


@contextmanager
def record(threads: int) -> Iterator[Program]:
    """The ops of the block, which run as usual, as a Program for `threads` threads.

    NotRecordable if torch is seen to compute outside of ops, or if an op does not run on the core, or
    copies what it is given (a copy is of this step's values).
    """
    program, watch = Program(threads), _Watch()

    @contextmanager
    def inside(op: Op) -> Iterator[None]:
        noted = recording()
        assert noted is not None
        before = len(noted)
        watch.inside_op = True
        try:
            yield
        finally:
            watch.inside_op = False
        if len(noted) == before:
            raise NotRecordable(f"op {op.name} did not run on the core")

    with noting(program), observe_ops(inside), watch:
        yield program
    if watch.problem is not None:
        raise NotRecordable(watch.problem)
