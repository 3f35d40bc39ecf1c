"""Puts the compiled C++ core into the wheel where a compiler is at hand; all else stands in pyproject.toml.

Without one the wheel is made without it: the first use then compiles the core, or torch computes.
An editable install compiles nothing here either, so that an edit is compiled at the next use.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

CORE = Path("pinfer/kernels/cpp")  # below the folder that is built from, and below the one that is built


def load_compile() -> ModuleType:
    """pinfer/kernels/cpp/compile.py by its path: importing the package would want torch."""
    spec = importlib.util.spec_from_file_location("pinfer_compile", Path(__file__).parent / CORE / "compile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


core = load_compile()


class CoreDistribution(Distribution):
    """One that belongs to a platform if a compiler is there to make it so."""

    def has_ext_modules(self) -> bool:
        try:
            core.find_compiler()
        except core.CompileError:
            return False
        return True


class BuildWithCore(build_py):
    """The Python files, then the library with every instruction set beside the sources that it is of."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / CORE
        for old in target.glob("_core-*.so"):
            old.unlink()
        try:
            core.build_library(core.find_compiler(), target / core.packaged_library().name)
        except (core.CompileError, OSError, subprocess.SubprocessError) as error:
            self.warn(f"this wheel goes without the compiled core: {error}")


class WheelWithCore(bdist_wheel):
    """For any Python 3 of the platform: the library's interface is plain C."""

    def get_tag(self) -> tuple[str, str, str]:
        compiled = any((Path(self.bdist_dir) / CORE).glob("_core-*.so"))
        return "py3", "none", super().get_tag()[2] if compiled else "any"


setup(
    distclass=CoreDistribution,
    cmdclass={"build_py": BuildWithCore, "bdist_wheel": WheelWithCore},
)
