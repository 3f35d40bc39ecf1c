"""What a predictor catches and misses: the neurons it names, held against all neurons of the same inputs.

A neuron adds h_i · d_i to the FFN's output, h_i = act(g_i · x)(u_i · x), so its weight in a token is
|h_i| · ‖d_i‖. Under a shift c_i, which a compensation stands for, h_i is (act(g_i · x) - c_i)(u_i · x). Which neurons are truly active depends on the activation:

- `nonzero` (ReLU and its kin): act(g_i · x) ≠ 0. The others add nothing, whatever their up product.
- `top_k` (SiLU, GELU): the K of most weight in the token, K being as many as were computed for it.
  Recall then says how near the choice is to the best of its size; computed over active is 1 by definition.

input_threshold names no neurons: there a neuron is computed for a token where its hidden value is kept, so
that its row of `down` is read. Its weight is that of the whole input, not of the inputs kept: recall says
whether the large hidden values are still found, and nothing of how exact they are. Density is the share of
multiply-adds, as `InputActivity` counts them, of which gate and up are most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import nn

from pinfer.ffn import SparseFFN
from pinfer.input_sparse_ffn import InputSparseFFN, Thresholds
from pinfer.kernels.activation import ZERO_BELOW_ZERO, activate, hidden_of
from pinfer.kernels.norms import row_norms
from pinfer.kernels.select_active.reference import passes
from pinfer.models import Experts, Transformer
from pinfer.models.ffns import single_ffns
from pinfer.predictors import Prediction

TrulyActive = Literal["nonzero", "top_k"]
# Of some tokens: weight, computed and fired [T, N], work [T, 1].
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
Watched = SparseFFN | InputSparseFFN
Parts = list[list[Part]]  # of each shard


def truly_active(activation: str) -> TrulyActive:
    """Which definition of a truly active neuron holds for an activation."""
    return "nonzero" if activation in ZERO_BELOW_ZERO else "top_k"


@dataclass(frozen=True)
class NeuronCounts:
    """Sums over the tokens of one layer, which add up over windows.

    neurons:      (token, neuron) pairs; computed, active: how many of them were computed, are truly active;
    caught:       how many are both;
    weight_share: sum over tokens of the share of Σ|h_i|·‖d_i‖ that computed neurons hold (1 where that sum is 0);
    work:         as `computed`, but neurons' worth of multiply-adds where a neuron may be computed in part.
    """

    tokens: int
    neurons: int
    computed: int
    active: int
    caught: int
    weight_share: float
    work: float

    def __add__(self, other: NeuronCounts) -> NeuronCounts:
        return NeuronCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def density(self) -> float:
        """Computed over all neurons, or their worth."""
        return self.work / self.neurons

    @property
    def recall(self) -> float:
        """Share of the truly active neurons that were computed; 1 where none is active."""
        return self.caught / self.active if self.active else 1.0

    @property
    def weighted_recall(self) -> float:
        """Share of Σ|h_i|·‖d_i‖ that computed neurons hold, the mean over tokens.

        Not the share of all tokens' sum: an opening token's outliers would decide it alone.
        """
        return self.weight_share / self.tokens

    @property
    def over_prediction(self) -> float | None:
        """Computed for each truly active one; 1 is perfect at full recall, None where none is active."""
        return self.computed / self.active if self.active else None


def count_neurons(
    weight: torch.Tensor, computed: torch.Tensor, fired: torch.Tensor | None, work: float | None = None
) -> NeuronCounts:
    """Counts of one layer. All [T, N]: weight float32 |h_i|·‖d_i‖; computed bool; fired bool, act(g_i · x) ≠ 0.

    Without `fired` the truly active are the heaviest of each token, as many as were computed. Equal weights at
    the edge count for the predictor. work: neurons' worth of multiply-adds, None where it is that of `computed`.
    """
    per_token = computed.sum(dim=1)  # [T]
    if fired is None:
        edge = weight.sort(dim=1, descending=True).values.gather(1, (per_token - 1).clamp_min(0)[:, None])  # [T, 1]
        above = weight > edge
        level = torch.minimum((computed & (weight == edge)).sum(1), per_token - above.sum(1)).clamp_min(0)
        active, caught = int(per_token.sum()), int(((computed & above).sum(1) + level).sum())
    else:
        active, caught = int(fired.sum()), int((computed & fired).sum())
    total = weight.sum(1, dtype=torch.float64)
    held = torch.where(computed, weight, 0).sum(1, dtype=torch.float64)
    share = torch.where(total == 0, 1.0, held / total)  # NaN stays
    n_computed = int(per_token.sum())
    return NeuronCounts(
        weight.shape[0], weight.numel(), n_computed, active, caught, float(share.clamp_max(1).sum()),
        n_computed if work is None else work,
    )  # fmt: skip


class NeuronObserver:
    """Counts, layer by layer, what the predictors of a sparse model name against what its inputs call for.

    The inputs are the sparse run's own: layer by layer, the predictor is judged on what it was given.
    Works for SparseFFN, for the shards of a HybridFFN, whose neurons are taken together, for InputSparseFFN and for
    experts.
    """

    def __init__(self, model: Transformer) -> None:
        """ValueError for a model with a dense layer."""
        self._layers: list[tuple[nn.Module, list[list[tuple[Watched, torch.Tensor]]]]] = []
        for layer, block in enumerate(model.layers):
            ffns = []
            for ffn in single_ffns(block.ffn):
                shards = [module for module in ffn.modules() if isinstance(module, Watched)]
                if not shards:
                    raise ValueError(f"layer {layer} is dense: it has no predictor to observe")
                ffns.append([(shard, row_norms(shard.weights.down)) for shard in shards])
            self._layers.append((block.ffn, ffns))

    @contextmanager
    def watch(self, last: int) -> Iterator[list[NeuronCounts]]:
        """Gathers one NeuronCounts a layer from the forward pass in the block, over its last tokens.

        Of a layer with experts it counts each token once for every expert that it was sent to.
        """
        counts: list[NeuronCounts] = []
        hooks = []
        for module, ffns in self._layers:
            gathered: list[Parts] = [[[] for _ in shards] for shards in ffns]
            for shards, parts in zip(ffns, gathered, strict=True):
                for (shard, norms), of_shard in zip(shards, parts, strict=True):
                    _collect(shard, norms, of_shard)
            hooks.append(module.register_forward_hook(_counter(ffns[0][0][0].activation, gathered, counts, last)))
        try:
            yield counts
        finally:
            for hook in hooks:
                hook.remove()
            for shard, _ in (one for _, ffns in self._layers for shards in ffns for one in shards):
                shard.observe = None


def _collect(shard: Watched, norms: torch.Tensor, parts: list[Part]) -> None:
    """Have a shard add to its parts whatever it computes."""
    if isinstance(shard, SparseFFN):
        shard.observe = _collector(shard, norms, parts)
    else:
        shard.observe = _input_collector(shard, norms, parts)


def _collector(shard: SparseFFN, norms: torch.Tensor, parts: list[Part]) -> Callable[[torch.Tensor, Prediction], None]:
    """What a shard calls with some tokens and the neurons it computes for them."""

    def collect(x: torch.Tensor, prediction: Prediction) -> None:
        gate, up = shard.products(x, prediction)
        weight = hidden_of(shard.activation, gate, up, prediction.shift, shard.cutoff).abs() * norms
        computed = computed_neurons(prediction, len(x))
        fired = activate(shard.activation, gate, shard.cutoff) != 0
        count = computed.sum(1, keepdim=True)
        # Hot neurons may be on a GPU, cold ones are not.
        parts.append((weight.cpu(), computed.cpu(), fired.cpu(), count.cpu()))

    return collect


def _input_collector(
    ffn: InputSparseFFN, norms: torch.Tensor, parts: list[Part]
) -> Callable[[torch.Tensor, torch.Tensor, Thresholds], None]:
    """What an InputSparseFFN calls with some tokens, their hidden values and the thresholds of both."""

    def collect(x: torch.Tensor, hidden: torch.Tensor, thresholds: Thresholds) -> None:
        gate, up = ffn.products(x)
        weight = hidden_of(ffn.activation, gate, up, cutoff=ffn.cutoff).abs() * norms
        inputs, computed = (passes(one.abs(), limit) for one, limit in zip((x, hidden), thresholds, strict=True))
        work = ffn.activity.worth(inputs.sum(1, keepdim=True), computed.sum(1, keepdim=True))
        parts.append((weight, computed, activate(ffn.activation, gate, ffn.cutoff) != 0, work))

    return collect


def _counter(activation: str, gathered: list[Parts], counts: list[NeuronCounts], last: int) -> Callable[..., None]:
    """A hook on a layer's FFN, or its experts, whose shards have computed all tokens: in turns, where the first is apart."""
    nonzero = truly_active(activation) == "nonzero"

    def count(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        found = []
        for parts, kept in zip(gathered, _last_rows(module, inputs[0], last), strict=True):
            if not int(kept.sum()):  # an expert that none of these tokens is sent to
                continue
            by_shard = [[torch.cat(turns)[kept] for turns in zip(*of_shard, strict=True)] for of_shard in parts]
            weight, computed, fired, work = (torch.cat(shards, dim=1) for shards in zip(*by_shard, strict=True))
            found.append(count_neurons(weight, computed, fired if nonzero else None, float(work.double().sum())))
        counts.append(total(found))
        for of_shard in (one for parts in gathered for one in parts):
            of_shard.clear()

    return count


def _last_rows(module: nn.Module, x: torch.Tensor, last: int) -> list[torch.Tensor]:
    """For each FFN of a layer, which of the rows that it computed of x [T, D] are of the last tokens: bool [its rows]."""
    is_last = torch.arange(x.shape[0]) >= x.shape[0] - last
    if not isinstance(module, Experts):
        return [is_last]
    chosen = module.routed(x)[1]
    return [is_last[(chosen == number).any(1)] for number in range(len(module.ffns))]


def computed_neurons(prediction: Prediction, last: int) -> torch.Tensor:
    """bool [last, N]: which neurons the last tokens compute, by the list and the mask of a prediction."""
    indices, count = prediction.active.indices, int(prediction.active.count)
    listed = torch.zeros(indices.numel(), dtype=torch.bool, device=indices.device)
    listed[indices[:count].long()] = True
    return listed.expand(last, -1) if prediction.mask is None else listed & prediction.mask[-last:]


def total(counts: Sequence[NeuronCounts]) -> NeuronCounts:
    """The sum of at least one, over windows or over layers; over layers, `tokens` counts (token, layer) pairs."""
    first, *rest = counts
    return sum(rest, first)
