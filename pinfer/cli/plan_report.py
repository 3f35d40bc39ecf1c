"""A solved plan as figures for JSON and as text: speed, memory to the byte, comparison, drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from pinfer.cli.console import console, printable
from pinfer.cli.plan_draw import draw
from pinfer.cli.plan_inputs import dense_rates
from pinfer.cli.plan_subject import Subject
from pinfer.placement.baselines import BASELINES, dense_layers
from pinfer.placement.plan import Plan
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
class Rival:
    """Another placement of the same model on the same machine; None where it does not fit."""

    plan: Plan | None
    tokens_per_s: float | None
    gpu_bytes: int | None


@dataclass(frozen=True)
class Report:
    """A problem, its solution and all that is said of it."""

    problem: Problem
    subject: Subject
    solution: Solution
    simulation: Simulation
    by_depth: dict[int, float]  # tokens/s with none, half and all of the context filled
    rivals: dict[str, Rival]  # the dense layer split is always there
    explanation: tuple[str, ...]

    @classmethod
    def of(cls, problem: Problem, subject: Subject, compare: bool, explain: bool) -> Report:
        """Solve and compare. ValueError where nothing fits."""
        solution = solve(problem)
        depths = (0, problem.context // 2, problem.context)
        by_depth = {
            one: 1 / evaluate(dataclasses.replace(problem, filled=one), solution.plan).total_s for one in depths
        }
        dense = dataclasses.replace(problem, shape=subject.dense, rates=dense_rates(subject.dense), gpu_layers=0)
        rivals = {name: _rival(problem, place) for name, place in BASELINES.items()} if compare else {}
        rivals["dense_layers"] = _rival(dense, dense_layers)
        said = ()
        return cls(problem, subject, solution, simulate(problem, solution.plan), by_depth, rivals, said)

    @property
    def title(self) -> str:
        return f"{self.problem.shape.name} on {self.problem.hardware.name}: {self.solution.tokens_per_s:.1f} tokens/s"

    @property
    def dense(self) -> float:
        """Tokens/s of the dense layer split."""
        found = self.rivals["dense_layers"].tokens_per_s
        assert found is not None  # with no layer on the GPU it always fits
        return found


def _rival(problem: Problem, place: Callable[[Problem], Plan | None]) -> Rival:
    plan = place(problem)
    if plan is None:
        return Rival(None, None, None)
    return Rival(plan, 1 / evaluate(problem, plan).total_s, problem.memory(plan).gpu_bytes)


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
            name: {"tokens_per_s": rival.tokens_per_s, "gpu_bytes": rival.gpu_bytes} for name, rival in report.rivals.items()
        },
        "explanation": list(report.explanation),
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
    for remark in report.explanation:
        out.print(printable(f"- {remark}"))


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


def _speed(report: Report) -> list[str]:
    solution, simulation = report.solution, report.simulation
    return [
        f"{solution.tokens_per_s:.1f} tokens/s, {1e3 * solution.token_s:.2f} ms a token, "
        f"{solution.tokens_per_s / report.dense:.1f}x the dense layer split's {report.dense:.2f}; "
        + ", ".join(f"{speed:.1f} at {depth} positions" for depth, speed in report.by_depth.items()),
        f"of a token the GPU works {100 * simulation.busy('gpu'):.0f} %, the CPU {100 * simulation.busy('cpu'):.0f} %, "
        f"hand-overs take {100 * simulation.busy('link'):.0f} %; tokens that name more and fewer neurons "
        f"than the mean add {1e6 * simulation.spread_s:.0f} µs",
        f"no placement is more than {100 * solution.gap:.3g} % faster (solved in {solution.solve_seconds:.2f} s)",
    ]


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
    for name, rival in report.rivals.items():
        if rival.tokens_per_s is None:
            table.add_row(NAMES[name], "does not fit", "", "")
        else:
            share = f"{100 * rival.tokens_per_s / ours:.1f} %"
            table.add_row(NAMES[name], f"{rival.tokens_per_s:.2f}", share, f"{rival.gpu_bytes:,}")
    return table
