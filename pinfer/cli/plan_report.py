"""A solved plan as figures for JSON and as text: speed, memory to the byte, comparison, drawing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from pinfer.cli.console import console, printable
from pinfer.cli.plan_draw import draw
from pinfer.cli.plan_subject import Subject
from pinfer.placement import ModelShape
from pinfer.placement.baselines import dense_layers, dense_problem
from pinfer.placement.explain import Explanation, Rival, explain, rivals
from pinfer.placement.memory import fixed_items
from pinfer.placement.problem import Problem, evaluate
from pinfer.placement.simulate import Simulation, simulate
from pinfer.placement.solver import Solution, solve

NAMES = {
    "powerinfer": "PowerInfer's sort",
    "uniform": "the same share in each layer",
    "sparse_layers": "whole layers, sparse",
    "dense_layers": "whole layers, dense (llama.cpp)",
}


@dataclass(frozen=True)
class Report:
    """A problem, its solution and all that is said of it."""

    problem: Problem
    subject: Subject
    solution: Solution
    simulation: Simulation
    by_depth: dict[int, float]  # tokens/s with none, half and all of the context filled
    rivals: tuple[Rival, ...]  # the dense layer split comes last, and is always there
    unturned_tokens_per_s: float | None  # if down kept the file's type
    explanation: Explanation | None

    @classmethod
    def of(cls, problem: Problem, subject: Subject, compare: bool, explained: bool) -> Report:
        """Solve and compare. ValueError where nothing fits."""
        solution = solve(problem)
        by_depth = {
            filled: 1 / evaluate(dataclasses.replace(problem, filled=filled), solution.plan).total_s
            for filled in (0, problem.context // 2, problem.context)
        }
        unturned = None
        if compare and subject.unturned is not None:
            unturned = solve(dataclasses.replace(problem, shape=subject.unturned)).tokens_per_s
        explanation = explain(problem, solution) if explained else None
        compared = rivals(problem, solution, subject.dense) if compare else _dense(problem, solution, subject.dense)
        return cls(
            problem, subject, solution, simulate(problem, solution.plan), by_depth, compared, unturned, explanation
        )

    @property
    def title(self) -> str:
        return f"{self.problem.shape.name} on {self.problem.hardware.name}: {self.solution.tokens_per_s:.1f} tokens/s"

    @property
    def dense(self) -> float:
        """Tokens/s of the dense layer split."""
        return self.rivals[-1].tokens_per_s


def _dense(problem: Problem, solution: Solution, shape: ModelShape) -> tuple[Rival]:
    """The dense layer split alone."""
    own = dense_problem(problem, shape)
    plan = dense_layers(own)
    seconds = evaluate(own, plan).total_s
    return (Rival("dense_layers", seconds, own.memory(plan).gpu_bytes, seconds / solution.token_s - 1),)


def figures(report: Report) -> dict[str, Any]:
    """Plain data for JSON: the same as the text, with layers and timeline beside."""
    problem, solution, simulation = report.problem, report.solution, report.simulation
    return {
        "model": problem.shape.name,
        "hardware": dataclasses.asdict(problem.hardware),
        "rates": report.subject.said,
        "density": sum(float(one.sum()) for one in problem.rates) / sum(map(len, problem.rates)),
        "context": problem.context,
        "depth": problem.positions,
        "tokens_per_s": solution.tokens_per_s,
        "token_s": solution.token_s,
        "tokens_per_s_by_depth": {str(depth): speed for depth, speed in report.by_depth.items()},
        "tokens_per_s_with_down_as_in_file": report.unturned_tokens_per_s,
        "dense_split_tokens_per_s": report.dense,
        "speedup": solution.tokens_per_s / report.dense,
        "gap": solution.gap,
        "bound_s": solution.bound_s,
        "solve_seconds": solution.solve_seconds,
        "spread_s": simulation.spread_s,
        **{f"{lane}_busy": simulation.busy(lane) for lane in ("gpu", "cpu", "link")},
        "budget_bytes": problem.budget,
        "gpu_bytes": solution.memory.gpu_bytes,
        "cpu_bytes": solution.memory.cpu_bytes,
        "memory": {"gpu": dict(solution.memory.gpu), "cpu": dict(solution.memory.cpu)},
        "head": solution.plan.head,
        "baselines": {
            one.name: {"tokens_per_s": one.tokens_per_s, "gpu_bytes": one.gpu_bytes, "as_good": one.as_good}
            for one in report.rivals
        },
        "explanation": report.explanation and report.explanation.to_plain(),
        "layers": [
            {"attention": one.attention, "predictor": one.predictor, "hot": one.n_hot, "neurons": one.hot.numel()}
            | dataclasses.asdict(time)
            for one, time in zip(solution.plan.layers, simulation.time.layers, strict=True)
        ],
        "timeline": [dataclasses.asdict(span) for span in simulation.spans],
    }  # fmt: skip


def print_report(report: Report) -> None:
    """The report for a person."""
    out, problem, solution = console(), report.problem, report.solution
    for line in (*_setting(report), "", *_speed(report)):
        out.print(printable(line))
    out.print(_memory(report))
    out.print(_comparison(report))
    for bar in draw(problem, solution.plan, report.simulation.time.layers):
        out.print(bar, no_wrap=True, overflow="ignore")
    for line in report.explanation.lines(solution) if report.explanation else ():
        out.print(printable(line))


def _setting(report: Report) -> list[str]:
    problem, hardware = report.problem, report.problem.hardware
    return [
        f"{problem.shape.name} on {hardware.name}",
        f"GPU {hardware.gpu_bandwidth / 1e9:.4g} GB/s at {100 * hardware.gpu_efficiency:.3g} %, "
        f"CPU {hardware.cpu_bandwidth / 1e9:.4g} GB/s at {100 * hardware.cpu_efficiency:.3g} %, "
        f"hand-over {1e6 * hardware.sync_s:.3g} µs",
        f"rates {report.subject.said}",
        f"context {problem.context}, {problem.positions} positions filled",
    ]


def _speed(report: Report) -> Iterator[str]:
    solution, simulation = report.solution, report.simulation
    yield (
        f"{solution.tokens_per_s:.2f} tokens/s, {1e3 * solution.token_s:.2f} ms a token; "
        f"dense layer split {report.dense:.2f} tokens/s: {solution.tokens_per_s / report.dense:.1f}x"
    )
    yield "tokens/s by positions filled: " + ", ".join(f"{speed:.1f} at {at}" for at, speed in report.by_depth.items())
    if (unturned := report.unturned_tokens_per_s) is not None:
        yield f"if down kept the file's type as rows, not Q8_0: {unturned:.2f} tokens/s (--down file)"
    yield (
        f"of a token the GPU works {100 * simulation.busy('gpu'):.0f} %, the CPU {100 * simulation.busy('cpu'):.0f} %, "
        f"copies and hand-overs take {100 * simulation.busy('link'):.0f} %; "
        f"tokens that name more or fewer neurons than the mean add {1e6 * simulation.spread_s:.1f} µs on average"
    )
    gap = math.ceil(1e5 * solution.gap) / 1e3
    yield f"no placement is more than {gap:.3f} % faster; solved in {solution.solve_seconds:.2f} s"
    problem = report.problem
    fixed, budget = sum(fixed_items(problem.shape, problem.context, problem.reserves).values()), problem.budget
    if budget <= fixed:
        yield (
            f"the GPU stays unused: its context, graph and activations take {fixed / 1e9:.3f} GB before any weight, "
            f"and the budget is {budget / 1e9:.3f} GB"
        )


def _memory(report: Report) -> Table:
    """To the byte."""
    memory, table = report.solution.memory, Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("memory")
    for title in ("GPU bytes", "CPU bytes"):
        table.add_column(title, justify="right")
    for name in dict.fromkeys((*memory.gpu, *memory.cpu)):
        table.add_row(name, *(f"{items.get(name, 0):,}" for items in (memory.gpu, memory.cpu)))
    table.add_section()
    table.add_row("all", f"{memory.gpu_bytes:,}", f"{memory.cpu_bytes:,}")
    table.add_row("budget", f"{report.problem.budget:,}", "")
    return table


def _comparison(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("placement")
    for title in ("tokens/s", "of this plan", "GPU bytes"):
        table.add_column(title, justify="right")
    ours = report.solution.tokens_per_s
    table.add_row("this plan", f"{ours:.2f}", "", f"{report.solution.memory.gpu_bytes:,}")
    for one in report.rivals:
        verdict = "as good" if one.as_good else f"{'FASTER, ' if one.slower < 0 else ''}{100 / (1 + one.slower):.1f} %"
        table.add_row(NAMES[one.name], f"{one.tokens_per_s:.2f}", verdict, f"{one.gpu_bytes:,}")
    return table
