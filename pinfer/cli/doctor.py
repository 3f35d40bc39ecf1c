"""pinfer doctor: what this machine has, how fast it is, and what to set on it."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import torch
import typer

from pinfer.benchmark.other_load import BUSY_CORES, OtherLoad
from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.engine.advice import advice
from pinfer.engine.gpu_rates import CudaDevice, measure_gpu
from pinfer.engine.hardware import Machine, read_machine
from pinfer.engine.rates import Rates, keep_rates, kept_rates, measure_cpu, measure_products, rates_path

NAME_WIDTH = 15


def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure memory and PCIe bandwidth and the cost of a hand-over; keep them."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Show GPU, processor, NUMA nodes and memory, what to set, and measure what plans rest on."""
    machine = read_machine()
    rates = _measured(machine) if measure else kept_rates(machine)
    if json:
        emit_json(_figures(machine, rates))
    else:
        _print(machine, rates)


def _measured(machine: Machine) -> Rates:
    """Measured now, and kept; RuntimeError where nothing can be measured."""
    if machine.core_problem is not None:
        raise RuntimeError(f"CPU bandwidth cannot be measured: {machine.core_problem}")
    load = OtherLoad([])
    cpu, flops = measure_cpu(machine, note), measure_products(note)
    if machine.gpu is None:
        note(f"no GPU is measured: {machine.gpu_problem}")
        rates = Rates(cpu, None, flops)
    else:
        with torch.inference_mode():
            rates = Rates(cpu, measure_gpu(CudaDevice(), note), flops)
    if (busy := load.cores() or 0.0) > BUSY_CORES:
        note(f"other programs kept {busy:.1f} cores busy meanwhile: measure again when they do not, plans rest on this")
    try:
        note(f"kept in {keep_rates(machine, rates)}")
    except (OSError, RuntimeError) as problem:
        note(f"the figures cannot be kept: {problem}")
    return rates


def _figures(machine: Machine, rates: Rates | None) -> dict[str, Any]:
    plain = dataclasses.asdict(machine)
    topology = machine.topology
    return {
        **plain,
        "nodes": list(plain["nodes"]),
        "topology": topology and dataclasses.asdict(topology) | {"nodes": topology.nodes},
        "threads": topology.threads if topology else torch.get_num_threads(),
        "gpu": machine.gpu and machine.gpu.name,
        "usable_bytes": machine.usable_bytes,
        "torch": torch.__version__,
        "rates": rates and dataclasses.asdict(rates),
        "rates_file": str(rates_path(machine)) if rates else None,
        "advice": list(advice(machine, rates)),
    }


def _print(machine: Machine, rates: Rates | None) -> None:
    out = console()
    for name, value in (*_facts(machine), *_speeds(rates)):
        out.print(printable(f"{name:<{NAME_WIDTH}}{value}"))
    remarks = advice(machine, rates)
    if remarks:
        out.print("\nadvice")
    for remark in remarks:
        out.print(printable(f"- {remark}"))


def _facts(machine: Machine) -> list[tuple[str, str]]:
    topology = machine.topology
    facts = [("GPU", f"none: {machine.gpu_problem}")] if machine.gpu is None else []
    for gpu in machine.gpus:
        where = "" if gpu.node is None else f", NUMA node {gpu.node}"
        held = f"{size(gpu.memory_bytes)}, {size(gpu.free_bytes)} free"
        facts.append(("GPU", f"{gpu.name}, {held}, driver {gpu.driver}{where}"))
    facts.append(("processor", machine.cpu))
    facts.append(("C++ core", machine.instruction_set or f"none: {machine.core_problem}"))
    if topology is not None:
        quota = "no quota" if topology.quota is None else f"quota of {topology.quota:g}"
        cpus = sum(len(core.cpus) for core in topology.cores)
        facts.append(("cores", f"{len(topology.cores)} ({cpus} hardware threads), {quota}; {topology.threads} threads"))
    limit = "" if machine.memory_limit is None else f", cgroup limit {size(machine.memory_limit)}"
    facts.append(("memory", f"{size(machine.memory_bytes)}, {size(machine.available_bytes)} available{limit}"))
    for node in machine.nodes:
        facts.append((f"NUMA node {node.number}", f"processors {node.cpus or 'none'}, {size(node.memory_bytes)}"))
    facts.append(("huge pages", machine.huge_pages or "unknown"))
    facts.append(("compiler", machine.compiler or "none"))
    facts.append(("torch, Triton", f"{torch.__version__}, {machine.triton or 'no Triton'}"))
    return facts


def _speeds(rates: Rates | None) -> list[tuple[str, str]]:
    if rates is None:
        return [("measured", "nothing yet")]
    by_threads = ", ".join(f"{value / 1e9:.1f} GB/s with {n}" for n, value in rates.cpu_read_bandwidth.items())
    speeds = [("CPU reads", f"{by_threads} {'thread' if [*rates.cpu_read_bandwidth] == [1] else 'threads'}")]
    if rates.cpu_flops is not None:
        speeds.append(("CPU products", f"{rates.cpu_flops / 1e9:.0f} GFLOP/s over a prompt"))
    if (gpu := rates.gpu) is not None:
        speeds += [
            ("GPU reads", f"{gpu.read_bandwidth / 1e9:.0f} GB/s"),
            ("PCIe", f"{gpu.to_gpu_bandwidth / 1e9:.1f} GB/s to the GPU, {gpu.to_cpu_bandwidth / 1e9:.1f} GB/s back"),
            ("hand-over", f"{1e6 * gpu.sync_s:.1f} µs"),
            ("a launch", f"{1e6 * gpu.kernel_s:.1f} µs, {1e6 * gpu.graph_kernel_s:.1f} µs in a graph"),
        ]
    return speeds
