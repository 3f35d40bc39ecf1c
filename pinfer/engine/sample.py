"""What a few of the sequences tell of a layer before all of them pass it: what counts as active, what rank it needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pinfer.engine.load import Engine
from pinfer.engine.measure import dense_ffn, observe_layer, observed, release_layer
from pinfer.models import LayerWalk
from pinfer.placement.accumulate import Magnitudes
from pinfer.predictors.low_rank import spectrum, with_moments_of
from pinfer.predictors.ranks import LayerNeed, rank_under_budget
from pinfer.quant import QuantType

SAMPLE_TOKENS = 2048


def sampled(lengths: Sequence[int]) -> list[int]:
    """Numbers of sequences of these lengths, evenly from all over, that have about SAMPLE_TOKENS tokens together."""
    count = max(1, min(len(lengths), round(len(lengths) * SAMPLE_TOKENS / max(1, sum(lengths)))))
    return [(2 * i + 1) * len(lengths) // (2 * count) for i in range(count)]


class _Contributions:
    """An Observer that counts contributions by size. norms: float32 [N], ‖d_i‖."""

    def __init__(self, norms: torch.Tensor) -> None:
        self._norms, self.counts = norms, Magnitudes()

    def add(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, hidden: torch.Tensor) -> None:
        self.counts.add(hidden.abs().mul_(self._norms))


class _Inputs:
    """An Observer that keeps the inputs and counts what is not zero."""

    def __init__(self) -> None:
        self._inputs, self._active, self._values = list[torch.Tensor](), 0, 0

    def add(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, hidden: torch.Tensor) -> None:
        self._inputs.append(x)
        self._active += int(hidden.count_nonzero())
        self._values += hidden.numel()

    @property
    def inputs(self) -> torch.Tensor:
        """float32 [<= SAMPLE_TOKENS, D]"""
        whole = torch.cat(self._inputs)
        return whole[torch.linspace(0, len(whole) - 1, min(len(whole), SAMPLE_TOKENS)).long()]

    @property
    def density(self) -> float:
        return self._active / self._values


def contribution_bar(engine: Engine, walk: LayerWalk, norms: torch.Tensor, sparsity: float) -> float:
    """The contribution |h_i| ‖d_i‖ that a share `sparsity` of the walk's next layer does not exceed, to 0.1 %.

    norms: float32 [N], ‖d_i‖. Measured on some of the sequences, which do not move.
    """
    found = _Contributions(norms)
    with observed(engine, walk.layer, found):
        for sequence in sampled([len(residual) for residual in walk.residuals]):
            before = walk.residuals[sequence]
            walk.step(sequence)
            walk.residuals[sequence] = before
    return found.counts.quantile(sparsity)


def choose_ranks(
    engine: Engine,
    sequences: Sequence[torch.Tensor],
    budget_bytes: int,
    kind: QuantType,
    sparsity: float | None,
    passed: Callable[[], None] = lambda: None,
) -> tuple[int, ...]:
    """`rank_under_budget` for a dense model, from some of the sequences int64 [T]; `passed` is called after each layer.

    ValueError as `rank_under_budget`, and where gates are not finite.
    """
    walk = LayerWalk(engine.model, [sequences[number] for number in sampled([len(one) for one in sequences])])
    needs = []
    for layer in range(engine.config.n_layers):
        gate, found = dense_ffn(engine, layer).gate, _Inputs()
        observe_layer(engine, walk, found)
        density = found.density if sparsity is None else 1 - sparsity
        try:
            energies = spectrum(gate, with_moments_of(found.inputs))
        except ValueError as problem:
            raise ValueError(f"{engine.path}: layer {layer}: {problem}") from problem
        needs.append(LayerNeed(gate.rows, gate.columns, density, energies))
        release_layer(engine, layer)
        passed()
    return rank_under_budget(needs, budget_bytes, kind)
