"""Triton's interpreter without the work that it does again at every call of a jitted function by another."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any


def patch_once() -> None:
    """Leave Triton's language as it is where the kernel that runs has replaced it already.

    The interpreter replaces the language's functions by NumPy's when a kernel starts and puts them back when it
    ends, and replaces them once more at each call within it: about 1 ms each, a third of a kernel's time.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable[..., Any] | None = getattr(interpreter, "_patch_lang", None)
    scope: Callable[[], Any] | None = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:  # another release of Triton, which may not need this
        return

    @functools.cache
    def seen_by(function: Callable[..., Any]) -> list[ModuleType]:
        return [module for module in (tl, tl.core) if any(one is module for one in function.__globals__.values())]

    def patch_what_is_not(function: Callable[..., Any]) -> Any:
        modules = seen_by(function)
        if modules and not any(tl.core.is_builtin(module.load) for module in modules):
            return scope()
        return patch(function)

    interpreter._patch_lang = patch_what_is_not  # type: ignore[attr-defined]
