"""The placement solver against simple rules: gap, time to solve and tokens/s, on a 70B model's shape and on real models.

    python -m experiments.placement
    python -m experiments.placement --gemma gemma.gguf --gemma-statistics gemma.pinfer

Synthetic: Llama-2-70B in Q4_K_M as the sparse path stores it, a rank-256 predictor, three published skews, with layers
that are alike and that differ (densities log-normal), an RTX 4090 beside 80 GB/s, a context of 4096 that is full. Real:
the shipped model with its solved directory, and Gemma-3-270M's statistics (`pinfer profile`) under shift_threshold at
half of its neurons; these are so small that a hand-over of 60 µs outweighs them, so they have the 5 µs of workers that
poll, no CUDA context, and budgets in shares of their own bytes. Times are the objective's, not measured. Prints a
markdown table and writes experiments/results/placement/<name>.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.environment import environment
from experiments.files import write_json
from pinfer.cli.plan_subject import Subject, SubjectOptions, find_subject, read_statistics
from pinfer.engine.shape import model_shape
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.placement.explain import rivals
from pinfer.placement.hardware import Hardware
from pinfer.placement.memory import Reserves, capacity
from pinfer.placement.named import DERATED, find_card, named_hardware
from pinfer.placement.problem import Problem
from pinfer.placement.published import predictor_shape, published_shape
from pinfer.placement.skew import measured_rates, published_rates
from pinfer.placement.solver import solve

HERE = Path(__file__).parent
MODEL, TYPE, CONTEXT, CPU_BANDWIDTH = "llama-2-70b", "q4_k_m", 4096, 80e9
# Of the neurons, those that fire; the predictor names DERATED.over_prediction times as many.
DENSITIES = {"relu-llama-70b": 0.1, "opt-30b": 0.1, "swiglu-70b": 0.4}
BUDGETS_GB = (8, 16, 24, 48)
SPREADS = (0.0, 0.5)
SHARES = (0.2, 0.4, 0.6, 0.8)  # of a real model's bytes
POLLING_SYNC_S, REAL_CONTEXT, GEMMA_DENSITY = 5e-6, 512, 0.5
SMALL_RESERVES = Reserves(context_bytes=0, graph_bytes=0, tokens=1, streamed=0)
HEADINGS = ("problem", "budget", "tokens/s", "gap", "solved in", "by", "PowerInfer's sort", "uniform", "whole sparse layers",
            "whole dense layers")  # fmt: skip


def card() -> Hardware:
    return named_hardware(find_card("RTX 4090"), CPU_BANDWIDTH, DERATED, "80 GB/s")


def synthetic() -> Iterator[tuple[str, Problem, Subject]]:
    """Every skew, layers alike or not, and budget."""
    shape = published_shape(MODEL, TYPE, predictor_shape("low_rank", MODEL))
    dense = published_shape(MODEL, TYPE, down="file")
    for spread in SPREADS:
        for skew, density in DENSITIES.items():
            named = min(1.0, density * DERATED.over_prediction)
            rates = published_rates(skew, named, len(shape.layers), shape.layers[0].n_neurons, spread=spread)
            said = f"{skew}, {'alike' if not spread else f'spread {spread:g}'}"
            subject = Subject(shape, dense, rates, said, CONTEXT)
            for budget in BUDGETS_GB:
                yield subject.said, Problem(shape, rates, card(), CONTEXT, budget * 10**9), subject


def real(args: argparse.Namespace) -> Iterator[tuple[str, Problem, Subject]]:
    """The shipped model, and Gemma where its file is given."""
    subjects = {"shipped model": find_subject(SubjectOptions(), DERATED.over_prediction)}
    if args.gemma:
        subjects["Gemma-3-270M"] = gemma(args.gemma, args.gemma_statistics)
    hardware = dataclasses.replace(card(), sync_s=POLLING_SYNC_S)
    for name, subject in subjects.items():
        problem = Problem(subject.shape, subject.rates, hardware, REAL_CONTEXT, 0, reserves=SMALL_RESERVES)
        everything = sum(
            layer.on("gpu").attention_bytes
            + layer.on("gpu").kv_bytes(REAL_CONTEXT)
            + layer.on("gpu").neuron_bytes * layer.n_neurons
            for layer in subject.shape.layers
        ) + subject.shape.head("gpu")
        fixed = -capacity(subject.shape, 0, REAL_CONTEXT, SMALL_RESERVES)
        for share in SHARES:
            budget = int((share * everything + fixed) * (1 + SMALL_RESERVES.margin))
            yield name, dataclasses.replace(problem, budget_bytes=budget), subject


def gemma(path: str, statistics: str) -> Subject:
    """The model under shift_threshold; the neurons it keeps are taken to be those that hold most contribution."""
    gguf = GGUFFile.open(path)
    config = model_config(gguf)
    rates = measured_rates(read_statistics(statistics), density=GEMMA_DENSITY)
    shape = model_shape(gguf, config, "shift_threshold")
    return Subject(shape, model_shape(gguf, config, "dense"), rates, "profiled", config.context_length)


def measure(name: str, problem: Problem, subject: Subject) -> dict[str, Any]:
    """One row: solved, and every baseline under the same objective and memory account."""
    found = solve(problem)
    others = {
        one.name: {
            "tokens_per_s": one.tokens_per_s,
            "gpu_bytes": one.gpu_bytes,
            "slower": one.slower,
            "as_good": one.as_good,
        }
        for one in rivals(problem, found, subject.dense)
    }
    figures = {key: value for key, value in found.figures.items() if key != "cpu_bytes"}
    kinds = {
        "whole": sum(one.attention == "gpu" and not one.is_split for one in found.plan.layers),
        "split": sum(one.is_split for one in found.plan.layers),
        "cpu": sum(one.attention == "cpu" and not one.is_split for one in found.plan.layers),
    }
    return {"problem": name, "budget_bytes": problem.budget, **figures, "layers": kinds, "baselines": others}


def line(row: dict[str, Any]) -> str:
    """A row of the table; of a baseline, how many times as fast the plan is (below 1: slower), unless that is within 1 %."""
    budget = row["budget_bytes"]
    others = []
    for one in row["baselines"].values():
        ratio = f"{1 + one['slower']:.2f}x"
        others.append(f"{one['tokens_per_s']:.2f} ({'as good' if one['as_good'] else ratio})")
    cells = [
        row["problem"],
        f"{budget / 1e9:g} GB" if budget >= 1e9 else f"{budget / 1e6:.1f} MB",
        f"{row['tokens_per_s']:.2f}",
        f"{row['gap']:.1e}",
        f"{row['solve_seconds']:.2f} s",
        row["method"],
        *others,
    ]
    return f"| {' | '.join(cells)} |"


def run(name: str, problems: Iterator[tuple[str, Problem, Subject]], output: Path) -> None:
    """Solve, print and write down."""
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    rows, hardware = [], None
    for said, problem, subject in problems:
        rows.append(measure(said, problem, subject))
        hardware = dataclasses.asdict(problem.hardware)
        print(line(rows[-1]), flush=True)
    write_json(output / f"{name}.json", {"hardware": hardware, "rows": rows, "environment": environment()})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gemma", help="its GGUF file")
    parser.add_argument("--gemma-statistics", help="directory of `pinfer profile`")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "placement", help="folder for the JSON")
    args = parser.parse_args(arguments)
    if bool(args.gemma) != bool(args.gemma_statistics):
        parser.error("--gemma and --gemma-statistics go together")
    try:
        run(MODEL, synthetic(), args.output)
        run("real", real(args), args.output)
    except (ValueError, OSError) as error:
        print(f"placement: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
