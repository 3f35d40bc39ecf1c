"""The FFN blocks of a model, interchangeable: `ffn(x, residual, opens=False) -> y`.

y = Σ_i act(g_i · x + b_i)(u_i · x) d_i + d over the neurons i, u_i · x clamped at 0 under dReLU; the biases b and d
are those of OPT, whose up matrix is the gate g, and the activation may have a cutoff (FATReLU). DenseFFN
computes all of them, SparseFFN the ones its predictor names, HybridFFN adds a hot and a cold shard:
any split of the neurons, over skips or over devices, is exact for the neurons it keeps. InputSparseFFN
(`input_sparse_ffn`) skips inputs and hidden values instead. `opens` says that x's first row is the first token of its sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from pinfer.kernels.activation import check_activation
from pinfer.kernels.ops import add, glu, quant_matmul, sparse_ffn, tally
from pinfer.kernels.select_active import Active
from pinfer.kernels.tuning import expect_density
from pinfer.overlap import Cold, Lane, Traffic
from pinfer.placement.memory import STREAMED_NEURONS
from pinfer.predictors import Prediction, Predictor, split_prediction
from pinfer.quant import QuantTensor


@dataclass(frozen=True)
class FFNWeights:
    """Neuron-major weights: row i of each [N, D] matrix belongs to neuron i.

    `down` is transposed from the file, at a relative RMS error of `down_error` where it had to be
    requantised. An ungated FFN has its up matrix as `gate` and no `up`. gate_bias: float32 [N] or None, added to
    the gate product; down_bias: float32 [D] or None, added to y once, whatever the neurons.
    """

    gate: QuantTensor
    up: QuantTensor | None
    down: QuantTensor
    down_error: float = 0.0
    gate_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("up", "down"):
            weight = getattr(self, name)
            if weight is not None and weight.shape != self.gate.shape:
                raise ValueError(f"{name} is {weight.shape}, expected gate's {self.gate.shape} (neurons, width)")
        check_biases(self.gate_bias, self.down_bias, *self.gate.shape)

    @property
    def n_neurons(self) -> int:
        return self.gate.rows

    @property
    def matrices(self) -> list[QuantTensor]:
        """gate, up where there is one, and down."""
        return [one for one in (self.gate, self.up, self.down) if one is not None]

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.matrices)

    def of_blocks(self, blocks: Sequence[torch.Tensor]) -> FFNWeights:
        """The same matrices, or some of their rows, over other memory: one tensor for each of `matrices`."""
        gate, *up, down = (replace(one, blocks=held) for one, held in zip(self.matrices, blocks, strict=True))
        return FFNWeights(gate, up[0] if up else None, down, self.down_error, self.gate_bias, self.down_bias)

    def of_rows(self, first: int, blocks: Sequence[torch.Tensor]) -> FFNWeights:
        """Neurons from `first` on over other memory, which may be another device's; without the bias of y."""
        held, n = self.gate_bias, blocks[0].shape[0]
        bias = None if held is None else held[first : first + n].to(blocks[0].device)
        gate, *up, down = (replace(one, blocks=part) for one, part in zip(self.matrices, blocks, strict=True))
        return FFNWeights(gate, up[0] if up else None, down, self.down_error, bias)

    def shard(self, neurons: torch.Tensor, *, with_bias: bool = True) -> FFNWeights:
        """Some of the neurons (int64 [H]), numbered in that order; copies their rows. Of all shards, one has y's bias."""
        up = None if self.up is None else self.up[neurons]
        gate_bias = None if self.gate_bias is None else self.gate_bias[neurons]
        down_bias = self.down_bias if with_bias else None
        return FFNWeights(self.gate[neurons], up, self.down[neurons], self.down_error, gate_bias, down_bias)


def check_biases(gate_bias: torch.Tensor | None, down_bias: torch.Tensor | None, neurons: int, width: int) -> None:
    """ValueError unless biases that are given are float32 [neurons] and [width]."""
    for name, bias, size in (("gate_bias", gate_bias, neurons), ("down_bias", down_bias, width)):
        if bias is not None and (bias.shape != (size,) or bias.dtype != torch.float32):
            raise ValueError(f"{name} is {bias.dtype} {list(bias.shape)}, expected torch.float32 [{size}]")


def with_bias(y: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """y float32 [T, D] and a bias float32 [D], if any, as an op that a recorded step repeats."""
    return y if bias is None else add(y, bias.expand(y.shape))


class Activity:
    """How many neurons were computed. `totals` int64 [2], on the device: (token, neuron) pairs, and tokens."""

    def __init__(self, n_neurons: int, device: torch.device, shape: tuple[int, ...] = (2,)) -> None:
        self.n_neurons = n_neurons
        with torch.inference_mode(False):  # it is reset outside of inference as well
            self.totals = torch.zeros(shape, dtype=torch.int64, device=device)

    def reset(self) -> None:
        self.totals.zero_()

    def move(self, put: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Go on counting in what `put` makes of `totals`, on the device that computes."""
        with torch.inference_mode(False):
            self.totals = put(self.totals)

    @property
    def active(self) -> float:
        return int(self.totals[0])

    @property
    def tokens(self) -> int:
        return int(self.totals[1])

    @property
    def density(self) -> float:
        """Active over total neurons; 1 before any token."""
        return self.active / (self.tokens * self.n_neurons) if self.tokens else 1.0


class DenseFFN(nn.Module):
    """Every neuron. gate, up: QuantTensor [N, D]; down: [D, N] as the file has it; up may be None.

    gate_bias: float32 [N] or None, of the gate product, which is the up product of an ungated FFN; down_bias:
    float32 [D] or None. cutoff: FATReLU's, for relu alone. ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        gate: QuantTensor,
        up: QuantTensor | None,
        down: QuantTensor,
        activation: str,
        gate_bias: torch.Tensor | None = None,
        down_bias: torch.Tensor | None = None,
        cutoff: float = 0.0,
    ) -> None:
        super().__init__()
        check_activation(activation, cutoff)
        check_biases(gate_bias, down_bias, *gate.shape)
        self.gate, self.up, self.down, self.activation = gate, up, down, activation
        self.gate_bias, self.down_bias, self.cutoff = gate_bias, down_bias, cutoff

    def products(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Gate products with their bias, and up products, float32 [T, N] each, of x float32 [T, D]; None: not gated."""
        return quant_matmul(x, self.gate, self.gate_bias), None if self.up is None else quant_matmul(x, self.up)

    def hidden(self, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        """The hidden values float32 [T, N] of what `products` gave."""
        return glu(gate, up, activation=self.activation, cutoff=self.cutoff)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        """x, residual: float32 [T, D]; returns float32 [T, D]."""
        return quant_matmul(self.hidden(*self.products(x)), self.down, self.down_bias)


class SparseFFN(nn.Module):
    """The neurons its predictor names, on one device, and what compensates for the others.

    cutoff: FATReLU's, for relu alone.
    """

    def __init__(self, weights: FFNWeights, predictor: Predictor, activation: str, cutoff: float = 0.0) -> None:
        super().__init__()
        check_activation(activation, cutoff)
        self.weights, self.predictor, self.activation, self.cutoff = weights, predictor, activation, cutoff
        self.observe: Callable[[torch.Tensor, Prediction], None] | None = None  # called with what is computed
        self.activity = Activity(weights.n_neurons, weights.gate.device)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        if not (opens and self.predictor.opens_dense):
            return self._compensated(x, residual)
        first = with_bias(self.compute(x[:1], self.everything()), self.weights.down_bias)
        return torch.cat([first, self._compensated(x[1:], residual[1:])]) if x.shape[0] > 1 else first

    def _compensated(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y = with_bias(self.compute(x, self.predictor(x, residual)), self.weights.down_bias)
        return _with_compensation(y, x, self.predictor)

    def compute(self, x: torch.Tensor, prediction: Prediction) -> torch.Tensor:
        """The neurons of a prediction, whoever made it, without compensation and bias: x float32 [T, D] to y [T, D]."""
        self._count(x, prediction)
        return self._sum(x, prediction, self.weights)

    def streamed(self, x: torch.Tensor, prediction: Prediction, lane: Lane) -> torch.Tensor:
        """`compute` on x's device, to which a lane brings these weights from the CPU by pieces."""
        self._count(x, prediction.to(self.activity.totals.device))
        bounds = [*range(0, self.weights.n_neurons, STREAMED_NEURONS), self.weights.n_neurons]
        pieces = lane.brought(
            tuple(one.blocks[first:end] for one in self.weights.matrices) for first, end in pairwise(bounds)
        )
        parts = split_prediction(prediction.to(x.device), tuple(end - first for first, end in pairwise(bounds)))
        ys = (
            self._sum(x, part, self.weights.of_rows(first, blocks))
            for part, blocks, (first, _) in zip(parts, pieces, pairwise(bounds), strict=True)
        )
        return reduce(add, ys, torch.zeros_like(x))

    def _count(self, x: torch.Tensor, prediction: Prediction) -> None:
        tally(prediction.active, self.activity.totals, tokens=x.shape[0], mask=prediction.mask)
        if self.observe is not None:
            self.observe(x, prediction)

    def _sum(self, x: torch.Tensor, prediction: Prediction, weights: FFNWeights) -> torch.Tensor:
        with expect_density(self.predictor.expected_density):
            return sparse_ffn(
                x,
                weights.gate,
                weights.up,
                weights.down,
                prediction.active,
                activation=self.activation,
                mask=prediction.mask,
                gate_values=prediction.gate_values,
                shift=prediction.shift,
                gate_bias=weights.gate_bias,
                cutoff=self.cutoff,
            )

    def products(self, x: torch.Tensor, prediction: Prediction) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As DenseFFN's of every neuron, for who observes it: the gate's from the prediction where that has them."""
        gate, weights = prediction.gate_values, self.weights
        if gate is None:
            gate = quant_matmul(x, weights.gate, weights.gate_bias)
        return gate, None if weights.up is None else quant_matmul(x, weights.up)

    @property
    def traffic(self) -> Traffic:
        """The bytes that a token reads of weights, for lanes that time themselves by them."""
        weights = self.weights
        gate = weights.gate.nbytes if self.predictor.reads_gate else 0
        rows = (weights.nbytes - gate) // max(1, weights.n_neurons)
        return Traffic(self.predictor.own_bytes + gate, rows, self.activity.totals)

    def everything(self) -> Prediction:
        """The prediction that names every neuron."""
        device, count = self.weights.gate.device, self.weights.n_neurons
        every = torch.arange(count, dtype=torch.int32, device=device)
        return Prediction(Active(every, torch.full((1,), count, dtype=torch.int32, device=device)), None, None)

    def shard(self, neurons: torch.Tensor, *, compensated: bool = True) -> SparseFFN:
        """The same for some of the neurons (int64 [H]); of all shards, one is to be compensated, and has the bias of y."""
        predictor = self.predictor.shard(neurons)
        predictor.compensation = self.predictor.compensation if compensated else None
        part = SparseFFN(self.weights.shard(neurons, with_bias=compensated), predictor, self.activation, self.cutoff)
        part._share_gate()
        return part

    def move(self, place: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Hold the weights in other memory: what `place` makes of each matrix's blocks."""
        self.weights = self.weights.of_blocks([place(one.blocks) for one in self.weights.matrices])
        self._share_gate()

    def _share_gate(self) -> None:
        """Have a predictor that reads the gate read this one's, and hold no second."""
        mine, its = self.weights.gate, self.predictor.gate if self.predictor.reads_gate else None
        if its is not None and (its.shape, its.device) == (mine.shape, mine.device):
            self.predictor.gate, self.predictor.gate_bias = mine, self.weights.gate_bias


def _with_compensation(y: torch.Tensor, x: torch.Tensor, predictor: Predictor) -> torch.Tensor:
    return y if predictor.compensation is None else add(y, quant_matmul(x, predictor.compensation))


class HybridFFN(nn.Module):
    """A hot shard on a device and cold ones on the CPU, added in that order.

    lane:      what runs the cold shards beside the hot one; None computes one after the other on the same threads.
    predictor: one for all neurons, on the hot shard's device, numbered hot first and then cold, shard by shard,
               which compensates where it has to; the hot shard has the bias of y. None has every shard ask its own, of
               which one compensates and has the bias.
    """

    def __init__(
        self,
        hot: SparseFFN,
        cold: SparseFFN | Sequence[SparseFFN],
        lane: Lane | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        super().__init__()
        self.hot, self.cold = hot, nn.ModuleList([cold] if isinstance(cold, SparseFFN) else cold)
        self.lane, self.predictor = lane, predictor
        if lane is not None:
            for number, shard in enumerate(self._cold):
                shard.move(partial(lane.place, number))

    @classmethod
    def of(
        cls,
        whole: SparseFFN,
        hot: torch.Tensor,
        cold: Sequence[torch.Tensor],
        lane: Lane | None = None,
        *,
        one_predictor: bool = False,
    ) -> HybridFFN:
        """The shards of an FFN, each by its neurons' numbers int64 [H]; together they are to be all of them.

        A single cold part is dealt by turns to as many shards as the lane computes beside each other, none of them empty.
        one_predictor: whether the hot shard's device predicts for all.
        """
        if len(cold) == 1 and lane is not None:
            turns = min(lane.n_cold, max(1, cold[0].numel()))  # no shard without a neuron
            cold = [cold[0][turn::turns] for turn in range(turns)]
        if not one_predictor:
            shards = [whole.shard(part, compensated=i == 0) for i, part in enumerate((hot, *cold))]
            return cls(shards[0], shards[1:], lane)
        order = torch.cat([hot, *cold])
        predictor = whole.predictor.shard(order)
        predictor.compensation = whole.predictor.compensation
        shards = [
            SparseFFN(whole.weights.shard(part, with_bias=i == 0), predictor, whole.activation, whole.cutoff)
            for i, part in enumerate((hot, *cold))
        ]
        return cls(shards[0], shards[1:], lane, predictor)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        whole_first = opens and (self.predictor or self.hot.predictor).opens_dense
        if whole_first and x.shape[0] > 1:
            first = self.forward(x[:1], residual[:1], opens)  # hooks see one call
            return torch.cat([first, self.forward(x[1:], residual[1:])])
        streams = self._streams(x.shape[0])
        if self.predictor is None:
            if streams:
                return self._streamed(x, self.hot(x, residual), [_predicted_on_cpu(s, x, residual) for s in self._cold])
            return self._together(
                partial(self.hot, x, residual, opens),
                [
                    Cold(partial(_predict_alone, shard, opens), x, None, (residual,), shard.traffic)
                    for shard in self._cold
                ],
            )
        if whole_first:
            y = self._named(x, [shard.everything() for shard in (self.hot, *self._cold)])
            return with_bias(y, self.hot.weights.down_bias)
        sizes = tuple(shard.weights.n_neurons for shard in (self.hot, *self._cold))
        named = split_prediction(self.predictor(x, residual), sizes)
        y = self._streamed(x, self.hot.compute(x, named[0]), named[1:]) if streams else self._named(x, named)
        return _with_compensation(with_bias(y, self.hot.weights.down_bias), x, self.predictor)

    def _streams(self, tokens: int) -> bool:
        """Whether this batch's cold neurons are computed on the device."""
        if self.lane is None or self.lane.prefill is None:
            return False
        matrices = [one for shard in self._cold for one in shard.weights.matrices]
        weights = sum(one.rows * one.columns for one in matrices)
        return self.lane.prefill.streams(tokens, weights, sum(one.nbytes for one in matrices))

    def _streamed(self, x: torch.Tensor, hot_y: torch.Tensor, named: Sequence[Prediction]) -> torch.Tensor:
        assert self.lane is not None
        lane = self.lane
        return reduce(add, (shard.streamed(x, one, lane) for shard, one in zip(self._cold, named, strict=True)), hot_y)

    def _named(self, x: torch.Tensor, named: Sequence[Prediction]) -> torch.Tensor:
        """The neurons that are named for each shard, hot first."""
        hot, *rest = named
        return self._together(
            lambda: self.hot.compute(x, hot),
            [
                Cold(partial(_compute_named, shard), x, active, tuple(others), shard.traffic)
                for shard, (active, *others) in zip(self._cold, rest, strict=True)
            ],
        )

    def _together(self, hot: Callable[[], torch.Tensor], cold: Sequence[Cold]) -> torch.Tensor:
        if self.lane is None:
            results = [hot(), *(part.compute() for part in cold)]
        else:
            results = self.lane.run(hot, cold, self.hot.traffic)
        return reduce(add, results)

    @property
    def _cold(self) -> list[SparseFFN]:
        return cast(list[SparseFFN], list(self.cold))


def _predicted_on_cpu(shard: SparseFFN, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
    device = shard.weights.gate.device
    return shard.predictor(x.to(device), residual.to(device))


def _predict_alone(
    shard: SparseFFN, opens: bool, x: torch.Tensor, _: Active | None, residual: torch.Tensor
) -> torch.Tensor:
    return shard(x, residual, opens)


def _compute_named(shard: SparseFFN, x: torch.Tensor, active: Active, *others: torch.Tensor | None) -> torch.Tensor:
    return shard.compute(x, Prediction(active, *others))
