"""pinfer bench: its schedule, its figures, its table and JSON, and that no worker outlives it. No test asserts a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pinfer.benchmark import processes, run_benchmark
from pinfer.benchmark import run as benchmark
from pinfer.benchmark.environment import commit
from pinfer.benchmark.other_load import OtherLoad
from pinfer.benchmark.report import Spread, Turn, contestant_report
from pinfer.benchmark.run import BANDWIDTH, LLAMA_CPP, OPENING_TOKENS, Settings, schedule
from pinfer.benchmark.weight_bytes import StepBytes
from pinfer.cli.main import BAD_INPUT, FAILED, INTERRUPTED, OK, run
from pinfer.config import RunConfig
from pinfer.formats.gguf import GGUFFile
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

SMALL = ["--rounds", "2", "-n", "4", "-p", "8"]
ASKED = {"prompt": [1, 2, 3], "opening": [1, 2], "steps": 4}
DEADLINE_S = 60.0

# What llama_cpp_worker.py uses of llama-cpp-python, without a model behind it: logits favour token 7.
STUB = """
import ctypes, os, time
from types import SimpleNamespace

MODE = os.environ["STUB_MODE"]
if MODE == "missing":
    raise ImportError("No module named 'llama_cpp'")

__version__ = "0.0-stub"
VOCABULARY = 4096
_logits = (ctypes.c_float * VOCABULARY)()
_logits[7] = 1.0
_log = lambda text: print(text)
print("a library that prints to stdout")

def llama_log_callback(function): return function
def llama_log_set(callback, _):
    global _log
    _log = lambda text: callback(4, text.encode(), None)
def llama_backend_init(): pass
def llama_model_default_params(): return SimpleNamespace()
def llama_context_default_params(): return SimpleNamespace()
def llama_model_load_from_file(path, params):
    assert params.n_gpu_layers == 0
    if MODE == "refuse":
        _log("unknown model architecture: 'x'")
        return None
    return "model"
def llama_init_from_model(model, params):
    assert params.n_threads == params.n_threads_batch
    assert params.n_batch == params.n_ubatch == 512
    return "context"
def llama_model_get_vocab(model): return "vocab"
def llama_vocab_n_tokens(vocab): return VOCABULARY
def llama_print_system_info(): return b"STUB = 1"
def llama_get_memory(context): return []
def llama_memory_clear(memory, data):
    global position
    position = 0
def llama_batch_init(n, embd, n_seq_max):
    return SimpleNamespace(token=[0] * n, pos=[0] * n, n_seq_id=[0] * n, seq_id=[[9] for _ in range(n)], logits=[9] * n)
def llama_decode(context, batch):
    global position
    if MODE == "die":
        os.write(2, b"GGML_ASSERT(something) failed\\n")
        os._exit(3)
    if MODE == "hang":
        time.sleep(1000)
    assert batch.pos[: batch.n_tokens] == list(range(position, position + batch.n_tokens)), "positions follow on"
    assert all(ids == [0] for ids in batch.seq_id[: batch.n_tokens])
    if batch.n_tokens == 1 and position > 1:
        assert batch.token[0] == 7, "the best token goes on"
    position += batch.n_tokens
    return 0
def llama_get_logits_ith(context, i):
    assert i == -1
    return ctypes.cast(_logits, ctypes.POINTER(ctypes.c_float))
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Puts the stub where any interpreter finds it; returns one, for a mode of the stub."""
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(textwrap.dedent(STUB))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def choose(mode: str) -> str:
        monkeypatch.setenv("STUB_MODE", mode)
        return sys.executable

    return choose


@pytest.fixture
def fixed_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "read_bandwidth_bytes_per_s", lambda threads: 1e10)


@contextlib.contextmanager
def llama_cpp_worker(python: str, model: str = "m.gguf") -> Iterator[processes.Worker]:
    """The worker, loaded."""
    with processes.llama_cpp_worker(python, LLAMA_CPP, lambda _: None) as worker:
        worker.ask({"model": model, "threads": 1, "context": 64})
        yield worker


def test_rounds_go_forwards_and_backwards_with_the_bandwidth_between() -> None:
    assert schedule(["dense", "exact", LLAMA_CPP], 3) == [
        ("dense", "exact", BANDWIDTH, LLAMA_CPP),
        (LLAMA_CPP, BANDWIDTH, "exact", "dense"),
        ("dense", "exact", BANDWIDTH, LLAMA_CPP),
    ]
    assert schedule(["dense"], 2) == [("dense", BANDWIDTH), (BANDWIDTH, "dense")]


class FakeWorker:
    """Answers without a process; its speed is the number of the turn, which `played` records."""

    def __init__(self, name: str, played: list[str], speed: float) -> None:
        self._name, self._played, self._speed, self._turns = name, played, speed, 0
        self.pid = os.getpid()

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None: ...

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if "steps" not in request:
            self.loaded = request
            return {"threads": 3, "version": "fake", "method": "dense" if self._name == LLAMA_CPP else self._name}
        assert (len(request["prompt"]), len(request["opening"]), request["steps"]) == (8, OPENING_TOKENS, 4)
        self._played.append(self._name)
        self._turns += 1
        # The first turn is an outlier that must not be seen.
        speed = 1e9 if self._turns == 1 else self._turns * self._speed
        return {"prefill_tokens_per_s": speed, "decode_tokens_per_s": speed, "density": 0.5, "peak_rss_bytes": 7}


def test_turns_follow_the_schedule_and_the_warm_up_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[str] = []
    workers = {name: FakeWorker(name, played, speed) for name, speed in (("dense", 2), ("exact", 4), (LLAMA_CPP, 8))}
    bandwidths = iter((1e15, 100.0, 200.0))

    def bandwidth(threads: int) -> float:
        assert threads == 3
        played.append(BANDWIDTH)
        return next(bandwidths)

    monkeypatch.setattr(benchmark, "pinfer_worker", lambda name, tell: workers[name])
    monkeypatch.setattr(benchmark, "llama_cpp_worker", lambda python, name, tell: workers[name])
    monkeypatch.setattr(benchmark, "read_bandwidth_bytes_per_s", bandwidth)
    report = run_benchmark(Settings(RunConfig(), 8, 4, 2, sys.executable))
    assert played == [name for order in schedule(["dense", "exact", LLAMA_CPP], 3) for name in order]
    assert workers[LLAMA_CPP].loaded["threads"] == 3, "as many as pinfer chose"
    assert [contestant.name for contestant in report.contestants] == ["dense", "exact", LLAMA_CPP]
    dense, exact, llama = report.contestants
    assert dense.decode_tokens_per_s.p50 == pytest.approx(5)  # turns 2 and 3, twice their number
    assert (dense.decode_ratio.p50, exact.prefill_ratio.p50, llama.decode_ratio.p80) == (0.25, 0.5, 1)
    assert report.read_bandwidth_bytes_per_s == Spread.of([100.0, 200.0])
    assert dense.bandwidth_share == pytest.approx(5 * report.dense_step_bytes / 150)


def test_ratios_are_taken_round_by_round() -> None:
    ours, theirs = ([Turn(speed, speed, 1.0, 1) for speed in speeds] for speeds in ((10, 1, 6), (20, 1, 2)))
    about = {"version": "1"}
    report = contestant_report("x", about, ours, theirs, StepBytes(10, 20, 30), None)
    assert report.decode_ratio.p50 == 1  # of 0.5, 1 and 3; the ratio of the medians is 3
    assert report.decode_bytes_per_s == 6 * 60
    assert report.bandwidth_share is None


def test_sparse_methods_need_less() -> None:
    step = StepBytes(other=100, gate=10, rest=20)
    assert step.dense == step.needed("dense", 1.0) == 130
    assert step.needed("exact", 0.25) == 115
    assert step.needed("another", 0.5) == 115
    assert step.needed("another", 0.5, predictor=7) == 122


def test_step_bytes_count_the_matrices_that_a_step_reads(tmp_path: Path) -> None:
    untied = GGUFFile.open(write_tiny_llama(tmp_path / "l.gguf"))
    matrices = {name: info.nbytes for name, info in untied.tensors.items() if len(info.shape) == 2}
    step = StepBytes.of(untied)
    assert "output.weight" in matrices
    assert step.dense == sum(matrices.values()) - matrices["token_embd.weight"]
    assert step.gate == sum(size for name, size in matrices.items() if "ffn_gate" in name)
    assert step.rest == 2 * step.gate
    tied = GGUFFile.open(write_tiny_gemma3(tmp_path / "g.gguf"))
    assert not tied.has("output.weight")
    assert StepBytes.of(tied).dense == sum(info.nbytes for info in tied.tensors.values() if len(info.shape) == 2)


def test_json_against_llama_cpp(
    stub: Callable[[str], str], fixed_bandwidth: None, capsys: pytest.CaptureFixture[str]
) -> None:
    stub("fine")
    assert run(["bench", *SMALL, "-t", "1", "--against", "llama.cpp", "--json"]) == OK
    out, err = capsys.readouterr()
    assert "warm-up round" in err
    assert "round 2 of 2" in err
    figures = json.loads(out.splitlines()[-1])
    assert (figures["method"], figures["baseline"], figures["threads"]) == ("exact", LLAMA_CPP, 1)
    assert (figures["prompt_tokens"], figures["decode_tokens"], figures["rounds"]) == (8, 4, 2)
    assert figures["read_bandwidth_bytes_per_s"] == {"p20": 1e10, "p50": 1e10, "p80": 1e10}
    assert figures["other_cores"] is None or figures["other_cores"] >= 0
    assert figures["environment"]["llama.cpp"] == "STUB = 1"
    assert {"cpu", "torch", "pinfer", "commit"} <= figures["environment"].keys()
    dense, exact, llama = figures["contestants"]
    assert [dense["name"], exact["name"], llama["name"]] == ["dense", "exact", LLAMA_CPP]
    assert llama["version"] == "llama-cpp-python 0.0-stub"
    for contestant in figures["contestants"]:
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s", "prefill_ratio", "decode_ratio"):
            spread = contestant[key]
            assert 0 < spread["p20"] <= spread["p50"] <= spread["p80"]
        assert contestant["peak_rss_bytes"] > 1e6
        assert contestant["bandwidth_share"] == pytest.approx(contestant["decode_bytes_per_s"] / 1e10)
    assert dense["density"] == llama["density"] == 1 > exact["density"] > 0
    assert dense["step_bytes"] == figures["dense_step_bytes"] > exact["step_bytes"]
    assert llama["decode_ratio"]["p50"] == 1


def test_memory_of_a_placement_is_told(
    fixed_bandwidth: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = str(write_tiny_llama(tmp_path / "m.gguf"))
    flags = ["--method", "dense", "--device", "emulated", "--json"]
    held = []
    for layers in ("0", "1"):
        assert run(["bench", "-m", model, *SMALL, *flags, "--gpu-layers", layers]) == OK
        (dense,) = json.loads(capsys.readouterr().out.splitlines()[-1])["contestants"]
        held.append(dense["vram_bytes"])
    assert 0 == held[0] < held[1]


def test_the_table_without_llama_cpp(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "read_bandwidth_bytes_per_s", lambda threads: None)
    monkeypatch.setenv("COLUMNS", "40")
    model = str(write_tiny_llama(tmp_path / "m.gguf"))
    assert run(["bench", "-m", model, *SMALL, "--method", "dense"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("m.gguf: ")
    assert "prompt of 8 tokens; 4 decoded after 32; medians (p20–p80) of 2 rounds; read bandwidth –" in lines[1]
    assert "…" not in "".join(lines), "no figure is cut in a narrow window"
    (row,) = [line.split() for line in lines if line.strip().startswith("dense")]
    assert row[2] == row[4] == "1.00", "dense is its own baseline"
    assert row[6:9] == ["–", "100.0", "%"]
    assert [cell.count("–") for cell in " ".join(lines).split() if cell.startswith("(")][-2:] == [1, 1]


@pytest.mark.parametrize(
    ("flags", "limit"),
    [
        (["-p", "0"], "at least 1"),
        (["-n", "-3"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
        (["--rounds", "100000"], "at most 1000"),
        (["-p", "512"], "at most 511"),
        (["-n", "480"], "at most 479"),
        (["-t", "0"], "[1, 4096]"),
        (["--llama-python", "python3"], "--against"),
        (["--against", "llama.cpp", "--llama-python", "no/such/python"], "no/such/python"),
        (["--method", "gate_threshold"], "sparsity"),
        (["-m", "no-such.gguf"], "no-such.gguf"),
    ],
)
def test_bad_input_names_the_limit(flags: list[str], limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", *flags]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert limit in line


def test_an_interpreter_without_llama_cpp_is_named(
    stub: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    python = stub("missing")
    assert run(["bench", *SMALL, "--against", "llama.cpp", "--llama-python", python]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{python} -m pip install llama-cpp-python" in line


def test_a_model_that_llama_cpp_refuses_ends_in_its_words(
    stub: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    stub("refuse")
    assert run(["bench", *SMALL, "--against", "llama.cpp"]) == FAILED
    assert "unknown model architecture: 'x'" in capsys.readouterr().err.splitlines()[-1]


def test_a_worker_that_dies_is_reported_with_its_last_words(stub: Callable[[str], str]) -> None:
    with (
        pytest.raises(RuntimeError, match=r"llama.cpp worker ended with exit code 3: .*GGML_ASSERT"),
        llama_cpp_worker(stub("die")) as worker,
    ):
        worker.ask(ASKED)


def test_a_killed_worker_is_reported(stub: Callable[[str], str]) -> None:
    with llama_cpp_worker(stub("fine")) as worker:
        assert worker.ask(ASKED)["peak_rss_bytes"] > 1e6
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="killed by SIGKILL"):
            worker.ask(ASKED)


def test_a_program_that_is_no_python_is_reported() -> None:
    worker = processes.Worker("odd", ["echo", "hello"], lambda _: None, os.environ)
    with worker, pytest.raises(RuntimeError, match="does not keep to the protocol: b'hello"):
        worker.ask(ASKED)


def test_a_busy_worker_ends_with_its_standard_input(stub: Callable[[str], str]) -> None:
    with llama_cpp_worker(stub("hang")) as worker:
        pipe = worker._process.stdin
        assert pipe is not None
        pipe.write(json.dumps(ASKED).encode() + b"\n")
        pipe.close()
        assert worker._process.wait(DEADLINE_S) == 0


def test_leaving_kills_the_worker(stub: Callable[[str], str]) -> None:
    with pytest.raises(KeyboardInterrupt), llama_cpp_worker(stub("hang")) as worker:
        raise KeyboardInterrupt
    assert not alive(worker.pid)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(
    ("signal_number", "method", "count"), [(signal.SIGINT, "dense", 1), (signal.SIGKILL, "exact", 2)]
)
def test_no_worker_outlives_the_command(signal_number: signal.Signals, method: str, count: int, tmp_path: Path) -> None:
    model = str(write_tiny_llama(tmp_path / "m.gguf"))
    command = [sys.executable, "-m", "pinfer", "bench", "-m", model, "-p", "8", "-n", "4", "--rounds", "1000"]
    command += ["--method", method]
    environment = {**os.environ, "PINFER_NO_CORE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr is not None
        while b"round 1 " not in (line := process.stderr.readline()):
            assert line, "it ended before the first round"
        workers = children(process.pid)
        assert len(workers) == count
        process.send_signal(signal_number)
        assert process.wait(DEADLINE_S) == (INTERRUPTED if signal_number == signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_S
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status(pid: int) -> list[str]:
    """State, parent and the rest of /proc/PID/stat; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def alive(pid: int) -> bool:
    return bool(fields := status(pid)) and fields[0] not in "ZX"


def children(parent: int) -> list[int]:
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    return [pid for pid in pids if (fields := status(pid)) and int(fields[1]) == parent]


def test_llama_cpp_gets_no_openmp_settings_that_pinfer_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_PINFER_TEST", "passive")
    monkeypatch.setenv("PINFER_TEST", "kept")
    environment = processes._environment_as_started()
    assert "OMP_PINFER_TEST" not in environment
    assert environment["PINFER_TEST"] == "kept"
    assert environment["PATH"] == os.environ["PATH"]


def test_others_load_is_what_is_not_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/stat": "cpu 100 0 0 900 0 0 0 0 0 0\n", "/proc/5/stat": "5 (a b) c) S " + "0 " * 10 + "40 10 0"}
    clock = iter((0.0, 2.0))
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    monkeypatch.setattr("pinfer.benchmark.other_load.time.monotonic", lambda: next(clock))
    monkeypatch.setattr("pinfer.benchmark.other_load.os.times", lambda: SimpleNamespace(user=0.0, system=0.0))
    monkeypatch.setattr("pinfer.benchmark.other_load.os.sysconf", lambda _: 100)
    load = OtherLoad([5])
    files["/proc/stat"] = "cpu 300 100 0 900 0 0 0 100 0 0\n"  # 400 ticks more
    files["/proc/5/stat"] = "5 (a b) c) S " + "0 " * 10 + "140 110 0"  # 200 of them ours
    assert load.cores() == 1.0  # 2 s of others in 2 s


def test_a_busy_machine_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "read_bandwidth_bytes_per_s", lambda threads: None)
    monkeypatch.setattr(benchmark, "pinfer_worker", lambda name, tell: FakeWorker(name, [], 1.0))
    for cores, said in ((1.5, True), (0.0, False), (None, False)):
        monkeypatch.setattr(OtherLoad, "cores", lambda _, cores=cores: cores)
        assert run(["bench", *SMALL]) == OK
        assert ("kept 1.5 cores busy" in capsys.readouterr().err) == said


def test_the_commit_is_read_without_git(tmp_path: Path) -> None:
    assert commit(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit(tmp_path) is None
    (git / "packed-refs").write_text("# pack-refs\n" + "b" * 40 + " refs/heads/main\n")
    assert commit(tmp_path) == "b" * 40
    (git / "refs" / "heads" / "main").write_text("a" * 40 + "\n")
    assert commit(tmp_path) == "a" * 40
    (git / "HEAD").write_text("c" * 40 + "\n")
    assert commit(tmp_path) == "c" * 40
