"""What this machine has: processor, memory, NUMA nodes and GPUs, read without touching a GPU; and what to set on it.

Facts come from Linux's /sys and /proc and from nvidia-smi. Whatever is missing there is left out: nothing here fails.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from pinfer.engine.cores import Topology, memory_limit, read_topology
from pinfer.kernels.cpp import core_problem, load_core
from pinfer.kernels.cpp.compile import CompileError, find_compiler

SMI_FIELDS = "uuid,name,driver_version,memory.total,memory.free,pci.bus_id"
SMI_TIMEOUT_S = 20.0  # without its persistence daemon a driver takes seconds to start


@dataclass(frozen=True)
class Node:
    """A NUMA node: its processors as Linux lists them, its memory in bytes."""

    number: int
    cpus: str
    memory_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver describes it; the NUMA node its PCIe slot belongs to, None where unknown."""

    name: str
    uuid: str
    driver: str
    memory_bytes: int
    free_bytes: int
    node: int | None


@dataclass(frozen=True)
class Machine:
    """A machine as this process may use it.

    instruction_set, core_problem: of the C++ core, or why there is none. memory_limit: of the cgroup, None without.
    gpu_problem: why none of `gpus` can be used, None where one can. triton, compiler: version and command, None
    without. huge_pages: Linux's setting for transparent ones. waiting: OMP_WAIT_POLICY of this process.
    """

    cpu: str
    instruction_set: str | None
    core_problem: str | None
    topology: Topology | None
    nodes: tuple[Node, ...]
    memory_bytes: int
    available_bytes: int
    memory_limit: int | None
    gpus: tuple[Gpu, ...]
    gpu_problem: str | None
    triton: str | None
    compiler: str | None
    huge_pages: str | None
    waiting: str | None

    @property
    def usable_bytes(self) -> int:
        """Memory that this process may take at most."""
        return self.memory_bytes if self.memory_limit is None else min(self.memory_bytes, self.memory_limit)

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that runs would use, None where none can be used."""
        return self.gpus[0] if self.gpus and self.gpu_problem is None else None


def read_machine(root: Path = Path("/")) -> Machine:
    """The machine below `root`."""
    gpus = read_gpus(root)
    memory = _meminfo(root / "proc/meminfo")
    problem = core_problem()
    return Machine(
        cpu=cpu_name(root),
        instruction_set=None if problem else load_core().pinfer_instruction_set().decode(),
        core_problem=problem,
        topology=read_topology(root),
        nodes=tuple(_nodes(root)),
        memory_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable", memory.get("MemFree", 0)),
        memory_limit=memory_limit(root),
        gpus=gpus,
        gpu_problem=gpu_problem(gpus, torch.cuda.is_available(), torch.version.cuda),
        triton=_version_of("triton"),
        compiler=_compiler(),
        huge_pages=_chosen(_text(root / "sys/kernel/mm/transparent_hugepage/enabled")),
        waiting=os.environ.get("OMP_WAIT_POLICY"),
    )


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name, or what the system calls its kind."""
    found = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def gpu_problem(gpus: tuple[Gpu, ...], available: bool, cuda: str | None) -> str | None:
    """Why no GPU can be used: `available` and `cuda` are what torch says. None where one can."""
    if available:
        return None
    if not gpus:
        return "there is no NVIDIA GPU, or no driver for it"
    if cuda is None:
        return "torch was built without CUDA: install a build for CUDA"
    return (
        f"torch's CUDA {cuda} cannot use it: the driver ({gpus[0].driver}) is too old, or CUDA_VISIBLE_DEVICES hides it"
    )


def read_gpus(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """The machine's NVIDIA GPUs as nvidia-smi lists them; those that torch can use come first, in its order."""
    gpus = parse_gpus(_nvidia_smi(), root)
    visible = [
        str(getattr(torch.cuda.get_device_properties(index), "uuid", "")) for index in range(torch.cuda.device_count())
    ]
    return tuple(sorted(gpus, key=lambda gpu: _place(gpu.uuid.removeprefix("GPU-"), visible)))


def _place(uuid: str, visible: list[str]) -> int:
    return visible.index(uuid) if uuid in visible else len(visible)


def parse_gpus(listing: str, root: Path) -> list[Gpu]:
    """What nvidia-smi's CSV of SMI_FIELDS describes; a line that is not of this form is left out."""
    gpus = []
    for line in listing.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 6 and fields[3].isdigit() and fields[4].isdigit():
            uuid, name, driver, total, free, bus = fields
            gpus.append(Gpu(name, uuid, driver, int(total) << 20, int(free) << 20, _node_of(bus, root)))
    return gpus


def _node_of(bus: str, root: Path) -> int | None:
    """The NUMA node of a PCI device, 00000000:3B:00.0 as nvidia-smi writes it; Linux has -1 where it does not know."""
    domain, _, rest = bus.lower().partition(":")
    text = _text(root / f"sys/bus/pci/devices/{domain[-4:]}:{rest}/numa_node").strip()
    return int(text) if text.isdigit() else None


def _nvidia_smi() -> str:
    command = ("nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader,nounits")
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout if run.returncode == 0 else ""


def _nodes(root: Path) -> Iterator[Node]:
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    for folder in sorted(folders, key=lambda path: int(path.name[4:])):
        memory = _meminfo(folder / "meminfo")
        cpus = _text(folder / "cpulist").strip()
        yield Node(int(folder.name[4:]), cpus, memory.get("MemTotal", 0), memory.get("MemFree", 0))


def _meminfo(path: Path) -> dict[str, int]:
    """Bytes by name, out of /proc/meminfo or a node's, whose lines begin with the node."""
    found = re.findall(r"(?:^|\s)(\w+):\s+(\d+) kB", _text(path))
    return {name: int(value) << 10 for name, value in found}


def _compiler() -> str | None:
    try:
        return " ".join(find_compiler())
    except CompileError:
        return None


def _version_of(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return importlib.metadata.version(package)


def _chosen(setting: str) -> str | None:
    """The choice in brackets of a /sys setting such as `always [madvise] never`."""
    found = re.search(r"\[(\w+)\]", setting)
    return found[1] if found else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
