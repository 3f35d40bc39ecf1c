"""Host functions in CUDA streams and graphs: cuLaunchHostFunc, through ctypes.

CUresult cuLaunchHostFunc(CUstream hStream, CUhostFn fn, void* userData), CUhostFn being void (*)(void* userData)
(CUDA driver API, "Execution Control"; in a stream that is captured it becomes a host node). The function is
`pinfer_run_job` of the core, so no Python runs in the driver's thread. It awaits its first run on a GPU.
"""

from __future__ import annotations

import ctypes

from pinfer.kernels.cpp import load_core
from pinfer.kernels.cpp.worker import Job

LIBRARY = "libcuda.so.1"


class Driver:
    """The CUDA driver's library; OSError where there is none."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._launch = ctypes.CDLL(library).cuLaunchHostFunc
        self._launch.restype = ctypes.c_int
        self._launch.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
        self._run_job = ctypes.cast(load_core().pinfer_run_job, ctypes.c_void_p)

    def launch(self, stream: int, job: Job) -> None:
        """Run a job, and those chained to it, when the stream (its handle) gets there; the job must outlive that.

        RuntimeError with the driver's error number.
        """
        if error := self._launch(stream, self._run_job, job.address):
            raise RuntimeError(f"cuLaunchHostFunc gave CUresult {error}")
