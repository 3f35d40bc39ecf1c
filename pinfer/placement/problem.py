"""What is minimised: the time of a token under a placement.

    T = Σ_layers [ attention + KV + predictor + max(T_gpu, T_cpu) + sync · [split] ] + crossings + head

Each part moves bytes at a device's speed (decode at batch 1 is bound by bandwidth); PowerInfer (Song et al. 2024, §6.3)
states the same maximum as a constraint. `crossings` are the residual's copies where the home of the layers, that of
their attention, changes; a token starts and ends on the CPU (embedding, sampling).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pinfer.placement.hardware import Hardware
from pinfer.placement.memory import Memory, Reserves, check_plan, memory
from pinfer.placement.plan import LayerPlan, Place, Plan
from pinfer.placement.shape import FLOAT_BYTES, LayerShape, ModelShape

# Dependent launches on a GPU: norm, QKV, rope with cache, attention, output; norm, predictor, FFN, combine; norm, head.
ATTENTION_KERNELS, FFN_KERNELS, HEAD_KERNELS = 5, 4, 2


@dataclass(frozen=True, eq=False)
class Problem:
    """What to place, on what.

    rates:        float64 [N] a layer: the share of tokens for which a neuron is named, in [0, 1].
    context:      positions that keys and values are reserved for.
    budget_bytes: of GPU memory; None: all the hardware has.
    filled:       positions that a token attends to; None: the whole context, the slowest token.
    gpu_layers:   so many of the last layers are wholly on the GPU, above the number of layers, or -1, the head too.
    """

    shape: ModelShape
    rates: Sequence[np.ndarray]
    hardware: Hardware
    context: int
    budget_bytes: int | None = None
    filled: int | None = None
    gpu_layers: int = 0
    reserves: Reserves = field(default_factory=Reserves)

    def __post_init__(self) -> None:
        """ValueError for rates of another shape or range, or a number below its least."""
        if len(self.rates) != len(self.shape.layers):
            raise ValueError(f"rates of {len(self.rates)} layers for a model of {len(self.shape.layers)}")
        for number, (rates, layer) in enumerate(zip(self.rates, self.shape.layers, strict=True)):
            if rates.shape != (layer.n_neurons,) or rates.dtype != np.float64:
                raise ValueError(
                    f"layer {number}: rates are {rates.dtype} {rates.shape}, not float64 ({layer.n_neurons},)"
                )
            if not (rates.min(initial=0.0) >= 0 and rates.max(initial=0.0) <= 1):
                raise ValueError(f"layer {number}: rates lie in [{rates.min()}, {rates.max()}], not in [0, 1]")
        if self.context < 1 or not 0 <= self.positions <= self.context:
            raise ValueError(f"context {self.context} must be at least 1, filled {self.positions} from 0 to that")
        if self.budget < 0:
            raise ValueError(f"budget_bytes must be at least 0, not {self.budget}")
        if self.gpu_layers < -1:
            raise ValueError(f"gpu_layers must be at least -1 (all), not {self.gpu_layers}")

    @property
    def budget(self) -> int:
        return self.hardware.gpu_bytes if self.budget_bytes is None else self.budget_bytes

    @property
    def positions(self) -> int:
        return self.context if self.filled is None else self.filled

    @property
    def pinned(self) -> int:
        """How many of the last layers are wholly on the GPU, the head counting as one more."""
        n_layers = len(self.shape.layers)
        return n_layers + 1 if self.gpu_layers == -1 else min(self.gpu_layers, n_layers + 1)

    def memory(self, plan: Plan) -> Memory:
        return memory(self.shape, plan, self.context, self.reserves)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer's parts; `gpu_s` and `cpu_s` run beside each other.

    predictor_s: of a prediction that both devices wait for; one that each makes for its own is in gpu_s and cpu_s.
    """

    attention_s: float
    predictor_s: float
    gpu_s: float
    cpu_s: float
    sync_s: float

    @property
    def total_s(self) -> float:
        return self.attention_s + self.predictor_s + max(self.gpu_s, self.cpu_s) + self.sync_s


@dataclass(frozen=True)
class TokenTime:
    """Seconds of one token: its layers, the residual's crossings between devices, the head."""

    layers: tuple[LayerTime, ...]
    crossings_s: float
    head_s: float

    @property
    def total_s(self) -> float:
        return sum(layer.total_s for layer in self.layers) + self.crossings_s + self.head_s


def evaluate(problem: Problem, plan: Plan) -> TokenTime:
    """The time of a token under any plan of this shape; ValueError for one of another."""
    check_plan(problem.shape, plan)
    layers = tuple(
        layer_time(problem, layer, one, rates)
        for layer, one, rates in zip(problem.shape.layers, plan.layers, problem.rates, strict=True)
    )
    homes: list[Place] = ["cpu", *(one.attention for one in plan.layers), plan.head]
    crossings = sum(crossing_s(problem, end) for start, end in itertools.pairwise(homes) if start != end)
    if plan.head == "gpu":
        crossings += logits_s(problem)
    return TokenTime(layers, crossings, head_s(problem, plan.head))


def layer_time(problem: Problem, layer: LayerShape, plan: LayerPlan, rates: np.ndarray) -> LayerTime:
    """The seconds of one layer. rates: float64 [N]."""
    hot = plan.hot.numpy()
    named = float(rates[hot].sum())
    counts = {"gpu": (plan.n_hot, named), "cpu": (layer.n_neurons - plan.n_hot, float(rates[~hot].sum()))}
    together = 0.0 if plan.predictor == "split" else predictor_s(problem, layer, plan.predictor)
    seconds = {
        place: ffn_s(problem, layer, place, *counts[place], predicts=plan.predictor == "split",
                     compensates=(plan.n_hot > 0) == (place == "gpu"))
        for place in ("gpu", "cpu")
    }  # fmt: skip
    sync = problem.hardware.sync_s if plan.is_split else 0.0
    return LayerTime(attention_s(problem, layer, plan.attention), together, seconds["gpu"], seconds["cpu"], sync)


def speed(hardware: Hardware, place: Place) -> float:
    """Bytes/s that kernels read there."""
    return hardware.gpu_speed if place == "gpu" else hardware.cpu_speed


def attention_s(problem: Problem, layer: LayerShape, place: Place) -> float:
    """Attention with its keys and values."""
    here, hardware = layer.on(place), problem.hardware
    launches = ATTENTION_KERNELS * hardware.kernel_s if place == "gpu" else 0.0
    return (here.attention_bytes + here.kv_read_bytes(problem.positions)) / speed(hardware, place) + launches


def predictor_s(problem: Problem, layer: LayerShape, place: Place) -> float:
    """A prediction of all neurons on one device. A predictor that reads the gate counts the gate."""
    here = layer.on(place)
    return (here.shared_bytes + here.always_bytes * layer.n_neurons) / speed(problem.hardware, place)


def ffn_s(
    problem: Problem, layer: LayerShape, place: Place, neurons: int, named: float, *, predicts: bool, compensates: bool
) -> float:
    """One device's part of an FFN: so many neurons, of which `named` are computed; `predicts`: it names its own."""
    here = layer.on(place)
    count = here.active_bytes * named + (here.compensation_bytes if compensates else 0)
    if predicts and neurons:
        count += here.shared_bytes + here.always_bytes * neurons
    launches = FFN_KERNELS * problem.hardware.kernel_s if place == "gpu" and neurons else 0.0
    return count / speed(problem.hardware, place) + launches


def head_s(problem: Problem, place: Place) -> float:
    """The last norm and the head."""
    launches = HEAD_KERNELS * problem.hardware.kernel_s if place == "gpu" else 0.0
    return problem.shape.head(place) / speed(problem.hardware, place) + launches


def crossing_s(problem: Problem, to: Place) -> float:
    """The residual's way to the other device: half a hand-over there and back, and its bytes."""
    return _copy_s(problem, FLOAT_BYTES * problem.shape.d_model, to)


def logits_s(problem: Problem) -> float:
    """The logits' way from the GPU to the sampler."""
    return _copy_s(problem, FLOAT_BYTES * problem.shape.vocab_size, "cpu")


def _copy_s(problem: Problem, count: int, to: Place) -> float:
    hardware = problem.hardware
    return hardware.sync_s / 2 + count / (hardware.to_gpu_bandwidth if to == "gpu" else hardware.to_cpu_bandwidth)


def hot_prefix(rates: np.ndarray, count: int) -> torch.Tensor:
    """bool [N]: the `count` neurons of the highest rates float64 [N], among equals the lower number first."""
    if count == 0:
        return torch.zeros(len(rates), dtype=torch.bool)
    last = np.partition(rates, len(rates) - count)[len(rates) - count]
    hot = rates > last
    hot[np.flatnonzero(rates == last)[: count - int(hot.sum())]] = True
    return torch.from_numpy(hot)
