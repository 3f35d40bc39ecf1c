"""Which plan a run has, and whether it fits: from a file, the solved directory, statistics, or -ngl's whole layers.

The estimate comes before any weight is touched. What is above the budget is refused with the numbers, and with the
largest setting that fits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pinfer.config import Method, RunConfig
from pinfer.engine.devices import Device
from pinfer.engine.hardware import read_machine
from pinfer.engine.place import runnable
from pinfer.engine.rates import kept_rates
from pinfer.engine.shape import READS_ALL
from pinfer.engine.solved import ACTIVATIONS, PLAN, Solved
from pinfer.formats.powerinfer import is_gpu_index, read_gpu_index
from pinfer.placement import Hardware, LayerPlan, ModelShape, Plan
from pinfer.placement.memory import Memory, Reserves, check_plan, memory
from pinfer.placement.named import DERATED, find_card, named_hardware
from pinfer.placement.problem import Problem
from pinfer.placement.skew import measured_rates
from pinfer.placement.solver import solve
from pinfer.placement.statistics import from_tensors

GB = 1e9
ASSUMED_CARD, ASSUMED_CPU_BANDWIDTH = "RTX 4090", 80e9  # two channels of DDR5
PLACED = ("attention", "kv", "predictor", "neurons", "compensation", "head")  # items of `memory`
STEP_DOWN = 0.85  # of what was reached when the memory ran out


@dataclass(frozen=True)
class Placement:
    """A plan that runs, on a device, with what it is estimated to take there and where it came from."""

    plan: Plan
    device: Device
    estimate: Memory
    source: str

    @property
    def n_layers(self) -> int:
        """Layers of which everything is on the GPU."""
        return sum(layer.attention == "gpu" and not layer.is_split for layer in self.plan.layers)

    @property
    def hot_share(self) -> float:
        """Share of all neurons that are on the GPU."""
        return sum(layer.n_hot for layer in self.plan.layers) / sum(layer.hot.numel() for layer in self.plan.layers)

    @property
    def placed_bytes(self) -> int:
        """Of the estimate, what is placed: weights, predictors, keys and values."""
        return sum(count for name, count in self.estimate.gpu.items() if name in PLACED)

    def __str__(self) -> str:
        where = "the emulated GPU" if self.device.name == "emulated" else "the GPU"
        return (
            f"{self.n_layers} of {len(self.plan.layers)} layers wholly on {where}, {100 * self.hot_share:.1f} % of all "
            f"neurons, the head on the {self.plan.head.upper()} ({self.source}): {_gb(self.estimate.gpu_bytes)} estimated"
        )


@dataclass(frozen=True)
class Placer:
    """Finds plans for one model. densities: those that predictors were calibrated to, None where they were not."""

    run: RunConfig
    method: Method
    shape: ModelShape
    context: int
    device: Device
    solved: Solved | None = None
    density: float | None = None

    @property
    def reserves(self) -> Reserves:
        return reserves_of(emulated=self.device.name == "emulated")

    def find(self) -> Placement:
        """The plan that the run asks for. ValueError where it does not fit, or the model and it do not."""
        limit, layers = self.device.budget, self.run.gpu_layers
        plan, source = self._given(limit)
        if plan is None and limit is not None and self._has_statistics:
            return self._placement(self._solved(limit), "solved for the budget from the directory's statistics")
        if plan is None:
            count = self.most_layers(limit) if layers is None else layers
            return self.checked(self._layers(count), f"--gpu-layers {count}")
        if layers is not None:
            plan, source = self._with_layers(plan, layers), f"{source}, with --gpu-layers {layers}"
        return self.checked(plan, source)

    def smaller(self, found: Placement, reached_bytes: int) -> Placement | None:
        """One that places clearly less than the `reached_bytes` at which memory ran out; None if nothing is left."""
        for first in range(1, len(found.plan.layers) + 1):
            smaller = self._placement(_without(found.plan, first), f"{found.source}, less its first {first} layers")
            if smaller.placed_bytes < found.placed_bytes and smaller.placed_bytes <= STEP_DOWN * reached_bytes:
                return smaller
        return None

    def checked(self, plan: Plan, source: str) -> Placement:
        """A placement that fits the budget; ValueError with the numbers if it does not."""
        check_plan(self.shape, plan := runnable(plan))
        limit, found = self.device.budget, self._placement(plan, source)
        if limit is None or found.estimate.gpu_bytes <= limit:
            return found
        most = self.most_layers(limit)
        raise ValueError(
            f"the placement ({source}) needs {self._said(found.estimate)} of GPU memory with a context of "
            f"{self.context}, the budget is {_gb(limit)}: the most that fits is --gpu-layers {most} "
            f"({_gb(self.memory(self._layers(most)).gpu_bytes)})"
        )

    def memory(self, plan: Plan) -> Memory:
        return memory(self.shape, plan, self.context, self.reserves)

    def most_layers(self, limit: int | None) -> int:
        """The most whole layers that fit; one more than there are stands for the head."""
        count = len(self.shape.layers) + 1
        while limit is not None and count and self.memory(self._layers(count)).gpu_bytes > limit:
            count -= 1
        return count

    def _given(self, limit: int | None) -> tuple[Plan | None, str]:
        """The plan of --plan, or the directory's unless it was made for another budget than the one there is."""
        if self.run.plan is not None:
            plan = read_plan(self.run.plan, self.shape)
            if self.method in READS_ALL and any(0 < layer.n_hot < layer.hot.numel() for layer in plan.layers):
                raise ValueError(f"--plan {self.run.plan} splits neurons, which the {self.method} method does not name")
            return plan, f"plan {self.run.plan}"
        if self.method in READS_ALL or self.solved is None or not self.solved.has(PLAN):
            return None, ""
        plan = Plan.from_plain(self.solved.read_json(PLAN))
        of_another = self.run.gpu_memory_gb is not None and plan.budget_bytes != limit and self._has_statistics
        return (None, "") if of_another else (plan, f"plan of {self.solved.path}")

    @property
    def _has_statistics(self) -> bool:
        return self.method not in READS_ALL and self.solved is not None and self.solved.has(ACTIVATIONS)

    def _solved(self, limit: int) -> Plan:
        """The fastest for the budget. ValueError where the layers asked for do not fit."""
        assert self.solved is not None
        layers = self.run.gpu_layers or 0
        hardware = measured_hardware(limit) or assumed_hardware(limit)
        statistics = from_tensors(self.solved.read_tensors(ACTIVATIONS), len(self.shape.layers))
        rates = measured_rates(statistics, density=self.density)
        if layers:
            self.checked(self._layers(layers), f"--gpu-layers {layers}")
        problem = Problem(
            self.shape,
            rates,
            hardware,
            self.context,
            limit,
            filled=typically_filled(self.context),
            gpu_layers=layers,
            reserves=self.reserves,
        )
        return runnable(solve(problem).plan)

    def _layers(self, count: int) -> Plan:
        plan = Plan.whole_layers(len(self.shape.layers), self.shape.layers[0].n_neurons, count)
        return runnable(replace(plan, context=self.context))

    def _with_layers(self, plan: Plan, count: int) -> Plan:
        """The plan with so many of the last layers wholly on the GPU."""
        whole = self._layers(count)
        pairs = zip(plan.layers, whole.layers, strict=True)
        layers = tuple(there if there.attention == "gpu" else here for here, there in pairs)
        return replace(plan, layers=layers, head="gpu" if "gpu" in (plan.head, whole.head) else "cpu")

    def _placement(self, plan: Plan, source: str) -> Placement:
        plan = runnable(plan)
        return Placement(plan, self.device, self.memory(plan), source)

    def _said(self, estimate: Memory) -> str:
        items = ", ".join(f"{name} {_gb(count)}" for name, count in estimate.gpu.items() if count)
        return f"{_gb(estimate.gpu_bytes)} ({items})"


def reserves_of(*, emulated: bool) -> Reserves:
    """What a process takes beside weights; an emulated device has no CUDA context, graphs or copies of cold neurons."""
    return Reserves(context_bytes=0, graph_bytes=0, streamed=0) if emulated else Reserves()


def typically_filled(context: int) -> int:
    """Positions that the token has behind it which a plan is to be best for: half of them."""
    return context // 2


def assumed_hardware(gpu_bytes: int) -> Hardware:
    """A card and a memory that stand for those that nobody has measured or named."""
    assumed = named_hardware(find_card(ASSUMED_CARD), ASSUMED_CPU_BANDWIDTH)
    return replace(assumed, gpu_bytes=gpu_bytes)


def measured_hardware(gpu_bytes: int) -> Hardware | None:
    """This machine as `pinfer doctor --measure` found it; None where it has not, or there is no GPU."""
    rates = kept_rates(read_machine())
    if rates is None or rates.gpu is None:
        return None
    gpu = rates.gpu
    return Hardware(
        "measured",
        gpu_bytes=gpu_bytes,
        gpu_bandwidth=gpu.read_bandwidth,
        cpu_bandwidth=rates.cpu_bandwidth,
        gpu_efficiency=DERATED.gpu_efficiency,
        cpu_efficiency=DERATED.cpu_efficiency,
        to_gpu_bandwidth=gpu.to_gpu_bandwidth,
        to_cpu_bandwidth=gpu.to_cpu_bandwidth,
        sync_s=gpu.sync_s,
        kernel_s=gpu.graph_kernel_s,
    )


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / GB:.3g} GB"


def _without(plan: Plan, first: int) -> Plan:
    """The plan with its first layers on the CPU."""

    def off(layer: LayerPlan) -> LayerPlan:
        return LayerPlan("cpu", torch.zeros_like(layer.hot), "cpu")

    layers = tuple(off(layer) if number < first else layer for number, layer in enumerate(plan.layers))
    return replace(plan, layers=layers, head="cpu" if first == len(layers) else plan.head)


def read_plan(path: str, shape: ModelShape | None = None) -> Plan:
    """The plan of a JSON file, as `pinfer plan -o` writes it, or of PowerInfer's split, of a model of that shape if it is given.

    ValueError for a file that holds none.
    """
    if is_gpu_index(Path(path)):
        return _of_gpu_index(Path(path), shape)
    try:
        content: Any = json.loads(Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise ValueError(f"{path}: not JSON: {problem}") from problem
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: no plan: it holds a {type(content).__name__}")
    try:
        return Plan.from_plain(content)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem


def _of_gpu_index(path: Path, shape: ModelShape | None) -> Plan:
    """Its hot neurons, beside attention and head on the GPU, which PowerInfer places before any neuron."""
    hot = read_gpu_index(path, None if shape is None else [layer.n_neurons for layer in shape.layers])
    return Plan(tuple(LayerPlan("gpu", layer) for layer in hot))


def mean_density(densities: Sequence[float] | None) -> float | None:
    """Over all layers, which have the same number of neurons."""
    return sum(densities) / len(densities) if densities else None
