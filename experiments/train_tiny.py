"""Train, evaluate and export the tiny model that pinfer ships: `python -m experiments.train_tiny`.

One command goes from Debian packages to the GGUF file, its figures and its plots.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from experiments.environment import environment
from experiments.files import write_json, write_text
from experiments.tiny.corpus import (
    Corpus,
    Split,
    build_corpus,
    load_corpus,
    read_sources,
    sample_text,
    save_corpus,
    synthetic_splits,
)
from experiments.tiny.evaluate import Evaluation, evaluate, samples
from experiments.tiny.export import export_gguf, quantised_copy
from experiments.tiny.model import TinyConfig
from experiments.tiny.sources import SOURCES
from experiments.tiny.trainer import TrainConfig, Trainer

ROOT = Path(__file__).resolve().parent.parent
USER_CACHE = Path.home() / ".cache" / "pinfer"
VOCAB_SIZE = 4096
SAMPLE_CHARS = 60_000  # of calibration.txt and heldout.txt
CALIBRATION_DOMAINS = ("kjv", "python", "postgresql", "jargon")
# In the public domain, so that evaluation.txt is shipped without notices. Half the domains, half
# the characters: its pieces are those of heldout.txt.
EVALUATION_DOMAINS = ("kjv", "austen", "sqlite", "jargon", "devil")
EVALUATION_CHARS = SAMPLE_CHARS // 2
SMOKE_MODEL = TinyConfig(vocab_size=320, d_model=64, n_neurons=128, n_layers=2, n_heads=2, n_kv_heads=1, context=64)
SMOKE_TOKENS = 40_000


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the checked command line."""
    parser = Parser(prog="train_tiny", description="Train and export pinfer's tiny model.")
    add = parser.add_argument
    add("--tokens", type=int, default=10_000_000, help="training budget (default %(default)s)")
    add("--minutes", type=float, help="wall-clock cap; the schedule ends with it")
    add("--target-density", type=float, default=0.08, help="share of active neurons to aim at")
    add("--weight-span", type=float, default=10.0, help="per-neuron L1 weights 1/SPAN..SPAN")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2, help="torch threads (default %(default)s)")
    add("--resume", action="store_true", help="continue from the checkpoint in --work")
    add("--ablation", choices=["plain"], help="compare with a plain ReLU at the same budget")
    add("--smoke", action="store_true", help="the whole pipeline on invented text, in a minute")
    add("--no-compile", action="store_true", help="do without torch.compile (no C++ compiler)")
    add("--note", default="", help="what a reader of the results must know about this run")
    add("--cache", type=Path, default=USER_CACHE / "corpus", help="folder of the .deb packages")
    add("--work", type=Path, help="folder of tokens and checkpoint")
    add("--results", type=Path, help="folder of figures (default experiments/results/tiny)")
    add("--assets", type=Path, help="folder of the GGUF file (default pinfer/assets)")
    add("--data", type=Path, help="folder of heldout.txt (default experiments/data)")
    options = parser.parse_args(arguments)
    limits = (
        ("--tokens", options.tokens, options.tokens >= 1, "at least 1"),
        ("--minutes", options.minutes, (options.minutes or 1) > 0, "above 0"),
        ("--threads", options.threads, options.threads >= 1, "at least 1"),
        ("--target-density", options.target_density, 0 < options.target_density < 0.5, "in 0..0.5"),
        ("--weight-span", options.weight_span, options.weight_span >= 1, "at least 1"),
    )
    for name, value, valid, limit in limits:
        if not valid:
            parser.error(f"{name} is {value}, must be {limit}")
    return _fill_folders(options)


def _fill_folders(options: argparse.Namespace) -> argparse.Namespace:
    """Set the folders that were not given; a smoke run leaves the shipped files alone."""
    scratch = Path(tempfile.mkdtemp(prefix="pinfer-tiny-")) if options.smoke else None
    options.work = options.work or scratch or USER_CACHE / "tiny"
    options.results = options.results or scratch or ROOT / "experiments" / "results" / "tiny"
    options.assets = options.assets or scratch or ROOT / "pinfer" / "assets"
    options.data = options.data or scratch or ROOT / "experiments" / "data"
    return options


def prepare_corpus(options: argparse.Namespace) -> Corpus:
    """Return the corpus, building it once; also write the sample texts other code uses."""
    folder = options.work / "corpus"
    targets = {"calibration.txt": options.assets, "heldout.txt": options.data, "evaluation.txt": options.assets}
    if not folder.exists():
        splits = synthetic_splits(options.seed) if options.smoke else read_sources(options.cache)
        vocab_size = SMOKE_MODEL.vocab_size if options.smoke else VOCAB_SIZE
        options.work.mkdir(parents=True, exist_ok=True)
        save_corpus(build_corpus(splits, vocab_size), folder)
        for name, text in zip(targets, sample_texts(splits), strict=True):
            write_text(folder / name, text)
    for name, target in targets.items():
        write_text(target / name, (folder / name).read_text())
    return load_corpus(folder)


def sample_texts(splits: dict[str, Split]) -> tuple[str, str, str]:
    """Return calibration text (of training documents), held-out text and the part of it to ship, equal parts a domain."""

    def chosen(domains: tuple[str, ...]) -> list[Split]:
        return [splits[name] for name in domains if name in splits] or list(splits.values())

    return (
        sample_text([split.train for split in chosen(CALIBRATION_DOMAINS)], SAMPLE_CHARS),
        sample_text([split.heldout for split in splits.values()], SAMPLE_CHARS),
        sample_text([split.heldout for split in chosen(EVALUATION_DOMAINS)], EVALUATION_CHARS),
    )


def make_trainer(options: argparse.Namespace, corpus: Corpus) -> Trainer:
    """Return the trainer that the options describe."""
    config = TrainConfig(
        tokens=options.tokens,
        minutes=options.minutes,
        target_density=options.target_density,
        weight_span=options.weight_span,
        compile=not (options.no_compile or options.smoke),
        seed=options.seed,
    )
    model = TinyConfig(vocab_size=corpus.tokenizer.get_vocab_size())
    if options.smoke:
        config = replace(config, tokens=min(options.tokens, SMOKE_TOKENS), batch_tokens=512)
        model = replace(SMOKE_MODEL, vocab_size=model.vocab_size)
    return Trainer(model, config, corpus.train, options.work)


def run_record(trainer: Trainer, corpus: Corpus) -> dict[str, Any]:
    """Return what is needed to know under which conditions a run was made."""
    progress = trainer.progress
    return environment() | {
        "train_config": asdict(trainer.config),
        "model_config": asdict(trainer.model_config),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "corpus_tokens": corpus.train_tokens,
        "sources": {s.name: {"packages": s.packages, "licence": s.licence} for s in SOURCES},
    }


def report(trainer: Trainer, corpus: Corpus, options: argparse.Namespace) -> None:
    """Evaluate, export and write every result."""
    full = evaluate(trainer.model, corpus.heldout)
    path = options.assets / "pinfer-tiny-q8_0.gguf"
    export_gguf(trainer.model, corpus.tokenizer, path)
    quantised_model = quantised_copy(trainer.model)
    quantised = evaluate(quantised_model, corpus.heldout)
    record = run_record(trainer, corpus) | {
        "note": options.note,
        "fp32": full.summary(),
        "q8_0": quantised.summary(),
        "gguf_bytes": path.stat().st_size,
        "samples": samples(quantised_model, corpus.tokenizer),
    }
    write_json(options.results / "metrics.json", record)
    log = "".join(json.dumps(entry) + "\n" for entry in trainer.progress.log)
    write_text(options.results / "loss.jsonl", log)
    total = sum(quantised.tokens.values())
    frequencies = np.sort(quantised.counts, axis=1)[:, ::-1] / total
    write_json(options.results / "frequencies.json", np.round(frequencies, 5).tolist())
    draw_plots(trainer, quantised, options.results)
    print_summary("fp32", full)
    print_summary("Q8_0", quantised)
    print(f"wrote {path} ({path.stat().st_size:,} bytes) and {options.results}")


def draw_plots(trainer: Trainer, evaluation: Evaluation, folder: Path) -> None:
    """Draw the loss curve and the firing frequencies, if matplotlib (extra `train`) is there."""
    try:
        from experiments.tiny.plots import plot_frequencies, plot_losses
    except ImportError:
        print('no plots: matplotlib is missing, install "pinfer[train]"')
        return
    plot_losses(trainer.progress.log, folder / "loss.png")
    plot_frequencies(evaluation.counts, sum(evaluation.tokens.values()), folder / "frequencies.png")


def print_summary(label: str, evaluation: Evaluation) -> None:
    """Print perplexity and density, in total, by domain and by layer."""
    summary = evaluation.summary()
    print(f"{label}: perplexity {summary['perplexity']:.2f} density {summary['density']:.4f}")
    for name, value in summary["perplexity_by_domain"].items():
        print(f"  {name:12s} perplexity {value:.2f}")
    for index, layer in enumerate(summary["layers"]):
        print(
            f"  layer {index} density {layer['density']:.4f} "
            f"80 % of firings in {layer['share_for_80']:.3f} of neurons, dead {layer['dead']:.4f}"
        )


def run_ablation(options: argparse.Namespace, corpus: Corpus) -> None:
    """Train with and without the sparsity term from the same seed; write both results."""
    results = {}
    for label, sparsity in (("sparse", True), ("plain", False)):
        trainer = make_trainer(options, corpus)
        trainer.config = replace(trainer.config, sparsity=sparsity)
        trainer.folder = options.work / f"ablation-{label}"
        trainer.folder.mkdir(exist_ok=True)
        trainer.run()
        evaluation = evaluate(trainer.model, corpus.heldout)
        results[label] = run_record(trainer, corpus) | {"fp32": evaluation.summary()}
        print_summary(label, evaluation)
    write_json(options.results / "ablation.json", results)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    try:
        corpus = prepare_corpus(options)
        if options.ablation:
            run_ablation(options, corpus)
            return 0
        trainer = make_trainer(options, corpus)
        if options.resume:
            trainer.resume()
        trainer.run()
        report(trainer, corpus, options)
    except (FileNotFoundError, ValueError) as error:
        print(f"train_tiny: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
