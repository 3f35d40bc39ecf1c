"""Triton's interpreter without work that it does again and again; what kernels compute stays the same.

It takes several milliseconds of Python for each line of a kernel, most of them for objects that nothing reads.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

KNOWN = ("3.5.", "3.6.")  # releases whose insides these are; others run as they come


def quicken() -> None:
    """To be called before the first kernel."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton

    if triton.__version__.startswith(KNOWN):
        _patch_once()
        _leave_types_of_tuples()
        _remember_dtypes()


def _patch_once() -> None:
    """Leave Triton's language as it is where the kernel that runs has replaced it already.

    The interpreter replaces the language's functions by NumPy's when a kernel starts and puts them back when it
    ends, and replaces them once more at each call within it: about 1 ms each, half of a kernel's time.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch, scope = interpreter._patch_lang, interpreter._LangPatchScope

    @functools.cache
    def seen_by(function: Callable[..., Any]) -> list[ModuleType]:
        return [module for module in (tl, tl.core) if any(one is module for one in function.__globals__.values())]

    def patch_what_is_not(function: Callable[..., Any]) -> Any:
        modules = seen_by(function)
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return scope()
        return patch(function)

    interpreter._patch_lang = patch_what_is_not


def _leave_types_of_tuples() -> None:
    """A shape is a tuple whose type says each number once more: make that when it is asked for, which is never."""
    from triton.language import core

    whole = core.tuple.__init__

    def without_type(self: Any, args: Sequence[Any], type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            whole(self, args, type)

    made = functools.cached_property(lambda self: core._type_for_tuple_values(self.values))
    made.__set_name__(core.tuple, "type")
    core.tuple.__init__ = without_type
    core.tuple.type = made


def _remember_dtypes() -> None:
    """The interpreter makes a table of all NumPy dtypes each time that it looks one up."""
    from triton.language import core
    from triton.runtime import interpreter

    look_up, known = interpreter._get_np_dtype, dict[str, Any]()

    def remembered(dtype: Any) -> Any:
        scalar = dtype.element_ty if isinstance(dtype, core.block_type) else dtype
        found = known.get(scalar.name)
        if found is None:
            found = known[scalar.name] = look_up(scalar)
        return found

    interpreter._get_np_dtype = remembered
