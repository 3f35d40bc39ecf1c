"""What a machine can do, as far as placement asks."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Hardware:
    """One GPU beside one CPU. GB is 10^9 bytes; bandwidths are of reading, in bytes/s; times in seconds.

    gpu_bytes:     the GPU's memory.
    gpu_bandwidth, cpu_bandwidth: of the GPU's memory and of the machine's, as data sheets have them or as measured.
    gpu_efficiency, cpu_efficiency: the share of it that kernels reach (1 for the roofline).
    to_gpu_bandwidth, to_cpu_bandwidth: of copies over PCIe from and to pinned memory.
    sync_s:        what a layer split over both costs beside its parts: the hand-over there and back.
    kernel_s:      what one launch on the GPU costs where nothing else hides it.
    """

    name: str
    gpu_bytes: int
    gpu_bandwidth: float
    cpu_bandwidth: float
    gpu_efficiency: float = 1.0
    cpu_efficiency: float = 1.0
    to_gpu_bandwidth: float = 25e9
    to_cpu_bandwidth: float = 25e9
    sync_s: float = 30e-6
    kernel_s: float = 0.0

    def __post_init__(self) -> None:
        """ValueError for what is not finite and in its range."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "name":
                continue
            least = 0.0 if field.name in ("gpu_bytes", "sync_s", "kernel_s") else math.ulp(0.0)
            most = 1.0 if field.name.endswith("efficiency") else math.inf
            if not (math.isfinite(value) and least <= value <= most):
                limit = "at least 0" if least == 0 else f"above 0{'' if most == math.inf else ' and at most 1'}"
                raise ValueError(f"{field.name} must be finite and {limit}, not {value}")

    @property
    def gpu_speed(self) -> float:
        """Bytes/s that kernels read on the GPU."""
        return self.gpu_bandwidth * self.gpu_efficiency

    @property
    def cpu_speed(self) -> float:
        """Bytes/s that kernels read on the CPU."""
        return self.cpu_bandwidth * self.cpu_efficiency
