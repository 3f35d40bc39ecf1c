"""Runs a benchmark: starts the contestants, gives each its turn in every round, and reports."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.benchmark.environment import environment
from pinfer.benchmark.other_load import OtherLoad
from pinfer.benchmark.processes import Worker, llama_cpp_worker, pinfer_worker
from pinfer.benchmark.report import Report, Spread, Turn, contestant_report
from pinfer.benchmark.weight_bytes import StepBytes
from pinfer.config import Method, RunConfig
from pinfer.engine import SHIPPED_MODEL
from pinfer.engine.load import what_to_run
from pinfer.engine.text import CALIBRATION_TEXT
from pinfer.formats import ModelFile, open_model
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.tokenizer import load_tokenizer
from pinfer.kernels.cpp import CoreError, core_problem
from pinfer.kernels.cpp.bandwidth import read_bandwidth

LLAMA_CPP = "llama.cpp"
BANDWIDTH = "read bandwidth"  # takes its turn like a contestant
OPENING_TOKENS = 32  # context that decoding starts from
MAX_ROUNDS = 1000
SETTLE_S = 0.05  # for the last contestant's threads to stop spinning
CHARACTERS_PER_TOKEN = 8  # more than any tokenizer gets out of English


@dataclass(frozen=True)
class Settings:
    """What to measure: a prompt of prompt_tokens, decode_tokens single-token steps, in each of `rounds` rounds.

    One more round comes first and does not count. llama_python is the interpreter that has
    llama_cpp; None leaves llama.cpp out. ValueError for numbers out of range.
    """

    run: RunConfig
    prompt_tokens: int = 256
    decode_tokens: int = 64
    rounds: int = 5
    llama_python: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("-p", self.prompt_tokens), ("-n", self.decode_tokens), ("--rounds", self.rounds)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.rounds > MAX_ROUNDS:
            raise ValueError(f"--rounds must be at most {MAX_ROUNDS}, not {self.rounds}")
        if self.llama_python is not None and shutil.which(self.llama_python) is None:
            raise ValueError(f"--llama-python {self.llama_python}: no such program")

    @property
    def context(self) -> int:
        """Positions that both measurements fit in, with the room for one more token that Generation asks for."""
        return max(self.prompt_tokens, OPENING_TOKENS + self.decode_tokens) + 1


@dataclass(frozen=True)
class _Subject:
    """The model under test, as far as the parent has to know it."""

    path: Path
    method: Method
    step: StepBytes
    tokens: list[int]  # of the prompt or the opening, whichever is longer


def schedule(contestants: Sequence[str], rounds: int) -> list[tuple[str, ...]]:
    """The order of turns in each round: forwards and backwards by turns, the bandwidth in the middle.

    What a noisy or warming machine does to the first of a round, it does to the last in the next.
    """
    order = list(contestants)
    order.insert((len(order) + 1) // 2, BANDWIDTH)
    return [tuple(reversed(order)) if round % 2 else tuple(order) for round in range(rounds)]


def run_benchmark(settings: Settings, tell: Callable[[str], None] = lambda _: None) -> Report:
    """Measure every contestant; `tell` gets remarks for the user. No process outlives the call.

    Raises ValueError for settings that the model or an interpreter cannot take, FileNotFoundError
    for the model, RuntimeError where a worker fails.
    """
    subject = _subject(settings)
    with ExitStack() as stack:
        workers, about = _start(settings, subject, stack, tell)
        others = OtherLoad([worker.pid for worker in workers.values()])
        turns, bandwidths = _play(settings, subject, workers, about["dense"]["threads"], tell)
        other_cores = others.cores()
    bandwidth = Spread.of(bandwidths) if bandwidths else None
    baseline = LLAMA_CPP if LLAMA_CPP in workers else "dense"
    contestants = [
        contestant_report(name, about[name], turns[name], turns[baseline], subject.step, bandwidth) for name in workers
    ]
    return Report(
        model=str(subject.path),
        method=subject.method,
        threads=about["dense"]["threads"],
        prompt_tokens=settings.prompt_tokens,
        opening_tokens=OPENING_TOKENS,
        decode_tokens=settings.decode_tokens,
        rounds=settings.rounds,
        dense_step_bytes=subject.step.dense,
        read_bandwidth_bytes_per_s=bandwidth,
        other_cores=other_cores,
        baseline=baseline,
        contestants=tuple(contestants),
        environment={**environment(), "llama.cpp": about.get(LLAMA_CPP, {}).get("system")},
    )


def _subject(settings: Settings) -> _Subject:
    run = settings.run
    path = SHIPPED_MODEL if run.model is None else Path(run.model)
    file = open_model(path)
    config = model_config(file)
    check_tensors(file, config)
    limits = {"-p": config.context_length - 1, "-n": config.context_length - 1 - OPENING_TOKENS}
    for name, value in (("-p", settings.prompt_tokens), ("-n", settings.decode_tokens)):
        if value > limits[name]:
            raise ValueError(
                f"{name} {value} does not fit the model's context of {config.context_length}: "
                f"at most {max(0, limits[name])}"
            )
    config = dataclasses.replace(config, activation=run.activation or config.activation)
    method, _ = what_to_run(run, config, file)
    return _Subject(path, method, StepBytes.of(file), _tokens(file, settings.context))


def _tokens(file: ModelFile, length: int) -> list[int]:
    """Ids of English text, the same for every contestant, repeated where it is too short."""
    text = CALIBRATION_TEXT.read_text(encoding="utf-8")
    start = text.index(" ", len(text) // 8)  # calibration reads the beginning of each quarter
    ids = load_tokenizer(file.metadata).encode(text[start : start + CHARACTERS_PER_TOKEN * length])
    return list(itertools.islice(itertools.cycle(ids), length))


def _start(
    settings: Settings, subject: _Subject, stack: ExitStack, tell: Callable[[str], None]
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """The contestants, loaded one after another, and what each says about itself.

    All run with as many threads as the dense one, whose engine may have chosen the number.
    """
    names: list[str] = list(dict.fromkeys(("dense", subject.method)))
    if settings.llama_python is not None:
        names.append(LLAMA_CPP)
    workers: dict[str, Worker] = {}
    about: dict[str, dict[str, Any]] = {}
    threads = settings.run.threads
    # llama.cpp second: whether it can run at all shows before a sparse method calibrates for long.
    for name in sorted(names, key=("dense", LLAMA_CPP, subject.method).index):
        if name == LLAMA_CPP:
            worker = llama_cpp_worker(settings.llama_python or "", name, tell)
        else:
            worker = pinfer_worker(name, tell)
        workers[name] = stack.enter_context(worker)
        about[name] = worker.ask(_load_request(settings, subject, name, threads))
        threads = about[name]["threads"]
    return {name: workers[name] for name in names}, about


def _load_request(settings: Settings, subject: _Subject, name: str, threads: int | None) -> dict[str, Any]:
    """The first message to a contestant: what to load, and how."""
    common = {"model": str(subject.path), "context": settings.context, "threads": threads}
    if name == LLAMA_CPP:
        return common
    run = settings.run.densely() if name == "dense" else settings.run
    return {"run": {**dataclasses.asdict(run), **common, "method": name}}


def _play(
    settings: Settings, subject: _Subject, workers: dict[str, Worker], threads: int, tell: Callable[[str], None]
) -> tuple[dict[str, list[Turn]], list[float]]:
    """Each contestant's turns of the rounds that count, and the bandwidths in bytes/s."""
    request = {
        "prompt": subject.tokens[: settings.prompt_tokens],
        "opening": subject.tokens[:OPENING_TOKENS],
        "steps": settings.decode_tokens,
    }
    turns: dict[str, list[Turn]] = {name: [] for name in workers}
    bandwidths: list[float] = []
    for number, order in enumerate(schedule(list(workers), settings.rounds + 1)):
        tell(f"round {number} of {settings.rounds}" if number else "warm-up round")
        for name in order:
            time.sleep(SETTLE_S)
            if name == BANDWIDTH:
                measured = read_bandwidth_bytes_per_s(threads)
                if number and measured is not None:
                    bandwidths.append(measured)
                continue
            turn = Turn(**workers[name].ask(request))
            if number:
                turns[name].append(turn)
    return turns, bandwidths


def read_bandwidth_bytes_per_s(threads: int) -> float | None:
    """What this machine reads from memory with so many threads; None where the C++ core is missing."""
    if core_problem():
        return None
    try:
        return read_bandwidth(threads)
    except CoreError:
        return None
