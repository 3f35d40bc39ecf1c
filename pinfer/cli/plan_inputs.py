"""From the options of `pinfer plan` to a problem: which hardware, which model, which statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

from pinfer.engine.hardware import Machine, read_machine
from pinfer.engine.rates import GpuRates, Rates, kept_rates
from pinfer.placement import Hardware
from pinfer.placement.named import DERATED, IDEAL, Card, Reach, find_card, find_memory

GB = 1e9
# Of options: the least and the most.
LIMITS = (
    ("gpu_memory_gb", 0, 1e6),
    ("gpu_bandwidth", 1e-3, 1e6),
    ("ram_bandwidth", 1e-3, 1e6),
    ("pcie_bandwidth", 1e-3, 1e6),
    ("sync_us", 0, 1e6),
    ("gpu_efficiency", 0.01, 1),
    ("cpu_efficiency", 0.01, 1),
)
DEFAULT_GUIDE_BANDWIDTH = 80 * GB  # the guide leaves open which memory it speaks of
OF_GUIDE = ("ram", "ram_bandwidth", "ideal")  # options that the guide's tables depend on
NOT_MEASURED = "pinfer doctor --measure has not measured this machine"


@dataclass(frozen=True)
class HardwareOptions:
    """What was asked for; None takes it from a named card or memory, or from what was measured here.

    Bandwidths in GB/s, memory in GB of 10^9 bytes, sync_us in µs.
    """

    gpu: str | None = None
    gpu_memory_gb: float | None = None
    gpu_bandwidth: float | None = None
    ram: str | None = None
    ram_bandwidth: float | None = None
    pcie_bandwidth: float | None = None
    sync_us: float | None = None
    gpu_efficiency: float | None = None
    cpu_efficiency: float | None = None
    ideal: bool = False

    def __post_init__(self) -> None:
        """ValueError for a number out of range, or two answers to one question."""
        for name, least, most in LIMITS:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{flag(name)} must lie in [{least:g}, {most:g}], not {value:g}")
        if self.ram is not None and self.ram_bandwidth is not None:
            raise ValueError(f"give --ram {self.ram} or --ram-bandwidth {self.ram_bandwidth:g}, not both")

    @property
    def reach(self) -> Reach:
        """The shares of data sheets that are assumed where none is given."""
        return IDEAL if self.ideal else DERATED


def check_for_guide(asked: HardwareOptions, others: Mapping[str, object]) -> None:
    """ValueError for an option that --guide would leave out. others: values by name, None where not given."""
    own = {one.name: getattr(asked, one.name) for one in fields(asked) if one.name not in OF_GUIDE}
    for name, value in (own | dict(others)).items():
        if value is not None:
            raise ValueError(f"{flag(name)} {value} has no meaning with --guide")


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


class Finder:
    """Hardware for a plan: given by flags, else of the named card, else as measured on this machine."""

    def __init__(self, options: HardwareOptions) -> None:
        self.options = options
        self.card: Card | None = None if options.gpu is None else find_card(options.gpu)

    @cached_property
    def machine(self) -> Machine:
        return read_machine()

    @cached_property
    def rates(self) -> Rates | None:
        return kept_rates(self.machine)

    def hardware(self) -> Hardware:
        """ValueError says which figure is missing, and how to give it."""
        asked, reach = self.options, self.options.reach
        gpu = None if self.card or asked.gpu_bandwidth or self.rates is None else self.rates.gpu
        to_gpu, to_cpu = self._copies(gpu)
        measured_sync = gpu.sync_s if gpu and not asked.ideal else reach.sync_s
        return Hardware(
            name=f"{self._gpu_name()} and {self._memory_name()}",
            gpu_bytes=self._gpu_bytes(),
            gpu_bandwidth=self._gpu_bandwidth(),
            cpu_bandwidth=self._cpu_bandwidth(),
            gpu_efficiency=reach.gpu_efficiency if asked.gpu_efficiency is None else asked.gpu_efficiency,
            cpu_efficiency=reach.cpu_efficiency if asked.cpu_efficiency is None else asked.cpu_efficiency,
            to_gpu_bandwidth=to_gpu,
            to_cpu_bandwidth=to_cpu,
            sync_s=measured_sync if asked.sync_us is None else asked.sync_us / 1e6,
            kernel_s=gpu.graph_kernel_s if gpu and not asked.ideal else 0.0,
        )

    def _copies(self, measured: GpuRates | None) -> tuple[float, float]:
        """Bytes/s to the GPU and to the CPU."""
        if self.options.pcie_bandwidth is not None:
            return (GB * self.options.pcie_bandwidth,) * 2
        if measured is not None:
            return measured.to_gpu_bandwidth, measured.to_cpu_bandwidth
        if self.card:
            return (self.card.copy_bandwidth,) * 2
        return Hardware.to_gpu_bandwidth, Hardware.to_cpu_bandwidth

    def budget_bytes(self) -> int | None:
        """The GPU memory to stay within; ValueError above what the card has."""
        if self.options.gpu_memory_gb is None:
            return None
        budget = round(GB * self.options.gpu_memory_gb)  # as a run does, which looks for a plan of its budget
        if self.card and budget > self.card.memory_bytes:
            raise ValueError(
                f"--gpu-memory-gb {self.options.gpu_memory_gb:g} is more than the {self.card.memory_bytes / GB:.2f} "
                f"of {self.card.name}"
            )
        return budget

    def _gpu_bytes(self) -> int:
        if self.card:
            return self.card.memory_bytes
        if (budget := self.budget_bytes()) is not None:
            return budget
        if self.machine.gpu is None:
            raise ValueError(f"name a GPU with --gpu, or its memory with --gpu-memory-gb: {self.machine.gpu_problem}")
        return self.machine.gpu.memory_bytes

    def _gpu_bandwidth(self) -> float:
        if self.options.gpu_bandwidth is not None:
            return GB * self.options.gpu_bandwidth
        if self.card:
            return self.card.bandwidth
        if self.rates and self.rates.gpu:
            return self.rates.gpu.read_bandwidth
        why = self.machine.gpu_problem or NOT_MEASURED
        raise ValueError(f"name a GPU with --gpu, or its bandwidth with --gpu-bandwidth: {why}")

    def _cpu_bandwidth(self) -> float:
        if self.options.ram_bandwidth is not None:
            return GB * self.options.ram_bandwidth
        if self.options.ram is not None:
            return find_memory(self.options.ram).bandwidth
        if self.rates:
            return self.rates.cpu_bandwidth
        raise ValueError(f"give the memory's bandwidth with --ram-bandwidth, or its kind with --ram: {NOT_MEASURED}")

    def guide_bandwidth(self) -> float:
        """Bytes/s of the memory that the guide's tables are for: not this machine's, but what is named."""
        if self.options.ram is None and self.options.ram_bandwidth is None:
            return DEFAULT_GUIDE_BANDWIDTH
        return self._cpu_bandwidth()

    def _gpu_name(self) -> str:
        if self.card:
            return self.card.name
        if self.options.gpu_bandwidth is None and self.machine.gpu is not None:
            return self.machine.gpu.name
        return "a GPU"

    def _memory_name(self) -> str:
        if self.options.ram is not None:
            return find_memory(self.options.ram).name
        return "memory" if self.options.ram_bandwidth is not None else "this machine's memory"
