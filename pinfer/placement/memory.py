"""The memory of a placement, item by item, in bytes: what a budget must cover before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pinfer.placement.plan import Place, Plan, PredictorPlace
from pinfer.placement.shape import FLOAT_BYTES, LayerShape, ModelShape

# A buffer [T, N] of gate products, one of up products, one of h; x, its norm, the residual, queries and the sum [T, D].
NEURON_BUFFERS, WIDTH_BUFFERS = 3, 6
LEAST_ROPE_POSITIONS = 2048  # tables have 1024 positions, or 2048 and more: they grow at least twofold
MASK_BYTES, INDEX_BYTES = 1, 4  # of a (token, neuron) pair, of a neuron named
STREAMED_NEURONS = 2048  # cold ones that a prompt brings to the GPU at a time
STREAMED_PIECES, PINNED_PIECES = 3, 2  # two of them are there and one is rearranged for kernels; two are on their way


@dataclass(frozen=True)
class Reserves:
    """What a process takes on a GPU beside weights and caches.

    context_bytes: the CUDA context with the modules of torch and its libraries: 300 to 550 MB by card and driver.
    graph_bytes:   the recorded decode step and its private pool.
    margin:        share of everything else that the allocator's rounding (512 bytes, 2 MiB for large blocks) and
                   fragmentation may take.
    tokens:        the longest chunk of a prompt, for which activations are held.
    streamed:      cold neurons of a layer that a prompt brings to the GPU at a time; 0: it never does.
    """

    context_bytes: int = 550_000_000
    graph_bytes: int = 64 << 20
    margin: float = 0.02
    tokens: int = 512
    streamed: int = STREAMED_NEURONS

    def __post_init__(self) -> None:
        """ValueError for what is negative or, of the margin, not below 1."""
        for name, least in (("context_bytes", 0), ("graph_bytes", 0), ("tokens", 1), ("streamed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.margin < 1:
            raise ValueError(f"margin must lie in [0, 1), not {self.margin}")


@dataclass(frozen=True)
class Memory:
    """Bytes by item on either device; `gpu_bytes` is what a budget is compared with."""

    gpu: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    cpu: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def gpu_bytes(self) -> int:
        return sum(self.gpu.values())

    @property
    def cpu_bytes(self) -> int:
        return sum(self.cpu.values())


def memory(shape: ModelShape, plan: Plan, context: int, reserves: Reserves | None = None) -> Memory:
    """Every byte of a plan at so many positions of context. ValueError where the plan is of another shape.

    Nothing is counted on a GPU that has nothing to do.
    """
    reserves = reserves or Reserves()
    check_plan(shape, plan)
    gpu: dict[str, int] = dict.fromkeys(("attention", "kv", "predictor", "neurons", "compensation", "head"), 0)
    cpu = dict(gpu)
    sides: tuple[tuple[dict[str, int], Place], ...] = ((gpu, "gpu"), (cpu, "cpu"))
    for layer, one in zip(shape.layers, plan.layers, strict=True):
        for items, place in sides:
            for name, count in placed_items(layer, one.attention, one.predictor, one.n_hot, place, context).items():
                items[name] += count
    (gpu if plan.head == "gpu" else cpu)["head"] += shape.head(plan.head)
    cpu["embedding"] = shape.embedding_bytes
    cpu["activations"] = workspace_bytes(shape, reserves.tokens)
    if not any(gpu.values()):
        return Memory(MappingProxyType({}), MappingProxyType(cpu))
    cpu["pinned"] = pinned_bytes(shape, reserves)
    gpu |= fixed_items(shape, context, reserves)
    gpu["margin"] = math.ceil(reserves.margin * sum(gpu.values()))
    return Memory(MappingProxyType(gpu), MappingProxyType(cpu))


def placed_items(
    layer: LayerShape, home: Place, predictor: PredictorPlace, n_hot: int, place: Place, context: int
) -> dict[str, int]:
    """A layer's bytes on the device `place`, by item; home: where its attention is."""
    here = layer.on(place)
    n_here = n_hot if place == "gpu" else layer.n_neurons - n_hot
    predicts_for = n_here if predictor == "split" else layer.n_neurons if predictor == place else 0
    own = here.always_bytes if layer.own_predictor else 0
    at_home = home == place
    return {
        "attention": here.attention_bytes if at_home else 0,
        "kv": here.kv_bytes(context) if at_home else 0,
        "predictor": (here.shared_bytes if predicts_for else 0) + own * predicts_for,
        "neurons": (here.neuron_bytes - own) * n_here,
        "compensation": here.compensation_bytes if (n_hot > 0) == (place == "gpu") else 0,
    }


def fixed_items(shape: ModelShape, context: int, reserves: Reserves) -> dict[str, int]:
    """What a GPU in use takes whatever the plan, by item."""
    return {
        "rope": shape.rope_position_bytes * max(context, LEAST_ROPE_POSITIONS),
        "logits": FLOAT_BYTES * shape.vocab_size,
        "activations": workspace_bytes(shape, reserves.tokens),
        "streamed": STREAMED_PIECES * piece_bytes(shape, reserves.streamed),
        "context": reserves.context_bytes,
        "graph": reserves.graph_bytes,
    }


def capacity(shape: ModelShape, budget_bytes: int, context: int, reserves: Reserves) -> int:
    """The most bytes of weights and caches that a budget has room for, beside what is fixed and the margin; may be
    negative. With c of them, c + fixed + ceil(margin · (c + fixed)) is at most the budget."""
    fixed = sum(fixed_items(shape, context, reserves).values())
    most = math.floor(budget_bytes / (1 + reserves.margin))
    while most + math.ceil(reserves.margin * most) > budget_bytes:
        most -= 1
    while most + 1 + math.ceil(reserves.margin * (most + 1)) <= budget_bytes:
        most += 1
    return most - fixed


def workspace_bytes(shape: ModelShape, tokens: int) -> int:
    """Activations of a chunk of tokens in the widest layer, float32, with the union list and the mask of its neurons."""
    widest = max((layer.n_neurons for layer in shape.layers), default=0)
    floats = NEURON_BUFFERS * widest + WIDTH_BUFFERS * shape.d_model
    return tokens * (FLOAT_BYTES * floats + MASK_BYTES * widest) + INDEX_BYTES * widest


def piece_bytes(shape: ModelShape, neurons: int) -> int:
    """The largest piece of so many neurons of a layer, as it lies on the GPU."""
    sizes = (min(neurons, layer.n_neurons) * layer.on("gpu").neuron_bytes for layer in shape.layers)
    return max(sizes, default=0)


def pinned_bytes(shape: ModelShape, reserves: Reserves) -> int:
    """Buffers that both devices see: x and the partial sum of a chunk, the list of cold neurons, logits, pieces of
    cold neurons on their way."""
    widest = max((layer.n_neurons for layer in shape.layers), default=0)
    floats = 2 * reserves.tokens * shape.d_model + shape.vocab_size
    return FLOAT_BYTES * floats + INDEX_BYTES * widest + PINNED_PIECES * piece_bytes(shape, reserves.streamed)


def check_plan(shape: ModelShape, plan: Plan) -> None:
    """ValueError where a plan has other layers or neurons, or predicts for neurons whose gate is on the other device."""
    if len(plan.layers) != len(shape.layers):
        raise ValueError(f"a plan of {len(plan.layers)} layers for a model of {len(shape.layers)}")
    for number, (layer, one) in enumerate(zip(shape.layers, plan.layers, strict=True)):
        if one.hot.numel() != layer.n_neurons:
            raise ValueError(f"layer {number}: a plan of {one.hot.numel()} neurons, the model has {layer.n_neurons}")
        elsewhere = {"gpu": layer.n_neurons - one.n_hot, "cpu": one.n_hot, "split": 0}[one.predictor]
        if elsewhere and not layer.own_predictor:
            raise ValueError(
                f"layer {number}: {elsewhere} neurons are predicted on the {one.predictor.upper()}, their gates are not there"
            )
