"""pinfer bench: tokens per second against dense and against llama.cpp, and how much of the memory's speed that is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.measure import Measurement
from rich.table import Table

from pinfer.benchmark import ContestantReport, Report, Settings, Spread, run_benchmark
from pinfer.benchmark.other_load import BUSY_CORES
from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.cli.generate import (
    ActivationOption,
    BackendOption,
    DeviceOption,
    GpuLayers,
    GpuMemory,
    MethodOption,
    PlanFile,
    PredictorPath,
    Sparsity,
    Threads,
)
from pinfer.config import RunConfig
from pinfer.engine.plans import GB, read_plan

PromptTokens = Annotated[int, typer.Option("-p", "--n-prompt", help="Tokens of the prompt that prefill reads.")]
DecodeTokens = Annotated[int, typer.Option("-n", "--n-gen", help="Tokens to decode, one at a time.")]
Rounds = Annotated[int, typer.Option("--rounds", help="Rounds that count, after a first one that does not.")]
Against = Annotated[Literal["llama.cpp"] | None, typer.Option("--against", help="Measure this as well.")]
LlamaPython = Annotated[
    str | None, typer.Option("--llama-python", help="Interpreter that has llama_cpp; this one if left out.")
]

UNBOUNDED = 1000  # columns: wider than any table here


def bench(
    model: options.Model = None,
    prompt_tokens: PromptTokens = 256,
    decode_tokens: DecodeTokens = 64,
    rounds: Rounds = 5,
    threads: Threads = None,
    method: MethodOption = "auto",
    sparsity: Sparsity = None,
    predictor_path: PredictorPath = None,
    gpu_layers: GpuLayers = None,
    gpu_memory_gb: GpuMemory = None,
    plan: PlanFile = None,
    device: DeviceOption = "auto",
    activation: ActivationOption = None,
    backend: BackendOption = "auto",
    against: Against = None,
    llama_python: LlamaPython = None,
    json: options.Json = False,
) -> None:
    """Measure prefill and decode: dense, the sparse method if there is one, and llama.cpp if asked for."""
    if llama_python is not None and against is None:
        raise ValueError("--llama-python has no meaning without --against llama.cpp")
    if plan is not None and gpu_memory_gb is None and (budget := read_plan(plan).budget_bytes) is not None:
        gpu_memory_gb = budget / GB  # of the dense layers that are measured beside it as well
    run = RunConfig(
        model=model,
        threads=threads,
        method=method,
        sparsity=sparsity,
        activation=activation,
        backend=backend,
        predictor_path=predictor_path,
        device=device,
        plan=plan,
        gpu_layers=gpu_layers,
        gpu_memory_gb=gpu_memory_gb,
    )
    interpreter = None if against is None else llama_python or sys.executable
    report = run_benchmark(Settings(run, prompt_tokens, decode_tokens, rounds, interpreter), note)
    if report.other_cores is not None and report.other_cores > BUSY_CORES:
        note(
            f"other programs kept {report.other_cores:.1f} cores busy meanwhile: these figures are not to be quoted, "
            "llama.cpp's least of all, whose threads wait for each other at every operation"
        )
    if json:
        emit_json(report.as_json())
    else:
        print_report(report)


def print_report(report: Report) -> None:
    """The conditions, then a line per contestant."""
    out = console()
    out.print(
        printable(
            f"{Path(report.model).name}: {size(report.dense_step_bytes)} of weights a dense step, "
            f"{report.threads} thread{'s' if report.threads > 1 else ''}, {report.environment['cpu'] or 'unknown processor'}"
        )
    )
    out.print(
        f"prompt of {report.prompt_tokens} tokens; {report.decode_tokens} decoded after {report.opening_tokens}; "
        f"medians (p20–p80) of {report.rounds} rounds; read bandwidth {_bandwidth(report)}"
    )
    table = _table(report)
    # Figures are never cut: where the window is narrower, the terminal wraps the lines.
    out.width = max(out.width, Measurement.get(out, out.options.update(width=UNBOUNDED), table).maximum)
    out.print(table)
    out.print(
        "GB/s: weights a step needs; where sparse, an estimate: the predictor or the gate, and density x the rest of the FFN"
    )


def _bandwidth(report: Report) -> str:
    spread = report.read_bandwidth_bytes_per_s
    return "–" if spread is None else f"{spread.p50 / 1e9:.1f} GB/s ({spread.p20 / 1e9:.1f}–{spread.p80 / 1e9:.1f})"


def _table(report: Report) -> Table:
    versus = f"× {report.baseline}"
    table = Table("", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in (
        "prefill\ntokens/s",
        versus,
        "decode\ntokens/s",
        versus,
        "GB/s",
        "of band-\nwidth",
        "density",
        "peak",
    ):
        table.add_column(title, justify="right")
    for contestant in report.contestants:
        table.add_row(contestant.name, *_cells(contestant))
    return table


def _cells(contestant: ContestantReport) -> list[str]:
    share = contestant.bandwidth_share
    return [
        _spread(contestant.prefill_tokens_per_s),
        _ratio(contestant.prefill_ratio),
        _spread(contestant.decode_tokens_per_s),
        _ratio(contestant.decode_ratio),
        f"{contestant.decode_bytes_per_s / 1e9:.2f}",
        "–" if share is None else f"{100 * share:.0f} %",
        f"{100 * contestant.density:.1f} %",
        size(contestant.peak_rss_bytes),
    ]


def _spread(rate: Spread) -> str:
    digits = 0 if rate.p50 >= 100 else 1 if rate.p50 >= 10 else 2
    return f"{rate.p50:.{digits}f}\n({rate.p20:.{digits}f}–{rate.p80:.{digits}f})"


def _ratio(ratio: Spread) -> str:
    return f"{ratio.p50:.2f}"
