"""The placements to beat, each under the same memory account and the same objective.

- `powerinfer`: its released solver. VRAM goes to attention, predictors, norms, head and KV first; what is left goes to the
  neurons of the whole model by activation count. That solver is a knapsack of equal sizes, which one sort solves; it
  knows no time.
- `uniform`: the same share of hot neurons in each layer.
- `dense_layers`: llama.cpp's whole layers, every neuron read at every token.
- `sparse_layers`: whole layers, with the predictor.
"""

from __future__ import annotations

from collections.abc import Callable

from pinfer.placement.plan import Plan
from pinfer.placement.problem import Problem


def powerinfer(problem: Problem) -> Plan | None:
    """None where attention and predictors do not fit."""
    raise NotImplementedError


def uniform(problem: Problem) -> Plan | None:
    """None where attention and predictors do not fit."""
    raise NotImplementedError


def dense_layers(problem: Problem) -> Plan:
    """The most whole layers that fit, from the last."""
    raise NotImplementedError


def sparse_layers(problem: Problem) -> Plan:
    """The most whole layers that fit, from the last."""
    raise NotImplementedError


BASELINES: dict[str, Callable[[Problem], Plan | None]] = {
    "powerinfer": powerinfer,
    "uniform": uniform,
    "sparse_layers": sparse_layers,
}
