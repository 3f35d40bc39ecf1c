"""What to set on a machine before a large model runs on it, each piece of advice with the figure that it rests on."""

from __future__ import annotations

from collections.abc import Iterator

from pinfer.engine.hardware import Machine
from pinfer.engine.rates import Rates

HELD_SHARE = 0.1  # of a GPU's memory, held by other programs, worth a remark
SLOWER = 0.9  # of the best read bandwidth: below it the default number of threads is worth a remark


def advice(machine: Machine, rates: Rates | None) -> tuple[str, ...]:
    """One line each, for `pinfer doctor`; nothing where there is nothing to set."""
    return (*_threads(machine, rates), *_nodes(machine), *_memory(machine), *_gpu(machine), *_software(machine, rates))


def _threads(machine: Machine, rates: Rates | None) -> Iterator[str]:
    topology = machine.topology
    if topology is None:
        yield "this system does not say which cores it has: name the number of physical ones with -t"
        return
    hardware_threads = sum(len(core.cpus) for core in topology.cores)
    if hardware_threads > len(topology.cores):
        yield (
            f"-t {topology.threads}, the default, is one thread a core; all {hardware_threads} hardware threads "
            "would share cores and read no faster"
        )
    if topology.quota is not None and topology.quota < len(topology.cores):
        yield (
            f"the cgroup grants {topology.quota:g} processors' worth of time on {len(topology.cores)} cores: "
            f"more than {topology.threads} threads wait for each other"
        )
    if rates is not None:
        default = rates.cpu_read_bandwidth.get(topology.threads, rates.cpu_bandwidth)
        if default < SLOWER * rates.cpu_bandwidth:
            yield (
                f"-t {rates.best_threads}: memory is read at {rates.cpu_bandwidth / 1e9:.1f} GB/s then, "
                f"at {default / 1e9:.1f} with the default of {topology.threads}"
            )
    if machine.waiting != "active":
        yield (
            "OMP_WAIT_POLICY=active lets threads spin between ops: quicker where nothing else runs on these cores, "
            "much slower where something does"
        )


def _nodes(machine: Machine) -> Iterator[str]:
    if len(machine.nodes) < 2:
        return
    yield (
        f"--numa distribute reads the memory of all {len(machine.nodes)} nodes at once; --numa isolate keeps to one, "
        f"for models below {min(node.memory_bytes for node in machine.nodes) / 1e9:.0f} GB"
    )
    if machine.gpu is not None and (near := machine.gpu.node) is not None:
        yield (
            f"the GPU is at node {near}: where one node holds all that stays on the CPU, "
            f"numactl --cpunodebind={near} --membind={near} keeps it beside the GPU"
        )


def _memory(machine: Machine) -> Iterator[str]:
    if machine.memory_limit is not None and machine.memory_limit < machine.memory_bytes:
        yield (
            f"the cgroup grants {machine.memory_limit / 1e9:.1f} GB of the machine's "
            f"{machine.memory_bytes / 1e9:.1f} GB of memory: weights beyond it are read from the disk at every token"
        )
    if machine.huge_pages == "never":
        yield "transparent huge pages are off; with madvise, dense Q4_K has been up to 13 % faster"


def _gpu(machine: Machine) -> Iterator[str]:
    if machine.gpus and machine.gpu_problem is not None:
        yield f"{machine.gpus[0].name}: {machine.gpu_problem}"
    if (gpu := machine.gpu) is not None and gpu.memory_bytes - gpu.free_bytes > HELD_SHARE * gpu.memory_bytes:
        yield (
            f"other programs hold {(gpu.memory_bytes - gpu.free_bytes) / 1e9:.1f} GB of the GPU: "
            f"--gpu-memory-gb {gpu.free_bytes / 1e9:.1f} is what is left"
        )


def _software(machine: Machine, rates: Rates | None) -> Iterator[str]:
    if machine.core_problem is not None:
        yield f"without the C++ core everything on the CPU is slower by far: {machine.core_problem}"
    if machine.gpu is not None and machine.triton is None:
        yield "Triton is missing, and kernels on the GPU need it: pip install triton"
    if rates is None:
        yield "pinfer doctor --measure measures bandwidths, and pinfer plan uses them"
