"""pinfer train: predictors for a model, fitted to a text or trained on it, into a solved directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table

from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.cli.generate import ActivationOption, MethodOption, Recall, Threads
from pinfer.cli.profile import Output, TextFile
from pinfer.cli.progress import Told, duration, layers
from pinfer.config import Method, RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.fitting import FIT_SEQUENCE, STAGE
from pinfer.engine.generate import peak_rss_bytes
from pinfer.engine.solved import Solved
from pinfer.engine.text import Text, cut
from pinfer.engine.train import LayerResult, TrainSettings, Watcher, plan_of
from pinfer.predictors.training import FRONTIER, TrainingSettings
from pinfer.solve.estimate import StageEstimate, estimate_predictors
from pinfer.solve.parts import LEAST, Parts, deal
from pinfer.solve.predictors import PredictorPlan, make_predictors, with_rank

Tokens = Annotated[
    int | None, typer.Option("--tokens", help="Tokens of it, from all over; what the method wants if left out.")
]
Rank = Annotated[
    int | None, typer.Option("--predictor-rank", help="Rank of every layer, a multiple of 32, in place of the share's.")
]
Share = Annotated[
    float, typer.Option("--predictor-share", help="Bytes of trained predictors, as a share of the FFN's.")
]
Steps = Annotated[int, typer.Option("--steps", help="Steps of training a layer at most; it stops early.")]
TrainSparsity = Annotated[
    float | None, typer.Option("--sparsity", help="What low_rank counts as not active where no ReLU says so.")
]
Disk = Annotated[float, typer.Option("--disk-gb", help="GB on disk for the activations of one layer at a time.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure one layer, say what all will take, write nothing.")]

DEFAULT_STEPS = TrainingSettings().steps
TRAIN_TOKENS, CALIBRATION_TOKENS = 1 << 18, 1 << 14  # of the text, what is validated on included


@dataclasses.dataclass(frozen=True)
class Job:
    """What a solving command works on: a dense model, a text's sequences in parts, and how predictors come about."""

    engine: Engine
    text: Text
    parts: Parts
    plan: PredictorPlan
    output: str | None

    @classmethod
    def of(
        cls, run: RunConfig, method: Method, text: Text, tokens: int | None, training: TrainSettings, output: str | None
    ) -> Job:
        """ValueError for a method or settings that the model cannot take, or a text too short."""
        engine = load_engine(run, note)
        for remark in engine.notes:
            note(remark)
        plan = PredictorPlan.of(method, engine.config, run.recall, training)
        wanted = tokens or (CALIBRATION_TOKENS if plan.train is None else TRAIN_TOKENS)
        sequences = cut(engine.tokenizer, text, wanted, engine.model.context, FIT_SEQUENCE, LEAST)
        found = sum(map(len, sequences))
        if tokens is not None and found < 0.9 * tokens:
            note(f"{text.name} has {found} tokens for this model: all of them are used, not {tokens}")
        parts = deal(sequences, engine.config.n_layers)
        if plan.train is not None:
            plan.train.check(engine)
            plan_of(engine, parts.fit, plan.train)  # whether the disk budget holds enough tokens
        return cls(engine, text, parts, plan, output)

    def directory(self) -> Solved:
        """The solved directory, made where there is none."""
        default = f"{self.engine.path.name.removesuffix('.gguf')}.pinfer"
        return Solved.open_or_create(self.output or default, self.engine.file)

    def predictors(self, solved: Solved) -> Sequence[Any]:
        """Fit or train them, or take those that are there."""
        try:
            with layers() as progress:
                return make_predictors(self.engine, solved, self.plan, self.parts.fit, _Watcher(progress))
        except KeyboardInterrupt:
            note(f"{solved.path} keeps the stages and the steps of training that are done: the same command goes on")
            raise


class _Watcher(Told, Watcher):
    def ranks(self, ranks: Sequence[int]) -> None:
        self.note(f"ranks by layer: {', '.join(map(str, ranks))}")

    def measured(self, layer: int, step: int, weighted_recall: float) -> None:
        self.progress.within(f"step {step}: weighted recall {100 * weighted_recall:.1f} %")

    def layer(self, number: int, found: LayerResult) -> None:
        reach = found.trained.figures.reach
        text = f"rank {found.rank}, {100 * reach.weighted_recall:.1f} % weighted recall at {reach.named:.2f} named for each"
        self.progress.layer(number, f"{text} active one after {found.trained.figures.steps} steps")


def training_settings(
    rank: int | None, share: float, steps: int, sparsity: float | None, disk_gb: float
) -> TrainSettings:
    """From the command line's options. ValueError for those out of range."""
    if not 0 < disk_gb < 1e6:
        raise ValueError(f"--disk-gb must be above 0, not {disk_gb:g}")
    factors = dataclasses.replace(TrainingSettings(), steps=steps)
    settings = TrainSettings(factors=factors, ffn_share=share, sparsity=sparsity, disk_bytes=int(disk_gb * 1e9))
    return with_rank(settings, rank)


def train_command(
    model: options.Model = None,
    output: Output = None,
    text: TextFile = None,
    tokens: Tokens = None,
    method: MethodOption = "auto",
    rank: Rank = None,
    share: Share = 0.05,
    steps: Steps = DEFAULT_STEPS,
    sparsity: TrainSparsity = None,
    recall: Recall = 0.99,
    disk_gb: Disk = 8.0,
    threads: Threads = None,
    activation: ActivationOption = None,
    dry_run: DryRun = False,
    json: options.Json = False,
) -> None:
    """Make predictors over a text; goes on where an interrupted run stopped."""
    run = RunConfig(model=model, threads=threads, activation=activation, method="dense", recall=recall)
    settings = training_settings(rank, share, steps, sparsity, disk_gb)
    job = Job.of(run, method, Text.read(text), tokens, settings, output)
    if dry_run:
        tell_estimates(job, [estimate_predictors(job.engine, job.plan, job.parts.fit)], json)
        return
    solved, started = job.directory(), time.perf_counter()
    job.predictors(solved)
    figures = predictor_figures(solved)
    if json:
        emit_json(
            {"directory": str(solved.path), "model": str(job.engine.path)}
            | figures
            | {"seconds": time.perf_counter() - started, "peak_rss_bytes": peak_rss_bytes()}
        )
    else:
        console().print(printable(f"{job.engine.path.name}: {job.plan.method} predictors on {job.text.name}"))
        print_predictors(figures)
        console().print(printable(f"{solved.path}: run with --predictor-path {solved.path}"))


def tell_estimates(job: Job, stages: Sequence[StageEstimate], json: bool) -> None:
    """What a dry run found: a line a stage, and all together."""
    tokens = {name: sum(map(len, part)) for name, part in job.parts._asdict().items()}
    total = {
        "total_s": sum(one.total_s for one in stages),
        "peak_rss_bytes": max(one.peak_rss_bytes for one in stages),
        "disk_bytes": max(one.disk_bytes for one in stages),
    }
    if json:
        listed = [dataclasses.asdict(one) for one in stages]
        emit_json({"dry_run": True, "method": job.plan.method, "tokens": tokens, "stages": listed, **total})
        return
    for one in stages:
        print(
            f"{one.stage}: {duration(one.layer_s)} a layer, about {duration(one.total_s)} in all, "
            f"{size(one.peak_rss_bytes)} of memory at the peak, {size(one.disk_bytes)} of disk while it runs"
        )
    print(
        f"{job.plan.method} on {tokens['fit']} tokens to fit, {tokens['search']} to search and {tokens['validation']} "
        f"to validate on: about {duration(total['total_s'])}, {size(total['peak_rss_bytes'])} of memory. "
        "Nothing was written."
    )


def predictor_figures(solved: Solved) -> dict[str, Any]:
    """What the directory says of its predictors, without their parts."""
    stage = solved.stages[STAGE]
    layers_of = stage.figures["layers"]
    qualities = [one["quality"] for one in layers_of]
    return (
        {"method": stage.settings["method"], "tokens": stage.settings["tokens"]}
        | {name: value for name, value in stage.figures.items() if name != "layers"}
        | {"quality": qualities, "density": [one["density"] for one in layers_of]}
    )


def print_predictors(figures: Mapping[str, Any]) -> None:
    """A line a layer of what trained or fitted predictors reach on text held out from their fit."""
    if all(one is None for one in figures["quality"]):
        console().print("fitted for every sparsity: pinfer solve chooses one, or give --sparsity")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    trained = "frontier" in figures
    titles = ("layer", *(("rank",) if trained else ()), "active", "named", "recall")
    for title in (*titles, *(f"at {named:g}" for named in FRONTIER if trained)):
        table.add_column(title, justify="right")
    for layer, one in enumerate(figures["quality"]):
        cells = [f"{100 * one[name]:.1f}" for name in ("active", "density", "recall")]
        if trained:
            cells = [str(figures["rank"][layer]), *cells]
            cells += [f"{100 * reach['weighted_recall']:.2f}" for reach in figures["frontier"][layer]]
        table.add_row(str(layer), *cells)
    console().print(table)
    console().print("in %: neurons truly active, neurons named, the former's share that is")
    if trained:
        console().print("at 1.3: the share of Σ|h|·‖d‖ that is named where 1.3 neurons are named for each active one")
        share = figures["predictor_bytes"] / figures["ffn_bytes"]
        console().print(f"{size(figures['predictor_bytes'])} of predictors, {100 * share:.2f} % of the FFN's bytes")
