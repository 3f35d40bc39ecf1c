"""pinfer eval: what a sparse run loses against the same model dense, on a text that neither has seen."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pinfer.benchmark.environment import environment
from pinfer.cli import options
from pinfer.cli.console import emit_json, note, read_prompt
from pinfer.cli.evaluate_table import print_summary
from pinfer.cli.generate import (
    ActivationOption,
    BackendOption,
    ColdFraction,
    DeviceOption,
    GpuLayers,
    GpuMemory,
    MethodOption,
    PlanFile,
    PrecisionOption,
    PredictorPath,
    PredictorRank,
    Recall,
    Sparsity,
    Threads,
)
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.generate import peak_rss_bytes
from pinfer.engine.load import what_to_run
from pinfer.engine.mapped import fingerprint
from pinfer.engine.text import EVALUATION_TEXT
from pinfer.quality import (
    Window,
    WindowScores,
    check_writable,
    evaluate,
    figures,
    records,
    sliding_windows,
    spread,
    summarise,
    truly_active,
    write_records,
)

Text = Annotated[
    str | None,
    typer.Option("-f", "--text", "--file", help="UTF-8 text, - is standard input; the shipped one if left out."),
]
WindowLength = Annotated[int, typer.Option("--window", help="Tokens that the model reads at once.")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Tokens that a window scores, those before are context; all if left out.")
]
WindowCount = Annotated[
    int | None, typer.Option("--windows", help="Windows to take, evenly from all over the text; all if left out.")
]
Output = Annotated[
    str | None, typer.Option("-o", "--output", help="Write every figure there, by layer and window, as JSON Lines.")
]

PROGRESS_S = 5.0  # between two remarks on the time left
NOT_OF_AN_EVALUATION = ("model", "method", "context", "sampling", "record")  # named elsewhere, or without effect


@dataclasses.dataclass(frozen=True)
class _Text:
    """What is evaluated on: a name for it, the SHA-256 of its bytes, and its windows."""

    name: str
    sha256: str
    n_tokens: int
    windows: list[Window]


def evaluate_command(
    model: options.Model = None,
    text: Text = None,
    window: WindowLength = 512,
    stride: Stride = None,
    windows: WindowCount = None,
    method: MethodOption = "auto",
    sparsity: Sparsity = None,
    predictor_rank: PredictorRank = 128,
    recall: Recall = 0.99,
    predictor_path: PredictorPath = None,
    cold_fraction: ColdFraction = 0.0,
    gpu_layers: GpuLayers = None,
    gpu_memory_gb: GpuMemory = None,
    plan: PlanFile = None,
    device: DeviceOption = "auto",
    activation: ActivationOption = None,
    threads: Threads = None,
    backend: BackendOption = "auto",
    precision: PrecisionOption = "auto",
    output: Output = None,
    json: options.Json = False,
) -> None:
    """Measure perplexity, distance from dense, and what the predictor catches, on a text."""
    run = RunConfig(
        model=model,
        activation=activation,
        threads=threads,
        backend=backend,
        precision=precision,
        method=method,
        sparsity=sparsity,
        cold_fraction=cold_fraction,
        predictor_rank=predictor_rank,
        recall=recall,
        predictor_path=predictor_path,
        device="cpu" if cold_fraction and device == "auto" else device,
        plan=plan,
        gpu_layers=gpu_layers,
        gpu_memory_gb=gpu_memory_gb,
    )
    stride = window if stride is None else stride
    if output is not None:
        check_writable(Path(output))
    content = read_prompt(None, str(EVALUATION_TEXT) if text is None else text)
    assert content is not None  # a file was named
    started = time.perf_counter()
    run, dense, sparse = _engines(run)
    passage = _passage(dense, text, content, (window, stride, windows))
    for remark in (sparse or dense).notes:
        note(remark)
    with dense.computing():
        scores = list(_with_progress(dense, sparse, passage.windows))
    summary = summarise(scores)
    about = _about(run, dense, passage) | {"window_tokens": window, "stride_tokens": stride}
    if output is not None:
        write_records(Path(output), about | {"environment": environment()}, records(summary, scores))
    if json:
        spent = {"elapsed_s": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        emit_json(about | figures(summary) | spent)
    else:
        print_summary(summary, about)


def _engines(run: RunConfig) -> tuple[RunConfig, Engine, Engine | None]:
    """The run with its method resolved, the model dense on the CPU, and the run's own unless that is the same.

    A dense run that asks for a GPU is placed itself, and has nothing beside it.
    """
    on_cpu = dataclasses.replace(run.densely(), device="cpu", gpu_layers=None, gpu_memory_gb=None)
    dense = load_engine(on_cpu, note)
    run = dataclasses.replace(run, method=what_to_run(run, dense.config, dense.file)[0])
    if run.method != "dense" or run.cold_fraction:  # `load_engine` refuses a cold fraction of a dense run
        return run, dense, load_engine(run, note)
    asks_for_gpu = any(asked is not None for asked in (run.plan, run.gpu_layers, run.gpu_memory_gb))
    return run, load_engine(run, note) if asks_for_gpu else dense, None


def _passage(engine: Engine, name: str | None, content: str, sizes: tuple[int, int, int | None]) -> _Text:
    """The windows of a text. sizes: window, stride and how many; ValueError for sizes that it or the model cannot take."""
    window, stride, count = sizes
    limit = engine.config.context_length
    if window > limit:
        raise ValueError(f"--window {window} does not fit the model's context of {limit}")
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(content, add_bos=False)
    found = sliding_windows(ids, window, stride, tokenizer.bos_id if tokenizer.add_bos else None)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return _Text(EVALUATION_TEXT.name if name is None else name, digest, len(ids), spread(found, count))


def _with_progress(dense: Engine, sparse: Engine | None, windows: list[Window]) -> Iterator[WindowScores]:
    """`evaluate`, with a remark on the time left every PROGRESS_S."""
    started = told = time.perf_counter()
    for done, scores in enumerate(evaluate(dense.model, windows, None if sparse is None else sparse.model), 1):
        yield scores
        now = time.perf_counter()
        if done < len(windows) and (done == 1 or now - told > PROGRESS_S):
            told, left_s = now, round((now - started) / done * (len(windows) - done))
            note(f"window {done} of {len(windows)}, {left_s // 60}:{left_s % 60:02d} left")


def _about(run: RunConfig, engine: Engine, passage: _Text) -> dict[str, Any]:
    """What the figures are figures of."""
    config = {key: value for key, value in dataclasses.asdict(run).items() if key not in NOT_OF_AN_EVALUATION}
    return {
        "command": "eval",
        "model": engine.path.name if run.model is None else run.model,
        "model_fingerprint": fingerprint(engine.file, timed=False),
        "method": run.method,
        "config": config | {"threads": torch.get_num_threads(), "int8": engine.int8},
        "text": passage.name,
        "text_sha256": passage.sha256,
        "text_tokens": passage.n_tokens,
        "activation": engine.config.activation,
        "truly_active": None if run.method == "dense" else truly_active(engine.config.activation),
    }
