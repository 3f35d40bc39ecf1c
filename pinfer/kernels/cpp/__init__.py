"""The CPU core: C++ behind a plain C ABI, compiled at first use and called through ctypes."""

from pinfer.kernels.cpp.build import CoreError, cache_folder, core_available, core_problem, load_core

__all__ = ["CoreError", "cache_folder", "core_available", "core_problem", "load_core"]
