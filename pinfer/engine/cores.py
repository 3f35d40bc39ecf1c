"""Which processors threads run on: reads Linux's topology, and places threads and memory by a NUMA policy.

`none` leaves both to the system. `distribute` spreads threads over the nodes by turns and interleaves
memory over them; `isolate` keeps to the cores and the memory of the node the process started on. On
a machine of one node both pin threads and leave memory alone.

Threads are pinned while they run a program of the C++ core: the calling thread is let go at its end
(as llama.cpp does), so that nothing else of the process and no child of it inherits the pin. The
memory policy stays with the process. A file that the system holds in memory already stays where it lies.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

from pinfer.config import Numa
from pinfer.kernels.cpp import core_problem, load_core
from pinfer.overlap import Place

TORCH_THREADS = torch.get_num_threads()  # before anything sets it: OMP_NUM_THREADS, or torch's guess
# As Linux numbers the policies of set_mempolicy.
DEFAULT, PREFERRED, INTERLEAVED = 0, 1, 3
UNLIMITED = 1 << 60  # version 1 of cgroups says "no limit" with a number near 2^63


@dataclass(frozen=True)
class Core:
    """A physical core: its processors (hardware threads) that this process may use, ascending, and its node."""

    cpus: tuple[int, ...]
    node: int


@dataclass(frozen=True)
class Topology:
    """The cores this process may use, by their first processor; `quota` is in processors' worth of time, None unlimited."""

    cores: tuple[Core, ...]
    quota: float | None = None

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted({core.node for core in self.cores}))

    @property
    def threads(self) -> int:
        """One for each core, but no more than the quota keeps running."""
        return max(1, min(len(self.cores), int(self.quota or len(self.cores))))

    def cpus_of(self, node: int) -> list[int]:
        """A node's processors: one of every core, then the second of each, and so on."""
        cores = [core.cpus for core in self.cores if core.node == node]
        return [cpus[i] for i in range(max(map(len, cores), default=0)) for cpus in cores if i < len(cpus)]


@dataclass(frozen=True)
class Placement:
    """How many threads run, on which processor each (none: anywhere), and where memory comes from."""

    threads: int
    cpus: tuple[int, ...] = ()
    memory: int = DEFAULT
    nodes: tuple[int, ...] = ()


def default_threads() -> int:
    """OMP_NUM_THREADS where it is set; else the physical cores within affinity and quota; torch's number off Linux."""
    topology = None if os.environ.get("OMP_NUM_THREADS") else read_topology()
    return TORCH_THREADS if topology is None else topology.threads


def cold_places(threads: int, topology: Topology, spare: int = 1) -> list[Place]:
    """Where `threads` threads compute cold neurons: a worker for each node, pinned to cores of it, its memory there.

    The first `spare` cores are left to the thread that drives the device, and to what else runs. On a machine of one
    node memory is left alone. ValueError for fewer threads than nodes, or more than there are cores for.
    """
    nodes = topology.nodes
    cpus = {node: topology.cpus_of(node)[: sum(core.node == node for core in topology.cores)] for node in nodes}
    cpus[nodes[0]] = cpus[nodes[0]][spare:]
    shares = [(threads + i) // len(nodes) for i in range(len(nodes))]  # the odd ones to the last
    for node, share in zip(nodes, shares, strict=True):
        if not 1 <= share <= len(cpus[node]):
            raise ValueError(
                f"{share} of {threads} threads fall to node {node}, which has {len(cpus[node])} cores for them"
            )
    only = len(nodes) == 1
    return [
        Place(share, tuple(cpus[node][:share]), None if only else node)
        for node, share in zip(nodes, shares, strict=True)
    ]


_in_force = Placement(0)  # the last one applied in this process


def place_threads(policy: Numa, threads: int) -> tuple[int, tuple[str, ...]]:
    """Apply a policy to the core's threads and this process's memory; the number of threads to run, and remarks."""
    global _in_force
    if policy == "none" and not _in_force.cpus:
        return threads, ()
    topology = read_topology()
    if topology is None:
        return threads, (f"--numa {policy} has no effect: this system does not say which cores it has",)
    if problem := core_problem():
        return threads, (f"--numa {policy} has no effect without the C++ core: {problem}",)
    placement = plan(policy, threads, topology, current_cpu())
    remarks = tuple(f"--numa {policy}: {remark}" for remark in _apply(placement, _in_force))
    _in_force = placement
    if placement.threads < threads:
        remarks = (
            *remarks,
            f"--numa {policy}: {placement.threads} threads run, one for each core of the node, not {threads}",
        )
    return placement.threads, remarks


def _apply(placement: Placement, before: Placement) -> Iterator[str]:
    """Tell the core, and yield what the system refuses."""
    core = load_core()
    if placement.memory != before.memory:
        # Before the threads are pinned: those that start for it inherit the policy.
        nodes = (ctypes.c_int32 * len(placement.nodes))(*placement.nodes)
        if core.pinfer_memory(placement.memory, nodes, len(nodes), placement.threads) < placement.threads:
            yield "the system refuses the memory policy"
    cpus = (ctypes.c_int32 * len(placement.cpus))(*placement.cpus)
    if (pinned := core.pinfer_pin(cpus, len(cpus))) < len(cpus):
        yield f"the system lets {pinned} of {len(cpus)} threads be pinned"


def plan(policy: Numa, threads: int, topology: Topology, here: int | None) -> Placement:
    """The placement of `threads` threads; `here` is the processor the process runs on."""
    if policy == "none":
        return Placement(threads)
    nodes = topology.nodes
    memory = PREFERRED if policy == "isolate" else INTERLEAVED
    if policy == "isolate":
        nodes = (next((core.node for core in topology.cores if here in core.cpus), nodes[0]),)
        threads = min(threads, sum(core.node in nodes for core in topology.cores))
    cpus = _by_turns([topology.cpus_of(node) for node in nodes])
    pinned = tuple(cpus[i % len(cpus)] for i in range(threads))
    return Placement(threads, pinned) if len(topology.nodes) == 1 else Placement(threads, pinned, memory, nodes)


def _by_turns(lists: list[list[int]]) -> list[int]:
    longest = max(map(len, lists))
    return [items[i] for i in range(longest) for items in lists if i < len(items)]


def read_topology(root: Path = Path("/"), allowed: Collection[int] | None = None) -> Topology | None:
    """The cores below `root`, of which `allowed` may be used (this process's affinity); None where Linux's /sys is missing."""
    if allowed is None:
        allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    system = root / "sys/devices/system"
    usable = _listed(system / "cpu/online") & set(allowed)
    if not usable:
        return None
    node_of = {
        cpu: int(path.name.removeprefix("node"))
        for path in system.glob("node/node[0-9]*")
        for cpu in _listed(path / "cpulist")
    }
    siblings = {tuple(sorted((_siblings(system, cpu) | {cpu}) & usable)) for cpu in usable}
    cores = tuple(Core(cpus, node_of.get(cpus[0], 0)) for cpus in sorted(siblings))
    return Topology(cores, cpu_quota(root))


def _siblings(system: Path, cpu: int) -> set[int]:
    topology = system / f"cpu/cpu{cpu}/topology"
    return _listed(topology / "core_cpus_list") or _listed(topology / "thread_siblings_list")


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the process's cgroups grant, the least of them; None without a limit."""
    limits = [limit for folder in _cgroups(root, "cpu") if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes of memory that the process's cgroups grant, the least of them; None without a limit."""
    names = ("memory.max", "memory.limit_in_bytes")
    texts = (_text(folder / name).strip() for folder in _cgroups(root, "memory") for name in names)
    limits = [int(text) for text in texts if text.isdigit()]
    return min((limit for limit in limits if limit < UNLIMITED), default=None)


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's cgroups that may limit `controller` (cpu, memory), and of all above them."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        path = PurePosixPath(name.lstrip("/"))
        if ".." in path.parts:  # outside of what this process sees
            path = PurePosixPath()
        bases = []
        if number == "0":  # version 2, alone or beside version 1
            bases = [mount, mount / "unified"]
        elif controller in controllers.split(","):
            bases = [mount / controllers, mount / controller]
        for base in bases:
            # A container sees its own cgroup at the top, though its name here may be longer.
            yield from (base / folder for folder in (path, *path.parents))


def _limit(folder: Path) -> float | None:
    quota, period = [*_text(folder / "cpu.max").split(), "", ""][:2]  # "max 100000" or "150000 100000"
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit() and int(period):
        return int(quota) / int(period)
    return None  # "max", -1, or no such file


def current_cpu(root: Path = Path("/")) -> int | None:
    """The processor the process's first thread last ran on; None where /proc does not say."""
    # What follows the name in brackets starts with field 3; the processor is field 39.
    fields = _text(root / "proc/self/stat").rpartition(")")[2].split()
    return int(fields[36]) if len(fields) > 36 else None


def _listed(path: Path) -> set[int]:
    """The numbers of a list such as 0-3,8; none where the file is missing."""
    numbers: set[int] = set()
    for part in filter(None, _text(path).strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
