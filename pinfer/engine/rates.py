"""How fast this machine is, measured once and kept: what `pinfer doctor --measure` finds and `pinfer plan` uses.

The figures lie in the cache folder, a file for each machine as it was when they were measured: its processor,
cores, memory, GPU and driver are in the file and in its name. After a change of one of them they are not found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pinfer.engine.hardware import Machine
from pinfer.files import write_atomically
from pinfer.kernels.cpp import cache_folder
from pinfer.kernels.cpp.bandwidth import read_bandwidth
from pinfer.kernels.ops import quant_matmul
from pinfer.kernels.registry import use_backend, use_int8
from pinfer.overlap import PrefillCosts
from pinfer.quant import Q8_0
from pinfer.quantize import quantize

FORMAT = 1
BUFFER_BYTES = 1 << 30  # larger than the caches of any processor
MEMORY_SHARE = 4  # of the memory that is free, a buffer takes at most one part in so many
PROMPT_TOKENS, WIDTH, PRODUCTS = 256, 2048, 5  # of the products that are timed


@dataclass(frozen=True)
class GpuRates:
    """What a GPU was measured at: bytes/s of reading its memory and of copies from and to pinned memory; seconds.

    sync_s: x to the host and a result back, waited for, as a layer that is split over both hands over.
    kernel_s, graph_kernel_s: one launch in a row of them, eagerly and in a CUDA graph.
    """

    read_bandwidth: float
    to_gpu_bandwidth: float
    to_cpu_bandwidth: float
    sync_s: float
    kernel_s: float
    graph_kernel_s: float


@dataclass(frozen=True)
class Rates:
    """What a machine was measured at: bytes/s of reading its memory by number of threads; its GPU, None without one.

    cpu_flops: float operations/s of quantised products over a prompt's tokens; None where they were not measured.
    """

    cpu_read_bandwidth: dict[int, float]
    gpu: GpuRates | None = None
    cpu_flops: float | None = None

    def __post_init__(self) -> None:
        """ValueError for what is no positive number, and without a figure for any number of threads."""
        values = [*self.cpu_read_bandwidth.values(), *(dataclasses.astuple(self.gpu) if self.gpu else ())]
        values += [] if self.cpu_flops is None else [self.cpu_flops]
        if not self.cpu_read_bandwidth or not all(math.isfinite(value) and value > 0 for value in values):
            raise ValueError(f"rates must be finite and above 0: {values}")

    @property
    def best_threads(self) -> int:
        """The number of threads that reads fastest."""
        return max(self.cpu_read_bandwidth, key=lambda threads: self.cpu_read_bandwidth[threads])

    @property
    def cpu_bandwidth(self) -> float:
        """Bytes/s read by the best number of threads."""
        return self.cpu_read_bandwidth[self.best_threads]


def measure_cpu(
    machine: Machine, tell: Callable[[str], None], read: Callable[[int, int], float] = read_bandwidth
) -> dict[int, float]:
    """Bytes/s by number of threads: 1, 2, 4 … and as many as there are cores. BackendUnavailable without the core.

    read: bytes/s that so many threads read over a buffer of so many bytes.
    """
    size = min(BUFFER_BYTES, max(machine.available_bytes, 1) // MEMORY_SHARE)
    cores = machine.topology.threads if machine.topology else 1
    found = {}
    for threads in sorted({1 << power for power in range(cores.bit_length())} | {cores}):
        found[threads] = read(threads, size)
        tell(f"CPU memory, {threads} {'thread' if threads == 1 else 'threads'}: {found[threads] / 1e9:.1f} GB/s")
    return found


def measure_products(tell: Callable[[str], None]) -> float:
    """Float operations/s of a prompt's products with Q8_0 weights on torch's number of threads, the best of some."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(PROMPT_TOKENS, WIDTH, generator=generator), torch.randn(WIDTH, WIDTH, generator=generator)
    stored = quantize(weight, Q8_0)
    best = math.inf
    with use_backend("cpu"), use_int8():
        for _ in range(PRODUCTS):
            began = time.perf_counter()
            quant_matmul(x, stored)
            best = min(best, time.perf_counter() - began)
    flops = 2 * PROMPT_TOKENS * WIDTH * WIDTH / best
    tell(f"CPU products over {PROMPT_TOKENS} tokens: {flops / 1e9:.0f} GFLOP/s")
    return flops


def prefill_costs(rates: Rates | None) -> PrefillCosts | None:
    """What a prompt's cold neurons cost on this machine's CPU, and their weights' way to its GPU; None where unknown."""
    if rates is None or rates.gpu is None:
        return None
    return PrefillCosts(rates.cpu_bandwidth, rates.gpu.to_gpu_bandwidth, rates.cpu_flops)


def machine_key(machine: Machine) -> dict[str, Any]:
    """What the figures depend on, as plain data."""
    gpu = machine.gpu
    return {
        "cpu": machine.cpu,
        "instruction_set": machine.instruction_set,
        "cores": len(machine.topology.cores) if machine.topology else None,
        "quota": machine.topology.quota if machine.topology else None,
        "memory_bytes": machine.memory_bytes,
        "gpu": gpu and gpu.name,
        "gpu_uuid": gpu and gpu.uuid,
        "driver": gpu and gpu.driver,
    }


def rates_path(machine: Machine) -> Path:
    """The file of a machine's figures, in the cache folder."""
    key = json.dumps(machine_key(machine), sort_keys=True)
    return cache_folder() / "rates" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def keep_rates(machine: Machine, rates: Rates) -> Path:
    """Write the figures of a machine; the file. OSError says why not."""
    content = {"format": FORMAT, "machine": machine_key(machine), "rates": dataclasses.asdict(rates)}
    path = rates_path(machine)
    write_atomically(path, json.dumps(content, indent=1).encode())
    return path


def kept_rates(machine: Machine) -> Rates | None:
    """The figures of a machine; None where none are kept, or they are damaged, or of another machine or format."""
    try:
        content = json.loads(rates_path(machine).read_bytes())
        if content["format"] != FORMAT or content["machine"] != machine_key(machine):
            return None
        values = content["rates"]
        threads = {int(threads): float(value) for threads, value in values["cpu_read_bandwidth"].items()}
        return Rates(threads, GpuRates(**values["gpu"]) if values["gpu"] else None, values.get("cpu_flops"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        return None  # RuntimeError: a user without a home
