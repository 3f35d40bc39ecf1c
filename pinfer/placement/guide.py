"""The tables of PowerInfer's guide (Clore.ai's "PowerInfer", the text that many users start from) beside what the
simulator finds, and the number that proves it where a figure of the guide is impossible.

A card's GB are 2^30 bytes here, to the guide's advantage. Its "34B" of 60 layers is Yi-34B.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from pinfer.placement.hardware import Hardware
from pinfer.placement.memory import memory
from pinfer.placement.named import CARDS, DERATED, Card, Reach, named_hardware
from pinfer.placement.plan import Plan
from pinfer.placement.problem import Problem, evaluate
from pinfer.placement.published import predictor_shape, published_shape
from pinfer.placement.shape import ModelShape
from pinfer.placement.skew import published_rates
from pinfer.placement.solver import solve

GIB, GB = 2**30, 1e9
TYPE, CONTEXT, RANK = "q4_k_m", 4096, 256
SKEW, DENSITY = "relu-llama-70b", 0.1
MODELS = {"7B": "llama-2-7b", "13B": "llama-2-13b", "34B": "yi-34b", "70B": "llama-2-70b"}
# Least VRAM in GB, by model.
LEAST_VRAM = {"7B": 4, "13B": 6, "34B": 12, "70B": 16}
# GB a layer, and layers said to fit a card of 24 GB.
RULE_OF_THUMB = {"7B": (0.13, 184), "13B": (0.18, 133), "70B": (0.23, 104)}
# Layers on a card of so many GB, as 7B, 13B, 34B, 70B; None is "all".
LAYERS: dict[int, tuple[int | None, ...]] = {
    8: (None, 20, 10, 4),
    16: (None, None, 25, 10),
    24: (None, None, None, 20),
    48: (None, None, None, None),
}
# Tokens/s of 70B on an RTX 3090 with 20 of 80 layers, without a GPU, and with PowerInfer.
DENSE_20, CPU_ONLY, POWERINFER = 4.0, 1.0, 12.0
GPU_LAYERS = 20
# Tokens/s of 70B in Q4, from and to; FULL_PRECISION is said to run it unquantised.
THROUGHPUT = {"3090": (8, 12), "4090": (12, 18), "a10040": (35, 45), "a10080": (50, 60)}
FULL_PRECISION = "a10080"

Verdict = Literal["agrees", "possible", "too little", "too many", "room left", "slower", "faster", "impossible"]


@dataclass(frozen=True)
class Row:
    """One figure. ours: a number in `unit`. verdict: on the guide's figure; impossible where no engine could reach it.
    why: the numbers that it rests on."""

    table: str
    item: str
    guide: str
    ours: float
    unit: str
    verdict: Verdict
    why: str = ""


def rows(cpu_bandwidth: float = 80 * GB, reach: Reach = DERATED) -> Iterator[Row]:
    """All tables. cpu_bandwidth: bytes/s of the machine's memory, which the guide leaves open."""
    yield from vram()
    yield from thumb()
    yield from layers()
    yield from throughput(reach)
    yield from cards(cpu_bandwidth, reach)


def vram() -> Iterator[Row]:
    """The least VRAM that holds what every token needs: attention, keys and values, head; all neurons may be cold."""
    for size, guide in LEAST_VRAM.items():
        shape = _sparse(size)
        plan = Plan.uniform(len(shape.layers), _width(shape), 1.0)
        ours = memory(shape, plan, CONTEXT).gpu_bytes / GB
        whole = memory(_dense(size), _last(_dense(size), len(shape.layers)), CONTEXT).gpu_bytes / GB
        verdict: Verdict = "agrees" if ours <= guide * GIB / GB else "too little"
        why = f"all neurons on the CPU, {CONTEXT} positions; the whole model takes {whole:.1f} GB"
        yield Row("least VRAM", size, f"{guide} GB", ours, "GB", verdict, why)


def thumb() -> Iterator[Row]:
    """The guide's bytes a layer, and the layers it derives from them for 24 GB."""
    for size, (guide, count) in RULE_OF_THUMB.items():
        weights, n_layers = _layers_bytes(_dense(size)), len(_dense(size).layers)
        why = f"the model has {n_layers} layers"
        if guide * GB * n_layers < 0.8 * weights:
            why += (
                f", and {_bits(size, weights):.1f} bits a weight in {TYPE}; {guide:g} GB a layer are "
                f"{_bits(size, guide * GB * n_layers):.1f}: {int(24 * GIB * n_layers / weights)} of them fill 24 GB"
            )
        said = f"{guide:g} GB: {count} layers on 24 GB"
        yield Row("a layer's bytes", size, said, weights / n_layers / GB, "GB", "impossible", why)


def layers() -> Iterator[Row]:
    """Whole layers that fit a card, with keys and values for the context."""
    for card_gb, counts in LAYERS.items():
        for size, guide in zip(MODELS, counts, strict=True):
            shape = _dense(size)
            n_layers, ours = len(shape.layers), fitting_layers(shape, card_gb * GIB)
            wanted = n_layers if guide is None else guide
            found = memory(shape, _last(shape, wanted), CONTEXT)
            why = f"{wanted} layers take {found.gpu_bytes / GB:.1f} GB of {card_gb * GIB / GB:.1f}"
            verdict: Verdict = "room left" if wanted < 0.75 * ours else "agrees"
            if wanted > ours:
                why += f", {found.gpu['kv'] / GB:.1f} of them keys and values of {CONTEXT} positions"
                verdict = "impossible" if wanted / n_layers * _layers_bytes(shape) > card_gb * GIB else "too many"
            said = f"all ({n_layers})" if guide is None else f"{guide} layers"
            yield Row("layers by VRAM", f"{size} on {card_gb} GB", said, ours, f"of {n_layers} layers", verdict, why)


def throughput(reach: Reach) -> Iterator[Row]:
    """The 70B model on an RTX 3090: two of the guide's figures exclude each other, whatever the machine's memory is."""
    table, shape = "70B on an RTX 3090", _dense("70B")
    weights = shape.head_bytes + _layers_bytes(shape)
    left = shape.head_bytes + _layers_bytes(shape) * (len(shape.layers) - GPU_LAYERS) / len(shape.layers)
    implied = CPU_ONLY * weights
    yield Row(table, "llama.cpp, CPU alone", f"{CPU_ONLY:g} tokens/s", implied / GB, "GB/s", "possible",
              f"{weights / GB:.1f} GB a token: what memory delivers")  # fmt: skip
    yield Row(table, f"llama.cpp, {GPU_LAYERS} of 80 layers", f"{DENSE_20:g} tokens/s", implied / left, "tokens/s", "impossible",
              f"at most; the CPU reads {left / GB:.1f} GB a token, and {DENSE_20:g} times a second are "
              f"{DENSE_20 * left / GB:.0f} GB/s, where the CPU alone shows {implied / GB:.0f}")  # fmt: skip
    problem = _problem(named_hardware(CARDS["3090"], implied, dataclasses.replace(reach, cpu_efficiency=1.0)), reach)
    ours, pinned = (solve(one).tokens_per_s for one in (problem, dataclasses.replace(problem, gpu_layers=GPU_LAYERS)))
    yield Row(table, "PowerInfer", f"{POWERINFER:g} tokens/s", ours, "tokens/s", _verdict(ours, POWERINFER, POWERINFER),
              f"at {implied / GB:.0f} GB/s, skew {SKEW}, density {100 * DENSITY:g} %; "
              f"{pinned:.1f} with {GPU_LAYERS} layers wholly on the GPU")  # fmt: skip


def cards(cpu_bandwidth: float, reach: Reach) -> Iterator[Row]:
    """The recommended cards with the 70B model."""
    table = f"70B by card, memory of {cpu_bandwidth / GB:g} GB/s"
    for key, (low, high) in THROUGHPUT.items():
        card, said = CARDS[key], f"{low}-{high} tokens/s"
        if key == FULL_PRECISION:
            yield _full_precision(table, card, said, high)
            continue
        problem, dense = _problem(named_hardware(card, cpu_bandwidth, reach), reach), _dense("70B")
        ones = [np.ones(layer.n_neurons) for layer in dense.layers]
        plan = _last(dense, fitting_layers(dense, card.memory_bytes))
        split = evaluate(dataclasses.replace(problem, shape=dense, rates=ones), plan).total_s
        ours = solve(problem).tokens_per_s
        roof = card.bandwidth / (dense.head_bytes + _layers_bytes(dense))
        why = f"dense layer split {1 / split:.1f} tokens/s; a dense model wholly in such memory, {roof:.1f} at most"
        yield Row(table, card.name, said, ours, "tokens/s", _verdict(ours, low, high), why)


def _full_precision(table: str, card: Card, said: str, high: float) -> Row:
    shape = published_shape(MODELS["70B"], "f16", down="file", rearranged=False)
    weights = shape.head_bytes + _layers_bytes(shape)
    roof = card.bandwidth / weights
    why = (
        f"{weights / GB:.0f} GB in 16 bits, the card has {card.memory_bytes / GB:.0f}; if it held them, "
        f"its {card.bandwidth / GB:.0f} GB/s would read them {roof:.1f} times a second at most"
    )
    return Row(table, f"{card.name}, full precision", said, roof, "tokens/s", "impossible", why)


def fitting_layers(shape: ModelShape, budget: int) -> int:
    """The most whole layers, from the last, that fit with the context."""
    counts = range(1, len(shape.layers) + 1)
    return bisect_right(counts, budget, key=lambda count: memory(shape, _last(shape, count), CONTEXT).gpu_bytes)


def _last(shape: ModelShape, count: int) -> Plan:
    n_layers = len(shape.layers)
    return Plan.whole_layers(n_layers, _width(shape), n_layers + 1 if count == n_layers else count)


def _verdict(ours: float, low: float, high: float) -> Verdict:
    """Of a range that the guide gives; a fifth either way still agrees."""
    return "slower" if high < 0.8 * ours else "faster" if low > 1.25 * ours else "agrees"


def _problem(hardware: Hardware, reach: Reach) -> Problem:
    shape = _sparse("70B")
    density = min(1.0, DENSITY * reach.over_prediction)
    rates = published_rates(SKEW, density, len(shape.layers), _width(shape))
    return Problem(shape, rates, hardware, CONTEXT, filled=0)


@cache
def _dense(size: str) -> ModelShape:
    return published_shape(MODELS[size], TYPE, down="file")


@cache
def _sparse(size: str) -> ModelShape:
    return published_shape(MODELS[size], TYPE, predictor_shape("low_rank", MODELS[size], rank=RANK))


def _width(shape: ModelShape) -> int:
    return shape.layers[0].n_neurons


def _layers_bytes(shape: ModelShape) -> int:
    return sum(one.attention_bytes + one.n_neurons * one.neuron_bytes for one in shape.layers)


def _bits(size: str, n_bytes: float) -> float:
    """Bits a weight that so many bytes of all layers are."""
    return 16 * n_bytes / _layers_bytes(published_shape(MODELS[size], "f16", down="file", rearranged=False))
