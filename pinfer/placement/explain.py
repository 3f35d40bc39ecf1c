"""Why a plan is as fast as it is: seconds by part, what limits, what memory is worth, and where a simple rule does as well."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from pinfer.placement.baselines import BASELINES, dense_layers, dense_problem
from pinfer.placement.plan import Plan
from pinfer.placement.problem import Problem, TokenTime, evaluate
from pinfer.placement.shape import ModelShape
from pinfer.placement.solver import Solution, solve

GB = 10**9
MORE = 1.1  # of each resource, to see what limits
AS_GOOD = 0.01  # a baseline within this share of the plan's time is as good


@dataclass(frozen=True)
class Rival:
    """A baseline: its plan's time and memory. slower: by which share of the solver's time it is slower; below 0, faster,
    which only one of another shape can be: dense layers need no predictor, and their `down` stays as in the file."""

    name: str
    token_s: float
    gpu_bytes: int
    slower: float

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s

    @property
    def as_good(self) -> bool:
        return abs(self.slower) <= AS_GOOD


@dataclass(frozen=True)
class Explanation:
    """parts: seconds that add up to a token's. savings: the share of a token's time that 10 % more of a resource would
    save ("GPU memory" solved anew, the others under the same plan; "sync" 10 % less of it). another_gb, one_less_gb:
    tokens/s with a GB more and less of GPU memory, None where that is impossible. price: the share of a token's time
    that a further GB saves at the margin."""

    parts: dict[str, float]
    savings: dict[str, float]
    another_gb: float
    one_less_gb: float | None
    price: float

    @property
    def limit(self) -> str:
        """The resource of which more would save most."""
        return max(self.savings, key=lambda name: self.savings[name])

    def to_plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"limit": self.limit}

    def lines(self, solution: Solution) -> list[str]:
        """The same for people."""
        total, speed = solution.token_s, solution.tokens_per_s
        listed = ", ".join(
            f"{name} {1e3 * seconds:.3g} ms ({100 * seconds / total:.0f} %)"
            for name, seconds in self.parts.items()
            if seconds
        )
        savings = ", ".join(
            f"{name} {100 * share:.1f} %" for name, share in sorted(self.savings.items(), key=lambda one: -one[1])
        )
        less = "does not fit" if self.one_less_gb is None else f"{self.one_less_gb:.2f}"
        return [
            f"A token takes {1e3 * total:.3g} ms: {listed}.",
            f"Limit: {self.limit}. Ten per cent more of each would save: {savings}.",
            f"One GB more: {self.another_gb:.2f} tokens/s; one less: {less}; now {speed:.2f}.",
        ]


def explain(problem: Problem, solution: Solution) -> Explanation:
    """Solved anew with other budgets, and timed on other hardware."""
    another = solve(dataclasses.replace(problem, budget_bytes=problem.budget + GB))
    total = solution.token_s
    return Explanation(
        parts=parts(solution.plan, solution.time),
        savings=_savings(problem, solution),
        another_gb=another.tokens_per_s,
        one_less_gb=_one_less(problem),
        price=solution.price_s_per_byte * GB / total,
    )


def rivals(problem: Problem, solution: Solution, dense: ModelShape | None = None) -> tuple[Rival, ...]:
    """Every baseline's time under the same objective and memory account. dense: the model's shape without a predictor,
    for llama.cpp's layers, which come last; left out if None."""
    placed = [(name, problem, place(problem)) for name, place in BASELINES.items()]
    if dense is not None:
        without = dense_problem(problem, dense)
        placed.append(("dense_layers", without, dense_layers(without)))
    found = []
    for name, own, plan in placed:
        seconds = evaluate(own, plan).total_s
        found.append(Rival(name, seconds, own.memory(plan).gpu_bytes, seconds / solution.token_s - 1))
    return tuple(found)


def parts(plan: Plan, time: TokenTime) -> dict[str, float]:
    """Seconds by part; of a split FFN, those of the longer side."""
    found = dict.fromkeys(("attention on the GPU", "attention on the CPU", "shared predictor", "FFN waits for the GPU",
                           "FFN waits for the CPU", "sync"), 0.0)  # fmt: skip
    for one, layer in zip(plan.layers, time.layers, strict=True):
        found["attention on the GPU" if one.attention == "gpu" else "attention on the CPU"] += layer.attention_s
        found["shared predictor"] += layer.predictor_s
        longer = "FFN waits for the GPU" if layer.gpu_s >= layer.cpu_s else "FFN waits for the CPU"
        found[longer] += max(layer.gpu_s, layer.cpu_s)
        found["sync"] += layer.sync_s
    return found | {"crossings": time.crossings_s, "head": time.head_s}


def _savings(problem: Problem, solution: Solution) -> dict[str, float]:
    hardware, total = problem.hardware, solution.token_s
    changed = {
        "CPU bandwidth": dataclasses.replace(hardware, cpu_bandwidth=MORE * hardware.cpu_bandwidth),
        "GPU bandwidth": dataclasses.replace(hardware, gpu_bandwidth=MORE * hardware.gpu_bandwidth),
        "sync": dataclasses.replace(hardware, sync_s=hardware.sync_s / MORE),
    }
    seconds = {
        name: evaluate(dataclasses.replace(problem, hardware=other), solution.plan).total_s
        for name, other in changed.items()
    }
    seconds["GPU memory"] = solve(dataclasses.replace(problem, budget_bytes=int(MORE * problem.budget))).token_s
    return {name: max(0.0, 1 - one / total) if total else 0.0 for name, one in seconds.items()}


def _one_less(problem: Problem) -> float | None:
    if problem.budget < GB:
        return None
    try:
        return solve(dataclasses.replace(problem, budget_bytes=problem.budget - GB)).tokens_per_s
    except ValueError:  # the pinned layers do not fit
        return None
