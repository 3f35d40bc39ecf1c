"""Trains the factors of a LowRank predictor to name the neurons that a layer's FFN needs, one layer at a time.

A neuron's score z = second · (first · x) + bias is trained as the log odds that it fires, where a
neuron that fires counts by what it contributes. Per token

    loss = Σ_i softplus(z_i)·(1 − y_i) + softplus(−z_i)·(α·w_i + FLOOR)·y_i,

y_i saying whether neuron i fires and w_i its contribution, scaled to a mean of 1 over the token's
active neurons. The form is Deja Vu's and PowerInfer's (Liu et al. 2023, Song et al. 2024) without a
nonlinearity between the factors; they start from the closed form of `low_rank`. The factors are
rounded to their stored type in every step and the gradients at the rounded ones move the unrounded
(straight-through, Bengio et al. 2013), so that what is judged is what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pinfer.kernels.ops import dequantize
from pinfer.predictors.cuts import KEPT_VALUES, Cuts
from pinfer.predictors.frontier import Frontier, Reach
from pinfer.predictors.low_rank import RANK_MULTIPLE, closed_form, with_moments_of
from pinfer.predictors.pair_source import Pairs, PairSource
from pinfer.quant import BY_NAME, QuantTensor
from pinfer.quantize import quantize

WEIGHT_TYPES = ("Q4_0", "Q8_0")
FLOOR = 0.05  # of a firing neuron's weight, whatever it contributes
BETAS, EPSILON = (0.9, 0.99), 1e-12  # of Adam
START_TOKENS = 2048  # that the start is computed from
START_LOGIT = 6.0  # the RMS of a neuron's score at the start, in log odds
WARM_UP, LAST_PART = 0.05, 0.3  # of the steps
CHUNK_VALUES = 1 << 20  # scores held at a time: several tensors of 4 MB, whatever N is
FRONTIER = (1.0, 1.3, 1.6, 2.0, 2.5, 3.0)  # neurons named for each active one that a result tells of
TRAINED = ("first", "second", "bias")
MOMENTS = tuple(f"{kind}.{name}" for kind in ("mean", "square") for name in TRAINED)


@dataclass(frozen=True)
class TrainingSettings:
    """How one layer's factors are trained.

    rank: R, a multiple of 32. weight_type: of the stored factors, Q4_0 or Q8_0. steps: at most, of
    `batch_tokens` tokens each. learning_rate: how far a step moves a weight, as a share of the RMS of
    its factor; it rises over the first 5 % of the steps, falls over the last 30 %, and is halved at
    every measurement that is not the best so far.
    contribution_weight: α, how much more than its absence a firing neuron's presence counts.
    over_prediction: neurons named for each active one at which recall is judged, every `measure_every`
    steps; training ends after `patience` measurements without a better one.
    """

    rank: int = 64
    weight_type: str = "Q4_0"
    steps: int = 2000
    batch_tokens: int = 1024
    learning_rate: float = 0.03
    contribution_weight: float = 30.0
    over_prediction: float = 1.3
    measure_every: int = 100
    patience: int = 5
    seed: int = 0

    def check(self, n_neurons: int, width: int) -> None:
        """ValueError, naming the value and the limit, for what cannot be trained on a layer [N, D]."""
        if self.weight_type not in WEIGHT_TYPES:
            raise ValueError(f"weight_type must be one of {', '.join(WEIGHT_TYPES)}, not {self.weight_type!r}")
        BY_NAME[self.weight_type].row_bytes(width)
        limit = min(n_neurons, width)
        if self.rank % RANK_MULTIPLE or not 0 < self.rank <= limit:
            raise ValueError(
                f"rank must be a multiple of {RANK_MULTIPLE} from {RANK_MULTIPLE} to {limit}, not {self.rank}"
            )
        for name in ("steps", "batch_tokens", "measure_every", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning_rate must be above 0 and at most 1, not {self.learning_rate:g}")
        if not 0 < self.contribution_weight < math.inf:
            raise ValueError(f"contribution_weight must be above 0 and finite, not {self.contribution_weight:g}")
        if not 0 < self.over_prediction < math.inf:
            raise ValueError(f"over_prediction must be above 0 and finite, not {self.over_prediction:g}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed must be from 0 to {2**31 - 1}, not {self.seed}")

    def rate(self, step: int, halvings: int) -> float:
        """The learning rate of a step, counted from 0, after so many halvings."""
        warm, last = WARM_UP * self.steps, LAST_PART * self.steps
        return self.learning_rate * min((step + 1) / max(1, warm), (self.steps - step) / max(1, last), 1) / 2**halvings


@dataclass(frozen=True)
class Figures:
    """How a training went, as plain data.

    step: after how many of the `steps` taken the factors stood as they are kept. reach: on the validation
    tokens at the settings' over_prediction; frontier: at each of FRONTIER. density: the share of neurons
    active on those tokens. curve: weighted recall at the settings' over_prediction by step.
    """

    step: int
    steps: int
    reach: Reach
    frontier: tuple[Reach, ...]
    density: float
    curve: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Figures:
        """From what JSON made of `asdict`."""
        reaches = tuple(Reach(*one) for one in plain["frontier"])
        curve = tuple((step, reached) for step, reached in plain["curve"])
        return cls(plain["step"], plain["steps"], Reach(*plain["reach"]), reaches, plain["density"], curve)


@dataclass(frozen=True)
class Trained:
    """A layer's trained factors: neuron i is named where second_i · (first · x) + bias_i exceeds a cut.

    first: QuantTensor [R, D]; second: QuantTensor [N, R]; bias: float32 [N]; cuts: by density over the
    validation tokens, of the scores without the bias.
    """

    first: QuantTensor
    second: QuantTensor
    bias: torch.Tensor
    cuts: Cuts
    figures: Figures


def train_low_rank(
    source: PairSource,
    gate: QuantTensor,
    settings: TrainingSettings,
    state: Mapping[str, torch.Tensor] | None = None,
    measured: Callable[[LayerTraining], None] = lambda _: None,
) -> Trained:
    """Train the factors of one layer whose gate is a QuantTensor [N, D].

    state: of an earlier, unfinished training of the same, to go on from. `measured` is called after
    every measurement. The same source, settings and number of threads give the same result bit for
    bit, resumed or not. ValueError for settings that the layer cannot take, a state that is not of
    them, and a learning rate at which training diverges.
    """
    training = LayerTraining(source, gate, settings, state)
    while not training.done:
        training.advance()
        measured(training)
    return training.result()


class LayerTraining:
    """The training of one layer, a stretch of `measure_every` steps at a time (see `train_low_rank`)."""

    def __init__(
        self,
        source: PairSource,
        gate: QuantTensor,
        settings: TrainingSettings,
        state: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        settings.check(*gate.shape)
        if min(source.tokens, source.validation_tokens) < 1:
            raise ValueError(
                f"{source.tokens} tokens to train on and {source.validation_tokens} to judge by: none may be 0"
            )
        self._source, self._settings, self._kind = source, settings, BY_NAME[settings.weight_type]
        self._chunk = max(1, CHUNK_VALUES // gate.rows)
        self._step, self._best_step, self._halvings = 0, 0, 0
        self._curve: list[tuple[int, float]] = []
        if state is not None:
            self._restore(gate, state)
            return
        self._weights = dict(zip(TRAINED, self._start(gate), strict=True))
        self._moments = {name: torch.zeros_like(self._weights[name.partition(".")[2]]) for name in MOMENTS}
        # Steps are in proportion to the factors as they start; a bias is in log odds.
        self._units = [float(self._weights[name].square().mean().sqrt()) for name in TRAINED[:2]] + [1.0]
        self.measure()

    def _start(self, gate: QuantTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The closed form, its scores scaled to an RMS of START_LOGIT a neuron, and log odds of firing."""
        count = min(START_TOKENS, self._source.tokens)
        tokens = torch.linspace(0, self._source.tokens - 1, count, dtype=torch.float64).round().long()
        inputs, fired = [], torch.zeros(gate.rows)
        for part in tokens.split(self._chunk):
            pairs = self._source.take(part)
            inputs.append(pairs.inputs)
            fired += (pairs.contribution > 0).sum(0)
        x = torch.cat(inputs)
        first, second = closed_form(gate, with_moments_of(x), self._settings.rank)
        hidden = x @ first.T
        sizes = ((second @ (hidden.T @ hidden / len(x))) * second).sum(1).clamp_min(1e-20).sqrt()
        odds = (fired + 0.5) / (count - fired + 0.5)
        return first, second / sizes[:, None] * START_LOGIT, odds.log()

    @property
    def step(self) -> int:
        """Steps taken."""
        return self._step

    @property
    def curve(self) -> Sequence[tuple[int, float]]:
        """Weighted recall by step, as measured so far."""
        return self._curve

    @property
    def done(self) -> bool:
        since = sum(step > self._best_step for step, _ in self._curve)
        return self._step >= self._settings.steps or since >= self._settings.patience

    def advance(self) -> None:
        """Take the steps to the next measurement, and measure. ValueError where training diverges."""
        for _ in range(min(self._settings.measure_every, self._settings.steps - self._step)):
            self.take_step()
        self.measure()

    def take_step(self) -> None:
        """One step of gradient descent."""
        settings = self._settings
        draw = torch.Generator().manual_seed(settings.seed * 1_000_003 + self._step)  # resumes without a state
        tokens = torch.randint(self._source.tokens, (settings.batch_tokens,), generator=draw).sort().values
        rounded = self._rounded(self._weights)
        sums = [torch.zeros_like(self._weights[name]) for name in TRAINED]
        for part in tokens.split(self._chunk):
            for total, one in zip(
                sums, gradients(self._source.take(part), *rounded, settings.contribution_weight), strict=True
            ):
                total += one
        self._step += 1
        for name, unit, total in zip(TRAINED, self._units, sums, strict=True):
            self._adam(name, total / settings.batch_tokens, unit * settings.rate(self._step - 1, self._halvings))

    def _adam(self, name: str, gradient: torch.Tensor, rate: float) -> None:
        """Kingma and Ba 2015"""
        mean, square = self._moments[f"mean.{name}"], self._moments[f"square.{name}"]
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        size = (square / (1 - BETAS[1] ** self._step)).sqrt_().add_(EPSILON)
        self._weights[name].addcdiv_(mean, size, value=-rate / (1 - BETAS[0] ** self._step))

    def _stored(self, weights: dict[str, torch.Tensor]) -> tuple[QuantTensor, QuantTensor]:
        try:
            return quantize(weights["first"], self._kind), quantize(weights["second"], self._kind)
        except ValueError as problem:
            raise ValueError(f"training diverged by step {self._step} ({problem}): lower learning_rate") from problem

    def _rounded(self, weights: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first, second = self._stored(weights)
        return dequantize(first), dequantize(second), weights["bias"]

    def _frontier(self, weights: dict[str, torch.Tensor]) -> Frontier:
        """What factors, rounded as they are stored, catch on the validation tokens."""
        first, second, bias = self._rounded(weights)
        found = Frontier()
        for start in range(0, self._source.validation_tokens, self._chunk):
            pairs = self._source.validation(start, min(start + self._chunk, self._source.validation_tokens))
            found.add(scores(pairs.inputs, first, second, bias), pairs.contribution)
        return found

    def measure(self) -> None:
        """Judge the factors as they are, and keep them where they are the best so far."""
        (reach,) = self._frontier(self._weights).at(self._settings.over_prediction)
        reached = reach.weighted_recall
        if not self._curve or reached > max(value for _, value in self._curve):
            self._best = {name: weight.clone() for name, weight in self._weights.items()}
            self._best_step = self._step
        else:
            self._halvings += 1
        self._curve.append((self._step, reached))

    def result(self) -> Trained:
        """The best factors so far."""
        first, second = self._stored(self._best)
        frontier = self._frontier(self._best)
        (reach,) = frontier.at(self._settings.over_prediction)
        figures = Figures(
            self._best_step,
            self._step,
            reach,
            frontier.at(*FRONTIER),
            frontier.density,
            tuple(self._curve),
        )
        bias = self._best["bias"].clone()
        return Trained(first, second, bias, Cuts.of(self._margins(), -bias, torch.ones(1)), figures)

    def _margins(self) -> torch.Tensor:
        """Scores of the best factors as they are stored, float32 [T, N], on some validation tokens taken evenly."""
        first, second, bias = self._rounded(self._best)
        total = self._source.validation_tokens
        stride = max(1, -(-total * len(bias) // KEPT_VALUES))
        found = []
        for start in range(0, total, self._chunk):
            inputs = self._source.validation(start, min(start + self._chunk, total)).inputs
            found.append(scores(inputs[-start % stride :: stride], first, second, bias))
        return torch.cat(found)

    def state(self) -> dict[str, torch.Tensor]:
        """All that a training needs to go on from here: plain tensors, copied."""
        tensors = {
            **self._weights,
            **self._moments,
            **{f"best.{name}": weight for name, weight in self._best.items()},
            "units": torch.tensor(self._units, dtype=torch.float64),
            "steps": torch.tensor([self._step, self._best_step, self._halvings]),
            "curve": torch.tensor(self._curve, dtype=torch.float64),
        }
        return {name: tensor.clone() for name, tensor in tensors.items()}

    def _restore(self, gate: QuantTensor, state: Mapping[str, torch.Tensor]) -> None:
        rank, (n, width) = self._settings.rank, gate.shape
        shapes = dict(zip(TRAINED, ((rank, width), (n, rank), (n,)), strict=True))
        for name in (*TRAINED, *MOMENTS, *(f"best.{name}" for name in TRAINED)):
            expected = shapes[name.rpartition(".")[2]]
            found = state.get(name)
            if found is None or found.dtype != torch.float32 or tuple(found.shape) != expected:
                raise ValueError(f"the state to go on from has no {name} float32 {list(expected)}")
        self._weights = {name: state[name].clone() for name in TRAINED}
        self._moments = {name: state[name].clone() for name in MOMENTS}
        self._best = {name: state[f"best.{name}"].clone() for name in TRAINED}
        self._units = state["units"].tolist()
        self._step, self._best_step, self._halvings = state["steps"].tolist()
        self._curve = [(int(step), reached) for step, reached in state["curve"].tolist()]


def scores(x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """second · (first · x) + bias, float32 [T, N], of float factors [R, D] and [N, R] for x [T, D]."""
    return F.linear(F.linear(x, first), second, bias)


def gradients(
    pairs: Pairs, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor, contribution_weight: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the loss, summed over the pairs, by first [R, D], second [N, R] and bias [N]."""
    inputs, contribution = pairs
    fires = contribution > 0
    mean = contribution.sum(1, keepdim=True) / fires.sum(1, keepdim=True).clamp_min(1)
    positive = contribution * (contribution_weight / mean.clamp_min(1e-30))
    positive += FLOOR * fires
    either = torch.where(fires, positive, 1)
    hidden = F.linear(inputs, first)
    by_score = F.linear(hidden, second, bias).sigmoid_().mul_(either).sub_(positive)  # [B, N]
    by_hidden = by_score @ second
    return by_hidden.T @ inputs, by_score.T @ hidden, by_score.sum(0)
