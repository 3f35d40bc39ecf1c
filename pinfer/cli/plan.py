"""pinfer plan: which neurons go on the GPU, what that takes and what it brings, for this machine or a named one."""

from __future__ import annotations

import dataclasses
import json as json_format
from pathlib import Path
from typing import Annotated, Any

import typer

from pinfer.cli import options
from pinfer.cli.console import emit_json, note
from pinfer.cli.generate import MethodOption
from pinfer.cli.plan_guide import show_guide
from pinfer.cli.plan_inputs import Finder, HardwareOptions, check_for_guide
from pinfer.cli.plan_report import Report, figures, print_report
from pinfer.cli.plan_subject import SubjectOptions, find_subject
from pinfer.engine.load import DEFAULT_CONTEXT
from pinfer.files import write_atomically
from pinfer.placement.guide import rows as guide_rows
from pinfer.placement.problem import Problem
from pinfer.placement.published import Down

PredictorPath = Annotated[
    str | None, typer.Option("--predictor-path", help="Directory of pinfer solve or profile, with its statistics.")
]
Shape = Annotated[str | None, typer.Option("--shape", help="A published model instead of a file, such as llama-2-70b.")]
Type = Annotated[str | None, typer.Option("--type", help="Its weights' type or mix; q4_k_m if left out.")]
DownOption = Annotated[
    Down | None,
    typer.Option(
        "--down", help="Its down matrices: rows, Q8_0 as the sparse path holds them (default), or as in the file."
    ),
]
Skew = Annotated[
    str | None,
    typer.Option(
        "--skew",
        help="How unevenly neurons fire: relu-llama-70b, opt-30b, swiglu-70b, uniform, "
        "or the share of neurons that hold 80 % of activations.",
    ),
]
Density = Annotated[float | None, typer.Option("--density", help="Mean share of neurons that fire on a token.")]
FromRun = Annotated[
    str | None,
    typer.Option("--from-run", help="Statistics gathered while serving (safetensors, or a solved directory)."),
]
PredictorGb = Annotated[float | None, typer.Option("--predictor-gb", help="Bytes of all predictors, GB.")]
PredictorRank = Annotated[int | None, typer.Option("--predictor-rank", help="Rank of low_rank; 256 if left out.")]
OverPrediction = Annotated[
    float | None, typer.Option("--over-prediction", help="Neurons named to neurons that fire; 1.3, or 1 with --ideal.")
]
GpuName = Annotated[
    str | None, typer.Option("--gpu", help="A card by name, such as rtx4090; this machine's if left out.")
]
GpuMemory = Annotated[
    float | None,
    typer.Option("--gpu-memory-gb", "--vram", "--vram-budget", help="GPU memory to use, GB; all if left out."),
]
GpuBandwidth = Annotated[float | None, typer.Option("--gpu-bandwidth", help="Of the GPU's memory, GB/s.")]
Ram = Annotated[str | None, typer.Option("--ram", help="Kind of memory: ddr4-3200, ddr5-5600, epyc8, epyc12, …")]
RamBandwidth = Annotated[float | None, typer.Option("--ram-bandwidth", help="Of the machine's memory, GB/s.")]
Pcie = Annotated[float | None, typer.Option("--pcie-bandwidth", help="Of copies from and to pinned memory, GB/s.")]
SyncUs = Annotated[float | None, typer.Option("--sync-us", help="A hand-over between the devices and back, µs.")]
GpuEfficiency = Annotated[
    float | None, typer.Option("--gpu-efficiency", help="Of its bandwidth; 0.85, 1 with --ideal.")
]
CpuEfficiency = Annotated[
    float | None, typer.Option("--cpu-efficiency", help="Of its bandwidth; 0.75, 1 with --ideal.")
]
Context = Annotated[
    int | None,
    typer.Option(
        "-c", "--ctx-size",
        help="Positions to reserve keys and values for; 4096, or the model's limit if lower; 0: the limit.",
    ),
]  # fmt: skip
Depth = Annotated[
    int | None, typer.Option("--depth", help="Positions filled when a token is decoded; half the context if left out.")
]
GpuLayers = Annotated[
    int | None,
    typer.Option(
        "-ngl", "--gpu-layers", "--n-gpu-layers", "--target-gpu-layers",
        help="So many of the last layers wholly on the GPU, neurons of the others split; -1: all.",
    ),
]  # fmt: skip
Ideal = Annotated[bool, typer.Option("--ideal", help="Full bandwidth, a 30 µs hand-over and no over-prediction.")]
Explain = Annotated[bool, typer.Option("--explain", help="Say what limits, and what one more GB would bring.")]
Compare = Annotated[
    bool, typer.Option("--compare/--no-compare", help="Beside PowerInfer's sort and simpler placements.")
]
Output = Annotated[str | None, typer.Option("-o", "--output", help="Write the plan to this JSON file.")]
Plot = Annotated[str | None, typer.Option("--plot", help="Draw it into this PNG file.")]
Guide = Annotated[
    bool,
    typer.Option(
        "--guide",
        help="The tables of PowerInfer's guide beside what is possible with memory of 80 GB/s, --ram or --ram-bandwidth.",
    ),
]


def plan_command(
    model: options.Model = None,
    predictor_path: PredictorPath = None,
    shape: Shape = None,
    type: Type = None,
    down: DownOption = None,
    skew: Skew = None,
    density: Density = None,
    from_run: FromRun = None,
    method: MethodOption = "auto",
    predictor_gb: PredictorGb = None,
    predictor_rank: PredictorRank = None,
    over_prediction: OverPrediction = None,
    gpu: GpuName = None,
    gpu_memory_gb: GpuMemory = None,
    gpu_bandwidth: GpuBandwidth = None,
    ram: Ram = None,
    ram_bandwidth: RamBandwidth = None,
    pcie_bandwidth: Pcie = None,
    sync_us: SyncUs = None,
    gpu_efficiency: GpuEfficiency = None,
    cpu_efficiency: CpuEfficiency = None,
    ctx_size: Context = None,
    depth: Depth = None,
    gpu_layers: GpuLayers = None,
    ideal: Ideal = False,
    explain: Explain = False,
    compare: Compare = True,
    output: Output = None,
    plot: Plot = None,
    guide: Guide = False,
    json: options.Json = False,
) -> None:
    """Place a model's neurons on GPU and CPU, and predict its speed; no weights are read."""
    asked = HardwareOptions(
        gpu=gpu, gpu_memory_gb=gpu_memory_gb, gpu_bandwidth=gpu_bandwidth, ram=ram, ram_bandwidth=ram_bandwidth,
        pcie_bandwidth=pcie_bandwidth, sync_us=sync_us, gpu_efficiency=gpu_efficiency, cpu_efficiency=cpu_efficiency,
        ideal=ideal,
    )  # fmt: skip
    wanted = SubjectOptions(
        model=model, predictor_path=predictor_path, shape=shape, type=type, down=down, skew=skew, density=density,
        from_run=from_run, method=method, predictor_gb=predictor_gb, predictor_rank=predictor_rank,
        over_prediction=over_prediction,
    )  # fmt: skip
    finder = Finder(asked)
    if guide:
        others = {**vars(wanted), "method": None if method == "auto" else method, "ctx_size": ctx_size,
                  "depth": depth, "gpu_layers": gpu_layers, "output": output, "plot": plot}  # fmt: skip
        check_for_guide(asked, others)
        show_guide(list(guide_rows(finder.guide_bandwidth(), asked.reach)), json)
        return
    if gpu_layers is not None and gpu_layers < -1:
        raise ValueError(f"--gpu-layers must be at least -1 (all), not {gpu_layers}")
    hardware, budget = finder.hardware(), finder.budget_bytes()
    subject = find_subject(wanted, asked.reach.over_prediction)
    context = _context(ctx_size, subject.context)
    problem = Problem(subject.shape, subject.rates, hardware, context, budget, _filled(context, depth), gpu_layers or 0)
    report = Report.of(problem, subject, compare, explain)
    found = figures(report)
    if output is not None:
        plan = dataclasses.replace(report.solution.plan, figures=summary(found))
        write_atomically(Path(output), json_format.dumps(plan.to_plain(), indent=1, allow_nan=False).encode())
        note(f"written: {output}")
    if plot is not None:
        _plot(report, plot)
    if json:
        emit_json(found)
    else:
        print_report(report)


def _context(asked: int | None, limit: int) -> int:
    """Positions to reserve; ValueError outside the model's limit."""
    if asked is None:
        return min(DEFAULT_CONTEXT, limit)
    if not 0 <= asked <= limit:
        raise ValueError(f"--ctx-size must lie in [0, {limit}], the model's limit, not {asked}")
    return asked or limit


def _filled(context: int, depth: int | None) -> int:
    """Positions to plan for: a conversation that fills its context has half of it filled on the mean."""
    if depth is not None and not 0 <= depth <= context:
        raise ValueError(f"--depth must lie in [0, {context}], the context, not {depth}")
    return context // 2 if depth is None else depth


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What a plan's file says of how it was made."""
    left_out = ("layers", "timeline", "baselines", "explanation")
    return {name: value for name, value in found.items() if name not in left_out}


def _plot(report: Report, path: str) -> None:
    from pinfer.cli.plan_plots import plot

    try:
        png = plot(report.problem, report.solution.plan, report.simulation.time.layers, report.title)
    except ImportError as error:
        missing = (error.name or "matplotlib").partition(".")[0]
        note(f"no plot: {missing} is not installed (pip install 'pinfer[plots]')")
        return
    write_atomically(Path(path), png)
    note(f"drawn: {path}")
