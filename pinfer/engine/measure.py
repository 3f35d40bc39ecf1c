"""One layer of a profile: its FFN measured while the sequences pass, and what that takes."""

from __future__ import annotations

import mmap
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from pinfer.engine.generate import peak_rss_bytes
from pinfer.engine.load import Engine
from pinfer.ffn import DenseFFN
from pinfer.formats.pages import release_tensor
from pinfer.kernels.norms import column_norms
from pinfer.kernels.ops import quant_matmul
from pinfer.models import LayerWalk
from pinfer.placement.accumulate import Accumulator
from pinfer.placement.statistics import LayerStatistics, to_tensors

DISK_BYTES_PER_S = 200e6  # a modest disk's, each write waited for
# Whole runs of Gemma-3-270M, four layers of a 7B and the shipped model peak at 0.94 to 1.29 times what one
# layer does: holes in the heap come and go.
HEAP_GROWTH = 1.2


class Observer(Protocol):
    """Is shown what a layer's FFN computes, a sequence at a time."""

    def add(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """T tokens: x float32 [T, D], gate and up products and h float32 [T, N] (up None: not gated)."""


class MeasuredFFN(nn.Module):
    """A DenseFFN whose products are observed on their way; it computes what that one does."""

    def __init__(self, dense: DenseFFN, observer: Observer) -> None:
        super().__init__()
        self.dense, self.observer = dense, observer

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        """x, residual: float32 [T, D], a whole sequence; returns float32 [T, D]."""
        gate, up = self.dense.products(x)
        hidden = self.dense.hidden(gate, up)
        # A sequence's first token is left out: its activations are outliers.
        self.observer.add(x[1:], gate[1:], None if up is None else up[1:], hidden[1:])
        return quant_matmul(hidden, self.dense.down, self.dense.down_bias)


def measure_layer(engine: Engine, walk: LayerWalk, passed: Callable[[], None] = lambda: None) -> LayerStatistics:
    """Take the sequences through the walk's next layer and return what its neurons did; `passed` is called after each.

    The pages of the layer's weights are let go. ValueError for a layer that is not dense, and where
    activations are not finite.
    """
    number, dense = walk.layer, dense_ffn(engine, walk.layer)
    counted = sum(len(residual) - 1 for residual in walk.residuals)
    accumulator = Accumulator(column_norms(dense.down), dense.activation, counted, dense.cutoff)
    observe_layer(engine, walk, accumulator, passed)
    try:
        return accumulator.finish()
    except ValueError as problem:
        raise ValueError(f"{engine.path}: layer {number}: {problem}") from problem


def dense_ffn(engine: Engine, layer: int) -> DenseFFN:
    """The FFN of a layer; ValueError unless it is dense, and the layer's only one."""
    engine.config.without_experts("a profile or training")
    ffn = engine.model.blocks[layer].ffn
    if not isinstance(ffn, DenseFFN):
        raise ValueError(f"layer {layer} is not dense: a profile and training need every neuron computed")
    return ffn


@contextmanager
def observed(engine: Engine, layer: int, observer: Observer) -> Iterator[None]:
    """Show the observer what a layer's FFN computes, each sequence's first token left out. ValueError unless it is dense."""
    block, dense = engine.model.blocks[layer], dense_ffn(engine, layer)
    block.ffn = MeasuredFFN(dense, observer)
    try:
        yield
    finally:
        block.ffn = dense


def observe_layer(
    engine: Engine, walk: LayerWalk, observer: Observer, passed: Callable[[], None] = lambda: None
) -> None:
    """Take the sequences through the walk's next layer, observed; `passed` is called after each.

    The pages of the layer's weights are let go. ValueError for a layer that is not dense.
    """
    with observed(engine, walk.layer, observer):
        for sequence in range(len(walk.residuals)):
            walk.step(sequence)
            passed()
    walk.layer += 1
    release_layer(engine, walk.layer - 1)


@dataclass(frozen=True)
class Estimate:
    """What a whole profile will take, from one layer measured: time without the model's loading, and peak memory.

    `disk_bytes` is what the directory takes before the checkpoint is removed.
    """

    tokens: int
    layers: int
    layer_s: float
    total_s: float
    peak_rss_bytes: int
    disk_bytes: int


def estimate_profile(engine: Engine, sequences: Sequence[torch.Tensor]) -> Estimate:
    """Take sequences int64 [T] through one layer and say what all layers will take; nothing is written."""
    n_layers = engine.config.n_layers
    with engine.computing():
        walk = LayerWalk(engine.model, sequences)
        walk.step(0)  # the first use of every kernel, which no later layer pays
        release_layer(engine, 0)
        walk.layer = min(1, n_layers - 1)  # its weights are not in memory yet, as those of later layers
        number, started = walk.layer, time.perf_counter()
        found = measure_layer(engine, walk)
        layer_s = time.perf_counter() - started
    sizes = [layer_bytes(engine, layer) for layer in range(n_layers)]
    layer_s *= statistics.fmean(sizes) / sizes[number]
    residuals = sum(residual.nbytes for residual in walk.residuals)
    own = sum(tensor.nbytes for tensor in to_tensors((found,)).values())
    # The peak lies within a layer, or where a checkpoint serialises the residuals beside themselves once
    # its values are gone. Every layer's statistics stay.
    peak = max(peak_rss_bytes(), rss_bytes() + 2 * residuals) + max(sizes) - sizes[number] + n_layers * own
    return Estimate(
        tokens=sum(len(one) for one in sequences),
        layers=n_layers,
        layer_s=layer_s,
        total_s=n_layers * (layer_s + (residuals + own) / DISK_BYTES_PER_S),
        peak_rss_bytes=round(HEAP_GROWTH * peak),
        disk_bytes=2 * residuals + 2 * n_layers * own,
    )


def release_layer(engine: Engine, layer: int) -> None:
    """Let go of the pages of a layer's matrices."""
    for name, info in engine.file.tensors.items():
        if name.startswith(f"blk.{layer}.") and len(info.shape) == 2:
            release_tensor(engine.file, name)


def layer_bytes(engine: Engine, layer: int) -> int:
    return sum(info.nbytes for name, info in engine.file.tensors.items() if name.startswith(f"blk.{layer}."))


def rss_bytes() -> int:
    """Memory held now, where the system says so; else 0."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0
