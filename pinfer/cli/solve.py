"""pinfer solve: from a model and a text to predictors and densities with a known quality, in one resumable command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.cli.generate import (
    ActivationOption,
    Context,
    DeviceOption,
    GpuLayers,
    GpuMemory,
    MethodOption,
    Recall,
    Threads,
)
from pinfer.cli.plan import GpuBandwidth, GpuName, RamBandwidth
from pinfer.cli.plan_inputs import Finder, HardwareOptions
from pinfer.cli.profile import Output, TextFile, run_profile
from pinfer.cli.train import (
    DEFAULT_STEPS,
    Disk,
    DryRun,
    Job,
    Rank,
    Share,
    Steps,
    Tokens,
    TrainSparsity,
    predictor_figures,
    print_predictors,
    tell_estimates,
    training_settings,
)
from pinfer.config import DeviceName, RunConfig
from pinfer.engine.generate import peak_rss_bytes
from pinfer.engine.plans import assumed_hardware
from pinfer.engine.profile import DEFAULT_TOKENS
from pinfer.engine.text import Text, cut
from pinfer.quality import Target
from pinfer.solve.calibration import make_calibration
from pinfer.solve.estimate import estimate_stages
from pinfer.solve.placing import PlacePlan, check_layers, make_plan

DEFAULT_QUALITY = 0.99
Density = Annotated[float | None, typer.Option("--density", help="Mean share of neurons to compute, such as 0.3.")]
Quality = Annotated[
    float | None,
    typer.Option("--quality", help="Share of the dense perplexity to keep; 0.99 where no density is given."),
]


def solve_command(
    model: options.Model = None,
    output: Output = None,
    text: TextFile = None,
    tokens: Tokens = None,
    method: MethodOption = "auto",
    density: Density = None,
    quality: Quality = None,
    rank: Rank = None,
    share: Share = 0.05,
    steps: Steps = DEFAULT_STEPS,
    sparsity: TrainSparsity = None,
    recall: Recall = 0.99,
    disk_gb: Disk = 8.0,
    gpu_memory_gb: GpuMemory = None,
    gpu_layers: GpuLayers = None,
    gpu: GpuName = None,
    gpu_bandwidth: GpuBandwidth = None,
    ram_bandwidth: RamBandwidth = None,
    device: DeviceOption = "auto",
    ctx_size: Context = None,
    threads: Threads = None,
    activation: ActivationOption = None,
    dry_run: DryRun = False,
    json: options.Json = False,
) -> None:
    """Profile, make predictors, calibrate them and place neurons; goes on where an interrupted run stopped."""
    target = Target(density, DEFAULT_QUALITY if density is None and quality is None else quality)
    options_given = HardwareOptions(
        gpu=gpu, gpu_memory_gb=gpu_memory_gb, gpu_bandwidth=gpu_bandwidth, ram_bandwidth=ram_bandwidth
    )
    placing = place_plan(options_given, gpu_layers, device)
    run = RunConfig(
        model=model, context=ctx_size, threads=threads, activation=activation, method="dense", recall=recall
    )
    settings = training_settings(rank, share, steps, sparsity, disk_gb)
    job = Job.of(run, method, Text.read(text), tokens, settings, output)
    if placing is not None:
        check_layers(job.engine, placing)
    profiled = cut(job.engine.tokenizer, job.text, DEFAULT_TOKENS, job.engine.model.context)
    if dry_run:
        tell_estimates(job, estimate_stages(job.engine, job.plan, job.parts, profiled), json)
        return
    solved, started = job.directory(), time.perf_counter()
    note(f"{solved.path}: 1 of 4, profile")
    run_profile(job.engine, solved, job.text, profiled)
    note(f"{solved.path}: 2 of 4, {job.plan.method} predictors")
    predictors = job.predictors(solved)
    note(f"{solved.path}: 3 of 4, calibration")
    try:
        found = make_calibration(job.engine, solved, predictors, job.plan, job.parts, target, note)
    except KeyboardInterrupt:
        note(f"{solved.path} keeps what is measured: the same command goes on from there")
        raise
    placed = None
    if placing is None:
        note(f"{solved.path}: 4 of 4, placement, is left out: name --gpu-memory-gb to have neurons placed on a GPU")
    else:
        note(f"{solved.path}: 4 of 4, placement")
        placed = make_plan(job.engine, solved, predictors, job.plan, placing, note)
    figures = predictor_figures(solved) | {"calibration": found, "placement": placed}
    if json:
        emit_json(
            {"directory": str(solved.path), "model": str(job.engine.path)}
            | figures
            | {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        )
        return
    out = console()
    out.print(printable(f"{job.engine.path.name}: {job.plan.method} predictors on {job.text.name}"))
    print_predictors(figures)
    for line in _reached(found):
        out.print(line)
    if placed is not None:
        out.print(
            f"{100 * placed['hot_share']:.1f} % of the neurons on the GPU, {size(placed['gpu_bytes'])} in all: "
            f"{placed['tokens_per_s']:.1f} tokens/s predicted, at most {100 * placed['gap']:.2g} % below the best there is"
        )
    out.print(printable(f"{solved.path}: run with --predictor-path {solved.path}"))


def place_plan(asked: HardwareOptions, gpu_layers: int | None, device: DeviceName) -> PlacePlan | None:
    """What to place for; None where no GPU's memory is said and none is there. ValueError for what is out of range."""
    if gpu_layers is not None and gpu_layers < -1:
        raise ValueError(f"--target-gpu-layers must be at least -1 (all), not {gpu_layers}")
    finder = Finder(asked)
    budget = finder.budget_bytes()
    if budget is None and finder.card is not None:
        budget = finder.card.memory_bytes
    if budget is None and device in ("auto", "cuda") and finder.machine.gpu is not None:
        budget = finder.machine.gpu.memory_bytes
    if budget is None:
        if gpu_layers is not None:
            note(f"--target-gpu-layers {gpu_layers} places nothing without --gpu-memory-gb")
        return None
    try:
        hardware = finder.hardware()
    except ValueError as problem:
        hardware = assumed_hardware(budget)
        note(f"{problem}; speeds of an RTX 4090 beside {hardware.cpu_bandwidth / 1e9:g} GB/s of memory are assumed")
    return PlacePlan(hardware, budget, gpu_layers or 0, device == "emulated")


def _reached(found: Mapping[str, Any]) -> list[str]:
    """What calibration chose and what it costs, line by line."""
    chosen = found[found["allocation"]]
    other = "uniform" if found["allocation"] == "sensitivity" else "sensitivity"
    lines = [
        f"density {100 * found['density']:.1f} % over all layers, allotted by {found['allocation']}: "
        f"{chosen['added']:+.4f} ± {chosen['added_error']:.4f} nats a token, KL {chosen['kl']:.4f} "
        f"(by {other}: {found[other]['kl']:.4f}), on text that nothing was fitted to"
    ]
    if "allowed" in found:
        lines.append(
            f"quality {found['target']['quality']:g} allows {found['allowed']:.4f} nats; "
            f"with its uncertainty the loss is at most {found['bound']:.4f}"
        )
    return lines
