"""What a run tells of its placement, layer by layer, and what another placement can be solved from.

Counts of named neurons are kept by every sparse part anyway. Of every SAMPLE_EVERY decode steps two are run unrecorded:
one with all gates computed, which gives recall and which neurons fired, and the next with a clock beside the parts of
split layers. Nothing else is slowed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from pinfer.engine.load import Engine
from pinfer.ffn import HybridFFN, SparseFFN
from pinfer.kernels.activation import ZERO_BELOW_ZERO, activate, hidden_of
from pinfer.kernels.norms import row_norms
from pinfer.kernels.ops import quant_matmul
from pinfer.models.layers import CPU
from pinfer.overlap import Cold, Lane, Traffic
from pinfer.placement.accumulate import FIRING_MASS, holding
from pinfer.placement.statistics import QUANTILES, LayerStatistics, to_tensors
from pinfer.predictors import Prediction

SAMPLE_EVERY = 64  # decode steps; a sampled one reads every gate, and every up product where masses are gathered
WATCHED, CLOCKED = 1, 2  # of them
FLOAT_BYTES = INDEX_BYTES = 4


@dataclass(frozen=True)
class LayerRun:
    """One layer over a run.

    hot: its share of neurons on the GPU. hot_hits: the share of named neurons that are hot, None where none was named.
    recall: the share of firing neurons that were named, over `samples` tokens; None without any. gpu_busy, cpu_busy:
    the share of the time of the layer's FFN that either part computes, of several cold shards the mean, None where that
    is not known. transfer_bytes: what one token takes over to the other device and back for this FFN, on average.
    """

    layer: int
    attention: str
    hot: float
    hot_hits: float | None
    density: float
    recall: float | None
    gpu_busy: float | None
    cpu_busy: float | None
    transfer_bytes: int
    samples: int


class _Timed(Lane):
    """A lane, or one part after the other, with the seconds that its parts take."""

    def __init__(self, inner: Lane | None) -> None:
        self._inner, self.gpu_s, self.cpu_s, self.wall_s = inner, 0.0, 0.0, 0.0

    def run(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold], traffic: Traffic) -> list[torch.Tensor]:
        def on_gpu(seconds: float) -> None:
            self.gpu_s += seconds

        def on_cpu(seconds: float) -> None:
            self.cpu_s += seconds

        began, timed = time.perf_counter(), _timed(hot, on_gpu)
        parts = [replace(part, work=_timed(part.work, on_cpu)) for part in cold]
        if self._inner is None:
            results = [timed(), *(part.compute() for part in parts)]
        else:
            results = self._inner.run(timed, parts, traffic)
        self.wall_s += time.perf_counter() - began
        return results

    def close(self) -> None:
        """The lane that is timed goes on."""


def _timed(work: Callable[..., torch.Tensor], add: Callable[[float], None]) -> Callable[..., torch.Tensor]:
    def run(*given: Any) -> torch.Tensor:
        began = time.perf_counter()
        try:
            return work(*given)
        finally:
            add(time.perf_counter() - began)

    return run


class _Layer:
    """One layer's shards, the numbers of their neurons, and what has been sampled."""

    def __init__(self, ffn: torch.nn.Module, hot: torch.Tensor, masses: bool) -> None:
        self.shards = [module for module in ffn.modules() if isinstance(module, SparseFFN)]
        self.hybrid = next((module for module in ffn.modules() if isinstance(module, HybridFFN)), None)
        self.is_hot, self.masses = hot, masses
        self._crosses = getattr(ffn, "crosses", False)
        self._waited_for = all(one.weights.gate.device == CPU for one in self.shards)  # kernels on a GPU are launched
        cold, count = (~hot).nonzero().flatten(), len(self.shards) - 1
        # As HybridFFN.of numbers them: hot ones first, then cold ones, dealt by turns to as many shards as there are.
        dealt = [cold[turn::count] for turn in range(count)]
        self.ids = [hot.nonzero().flatten(), *dealt] if count else [torch.arange(hot.numel())]
        self.timed = _Timed(None if self.hybrid is None else self.hybrid.lane)
        n = hot.numel()
        self.samples = self.n_fired = self.n_caught = self._tokens = 0
        self._actives = [0.0] * len(self.shards)
        self.fired, self.named = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
        self.mass = torch.zeros(2, n, dtype=torch.float64)  # of samples by turns
        self._norms: dict[int, torch.Tensor] = {}
        self._now: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def count(self) -> None:
        """Add what the shards have counted since they were last reset."""
        self._actives = [
            sum(pair) for pair in zip(self._actives, (one.activity.active for one in self.shards), strict=True)
        ]
        self._tokens += self.shards[0].activity.tokens

    @contextmanager
    def watched(self) -> Iterator[None]:
        for number, shard in enumerate(self.shards):
            shard.observe = lambda x, prediction, number=number: self._see(number, x, prediction)
        try:
            yield
        finally:
            for shard in self.shards:
                shard.observe = None
        self._fold()

    @contextmanager
    def clocked(self) -> Iterator[None]:
        if self.hybrid is None:
            yield
            return
        lane, self.hybrid.lane = self.hybrid.lane, self.timed
        try:
            yield
        finally:
            self.hybrid.lane = lane

    def _see(self, number: int, x: torch.Tensor, prediction: Prediction) -> None:
        """One token's neurons in one shard."""
        shard = self.shards[number]
        weights, of_gate = shard.weights, prediction.gate_values
        gate = quant_matmul(x, weights.gate, weights.gate_bias) if of_gate is None else of_gate
        fired = activate(shard.activation, gate, shard.cutoff) != 0
        weight = torch.zeros_like(gate)
        if self.masses or shard.activation not in ZERO_BELOW_ZERO:
            if number not in self._norms:
                self._norms[number] = row_norms(shard.weights.down)
            up = None if shard.weights.up is None else quant_matmul(x, shard.weights.up)
            weight = hidden_of(shard.activation, gate, up, prediction.shift, shard.cutoff).abs() * self._norms[number]
        named = prediction.active.indices[: int(prediction.active.count)].long()
        self._now.append((number, named.cpu(), fired[0].cpu(), weight[0].cpu()))

    def _fold(self) -> None:
        """Add the token that the shards have seen."""
        named, fired = torch.zeros_like(self.is_hot), torch.zeros_like(self.is_hot)
        weight = torch.zeros(self.is_hot.numel())
        for number, chosen, of_shard, weights in self._now:
            named[self.ids[number][chosen]] = True
            fired[self.ids[number]], weight[self.ids[number]] = of_shard, weights
        self._now.clear()
        if self.shards[0].activation not in ZERO_BELOW_ZERO:
            fired = holding(weight[None], FIRING_MASS)[0]
        self.n_fired += int(fired.sum())
        self.n_caught += int((fired & named).sum())
        self.fired += fired
        self.named += named
        self.mass[self.samples % 2] += weight
        self.samples += 1

    def run(self, number: int, attention: str, width: int) -> LayerRun:
        actives, tokens, n = self._actives, self._tokens, self.is_hot.numel()
        hot = sum(a for a, ids in zip(actives, self.ids, strict=True) if self.is_hot[ids[:1]].any())
        wall, n_cold = self.timed.wall_s, len(self.shards) - 1
        named = (sum(actives) - hot) / tokens if tokens else 0.0
        return LayerRun(
            layer=number,
            attention=attention,
            hot=float(self.is_hot.float().mean()),
            hot_hits=hot / sum(actives) if sum(actives) else None,
            density=sum(actives) / (tokens * n) if tokens else 1.0,
            recall=self.n_caught / self.n_fired if self.n_fired else None,
            gpu_busy=self.timed.gpu_s / wall if wall and self._waited_for else None,
            cpu_busy=self.timed.cpu_s / (n_cold * wall) if wall else None,
            transfer_bytes=round(FLOAT_BYTES * width * self._vectors + INDEX_BYTES * self._lists(named)),
            samples=self.samples,
        )

    @property
    def _vectors(self) -> int:
        """Float32 [D] that go from one device to the other: x, the residual where it is read there, and the sum back."""
        count = 3 if self._crosses else 0
        if self.hybrid is not None:
            count += len(self.hybrid.cold) * (3 if self.hybrid.predictor is None else 2)
        return count

    def _lists(self, named: float) -> float:
        """Numbers in the lists of named neurons that go to cold shards, with their lengths."""
        lists = self.hybrid is not None and self.hybrid.predictor is not None
        return named + len(self.shards) - 1 if lists else 0.0

    def statistics(self) -> LayerStatistics:
        """As far as placement reads them, `fired` counting named neurons: what a plan pays for. Other fields are 0, or
        1 for `up_mean`."""
        n, quantiles = self.is_hot.numel(), torch.zeros(QUANTILES)
        return LayerStatistics(
            tokens=torch.tensor([self.samples]),
            fired=self.named,
            mass=self.mass.sum(0),
            first_half_mass=self.mass[0].clone(),
            up_mean=torch.ones(2, n),
            center=torch.zeros(n),
            input_quantiles=quantiles,
            hidden_quantiles=quantiles.clone(),
        )


class RunStatistics:
    """Gathers over one or more generations of an engine. masses: whether contributions are wanted, for `tensors`."""

    def __init__(self, engine: Engine, *, masses: bool = False) -> None:
        """ValueError for a model that is dense, skips inputs instead of neurons, or has experts."""
        engine.config.without_experts("statistics of a run")
        plan = None if engine.placement is None else engine.placement.plan
        self._width, n = engine.config.d_model, engine.config.d_ffn
        self._attention = ["cpu"] * engine.config.n_layers if plan is None else [one.attention for one in plan.layers]
        self._layers = []
        for number, ffn in enumerate(engine.model.ffns()):
            shards = [module for module in ffn.modules() if isinstance(module, SparseFFN)]
            if not shards:
                raise ValueError(f"statistics are of named neurons, and the {engine.method} method names none")
            hot = torch.zeros(n, dtype=torch.bool)
            if plan is not None:
                hot = plan.layers[number].hot
            elif len(shards) > 1:  # a cold fraction: the last ones by number
                hot = torch.arange(n) < shards[0].weights.n_neurons
            self._layers.append(_Layer(ffn, hot, masses))

    def wanted(self, step: int) -> bool:
        """Whether the decode step of that number, from 0, is to be sampled."""
        return step % SAMPLE_EVERY in (WATCHED, CLOCKED)

    @contextmanager
    def sampling(self, step: int) -> Iterator[None]:
        """Samples the one token, of a wanted step, that the model runs in the block, unrecorded."""
        clocked = step % SAMPLE_EVERY == CLOCKED
        with ExitStack() as sampled:
            for layer in self._layers:
                sampled.enter_context(layer.clocked() if clocked else layer.watched())
            yield

    def count(self) -> None:
        """Add the decode steps that a generation has made: it resets the counts where they begin."""
        for layer in self._layers:
            layer.count()

    def layers(self) -> list[LayerRun]:
        """Every layer, over all decode steps that were counted."""
        pairs = zip(self._layers, self._attention, strict=True)
        return [layer.run(number, place, self._width) for number, (layer, place) in enumerate(pairs)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """`placement.statistics` of the sampled tokens, with named neurons as those that fired, and beside them
        "blk.3.truly_fired" int64 [N], on how many tokens each neuron did.

        ValueError where no token was sampled.
        """
        if not self._layers[0].samples:
            raise ValueError("no statistics: the second decode step is the first to be sampled, and there was none")
        truly = {f"blk.{number}.truly_fired": layer.fired for number, layer in enumerate(self._layers)}
        return to_tensors(tuple(layer.statistics() for layer in self._layers)) | truly
