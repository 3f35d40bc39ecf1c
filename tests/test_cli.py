"""The command line as a user meets it: figures, flags, and one clear line for every failure."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pinfer.cli.main import BAD_INPUT, FAILED, INTERRUPTED, OK, run
from pinfer.config import RunConfig, SamplingConfig
from pinfer.models import KVCache, Transformer
from pinfer.placement import Plan
from pinfer.placement.statistics import from_tensors
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

PINFER = [sys.executable, "-m", "pinfer"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("cli") / "m.gguf"))


def last_json(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


def test_generate_prints_text_and_the_figures_apart(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-m", model, "-p", "hello", "-n5", "--temp", "0", "--ignore-eos"]) == OK
    out, err = capsys.readouterr()
    assert out.startswith("hello")
    for part in ("prompt 1 tokens at", "decode 5 tokens at", "tokens/s", "density", "%", "peak memory"):
        assert part in err


def test_generate_json_holds_the_same_text(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "-m", model, "-p", "hello", "-n", "5", "--temp", "0", "--ignore-eos"]
    assert run([*arguments, "--no-display-prompt"]) == OK
    text = capsys.readouterr().out
    assert run([*arguments, "--json"]) == OK
    figures = last_json(capsys.readouterr().out)
    assert figures["text"] + "\n" == text
    assert len(figures["ids"]) == figures["decoded_tokens"] == 5
    assert figures["method"] == "exact"
    assert 0 < figures["density"] < 1
    assert figures["tokens_per_s"] > 0
    assert figures["prefill_tokens_per_s"] > 0
    assert figures["peak_rss_bytes"] > 1e6
    assert figures["finish_reason"] == "length"


def test_flags_reach_the_run(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(config: Any, _: Any) -> Any:
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr("pinfer.cli.generate.load_engine", spy)
    flags = (
        "-m m.gguf -p x -c 33 -t 3 --temp 0.5 --top-p 0.6 --top-k 7 --min-p 0.2 --repeat-penalty 1.5 --repeat-last-n 9 "
        "-s 4 --method gate_threshold --sparsity 0.25 --cold-fraction 0.75 --activation silu --backend reference --precision float32"
    )
    run(["generate", *flags.split()])
    sampling = SamplingConfig(0.5, 7, 0.6, 0.2, 1.5, 9, 4)
    assert seen[0] == RunConfig(
        model="m.gguf", context=33, activation="silu", threads=3, backend="reference", precision="float32",
        method="gate_threshold", sparsity=0.25, cold_fraction=0.75, sampling=sampling,
    )  # fmt: skip
    run(["generate", "-m", "m.gguf", "-p", "x", "--seed", "-1", "--top-k", "-1", "--repeat-last-n", "-1"])
    assert (seen[1].sampling.seed, seen[1].sampling.top_k, seen[1].sampling.repeat_last_n) == (None, 0, 2**31 - 1)


def test_special_and_bos_flags(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def ids(*flags: str) -> list[int]:
        assert run(["tokenize", "-m", model, "-p", "<|endoftext|>", "--json", *flags]) == OK
        return last_json(capsys.readouterr().out)["ids"]

    assert len(ids("--special")) == 1
    assert len(ids()) > 5


def test_no_bos_leaves_the_opening_token_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_tiny_gemma3(tmp_path / "g.gguf"))
    assert run(["tokenize", "-m", path, "-p", "the", "--json"]) == OK
    with_bos = last_json(capsys.readouterr().out)["ids"]
    assert run(["tokenize", "-m", path, "-p", "the", "--json", "--no-bos"]) == OK
    assert [2, *last_json(capsys.readouterr().out)["ids"]] == with_bos


def test_the_echo_is_the_prompt_to_the_letter(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "a\tb [b]:heart: \\"
    assert run(["generate", "-m", model, "-p", prompt, "-n", "1", "--color"]) == OK
    assert capsys.readouterr().out.startswith(prompt)


def test_a_fallback_is_said(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pinfer.engine.load.core_problem", lambda: "no compiler")
    assert run(["generate", "-m", model, "-p", "hi", "-n", "1"]) == OK
    assert "slower torch reference computes: no compiler" in capsys.readouterr().err


def test_a_requantised_down_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_tiny_llama(tmp_path / "q4.gguf", weight_type="Q4_0"))
    assert run(["generate", "-m", path, "-p", "hi", "-n", "1"]) == OK
    assert "down was requantised to Q8_0" in capsys.readouterr().err
    assert run(["generate", "-m", path, "-p", "hi", "-n", "1", "--method", "dense"]) == OK
    assert "requantised" not in capsys.readouterr().err


def test_triton_without_a_gpu_says_so(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "needs a GPU" in failing(["generate", "-m", model, "-p", "hi", "--backend", "triton"], capsys, FAILED)


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinfer.formats.tokenizer.Tokenizer.encode", lambda *_, **__: pytest.fail("tokenised"))
    line = failing(["generate", "-m", model, "-p", "x" * 100_000], capsys)
    assert "100000 bytes" in line


def test_a_bug_ends_in_one_line(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinfer.cli.generate.load_engine", lambda *_: {}["no"])
    line = failing(["generate", "-m", model, "-p", "hi"], capsys, FAILED)
    assert "KeyError" in line
    assert "PINFER_TRACEBACK" in line


def test_the_guides_flags_are_all_taken(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "-c 64 --gpu-layers 20 --n-gpu-layers 20 --gpu-memory-gb 16 --temp 0.7 --top-p 0.9 --top-k 40 --min-p 0.1 "
        "--repeat-penalty 1.1 --seed 3 -t 1 --numa none --color --ignore-eos"
    )
    assert run(["main", "-m", model, "-p", "hi", "-n", "3", *flags.split()]) == OK
    err = capsys.readouterr().err
    if not torch.cuda.is_available():
        assert "--gpu-layers 20, --gpu-memory-gb 16: torch finds no CUDA device here" in err
    assert run(["generate", "-m", model, "-p", "hi", "-n", "1", "-ngl", "99", "--vram-budget", "8"]) == OK


def test_prompts_come_from_files_and_pipes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("héllo", encoding="utf-8")
    arguments = ["tokenize", "-m", model, "--json"]
    assert run([*arguments, "-p", "héllo"]) == OK
    direct = last_json(capsys.readouterr().out)
    assert run([*arguments, "-f", str(file)]) == OK
    assert last_json(capsys.readouterr().out) == direct
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("héllo".encode())))
    assert run([*arguments, "-f", "-"]) == OK
    assert last_json(capsys.readouterr().out) == direct


def test_tokenize_prints_ids(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenize", "-m", model, "-p", "the hello"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert run(["tokenize", "-m", model, "-p", "the hello", "--json"]) == OK
    ids = last_json(capsys.readouterr().out)["ids"]
    assert [int(line.split()[0]) for line in lines] == ids


def test_inspect_shows_shape_and_memory(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", model]) == OK
    out = capsys.readouterr().out
    assert "2 layers of width 64, 96 FFN neurons (relu)" in out
    assert run(["inspect", "-m", model, "--json", "--tensors"]) == OK
    figures = last_json(capsys.readouterr().out)
    assert figures["layers"] == 2
    assert sum(figures["bytes_by_part"].values()) == figures["weights_bytes"]
    assert len(figures["bytes_by_layer"]) == 2
    assert figures["tensors"]["blk.1.ffn_down.weight"]["shape"] == [64, 96]


def test_inspect_spells_out_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(write_tiny_llama(path).read_bytes().replace(b"tiny llama", b"[b]\x1b[2J\x07ab"))
    assert run(["inspect", str(path)]) == OK
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[b]\\x1b[2J\\x07ab" in out


def test_interactive_reads_lines_and_keeps_the_conversation(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nagain\n"))
    arguments = ["generate", "-m", model, "-n", "3", "--ignore-eos", "--temp", "0", "-i"]
    assert run(arguments) == OK
    err = capsys.readouterr().err
    prompts = [int(line.split("prompt ")[1].split()[0]) for line in err.splitlines() if "prompt " in line]
    assert prompts == [1, 6], "the second reads its own 5 tokens and the last answer's last one, not everything again"


def test_interactive_outlives_a_full_context(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[KVCache] = []

    def new_cache(model: Transformer) -> KVCache:
        caches.append(KVCache(model.config, model.context))
        return caches[-1]

    monkeypatch.setattr(Transformer, "new_cache", new_cache)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n" * 6))
    assert run(["generate", "-m", model, "-i", "-n", "5", "-c", "16", "--ignore-eos"]) == OK
    err = capsys.readouterr().err
    assert "earlier lines are forgotten" in err
    assert err.count("density") == 6
    assert len(caches) == 1, "a GPU that is full has no room for a second"


def failing(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = BAD_INPUT) -> str:
    """Run, and return the one line it must print to stderr."""
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 1, err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--temp", "-1"], "-1"),
        (["--temp", "nan"], "nan"),
        (["--top-p", "5"], "5"),
        (["-n", "-2"], "-2"),
        (["-n", "many"], "many"),
        (["-c", "-5"], "-5"),
        (["-c", "100000"], "256"),
        (["-t", "0"], "threads"),
        (["--seed", "-2"], "seed"),
        (["--seed", "9" * 400], "seed"),
        (["--cold-fraction", "0.5", "--method", "dense"], "cold_fraction"),
        (["--sparsity", "1.5"], "sparsity"),
        (["--method", "gate_threshold"], "sparsity"),
        (["--method", "magic"], "magic"),
        (["--gpu-layers", "-3"], "-3"),
        (["--gpu-memory-gb", "-1"], "-1"),
        (["--predictor-path", "somewhere"], "somewhere"),
        (["--numa", "everywhere"], "everywhere"),
        (["--frobnicate"], "--frobnicate"),
        (["-r", ""], "empty"),
        (["-f", "also.txt"], "not both"),
        (["--json", "-i"], "--json"),
    ],
)
def test_bad_flags_end_in_one_line(
    model: str, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in failing(["generate", "-m", model, "-p", "hi", *arguments], capsys)


def test_a_missing_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no/such.gguf" in failing(["generate", "-m", "no/such.gguf", "-p", "hi"], capsys)


def test_no_control_characters_come_out_of_a_template(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a model's file says of itself must not reach the terminal as it is."""
    (tmp_path / "loud.jinja").write_text(r"{{ raise_exception('\x1b[2J gone \x9b1m') }}")
    assert run(["generate", "-m", model, "-p", "x", "--chat-template", str(tmp_path / "loud.jinja")]) == 2
    error = capsys.readouterr().err
    assert r"\x1b[2J gone \x9b1m" in error
    assert error.strip("\n").isprintable()


def test_a_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in failing(["generate", "-m", str(tmp_path), "-p", "hi"], capsys)


def test_a_truncated_file(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.gguf"
    short.write_bytes(Path(model).read_bytes()[:-5000])
    assert "short.gguf" in failing(["generate", "-m", str(short), "-p", "hi"], capsys)


def test_a_file_that_is_no_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("dear diary")
    assert "notes.txt" in failing(["inspect", str(text)], capsys)


def test_an_unsupported_architecture(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(Path(model).read_bytes().replace(b"llama", b"mamba"))
    line = failing(["generate", "-m", str(other), "-p", "hi"], capsys)
    assert "mamba" in line
    assert "gemma3" in line


def test_exact_on_a_gelu_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_gemma3(tmp_path / "g.gguf")
    assert "gelu_tanh" in failing(["generate", "-m", str(path), "-p", "hi", "--method", "exact"], capsys)


def test_a_prompt_longer_than_the_context(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = failing(["generate", "-m", model, "-p", "hello " * 50, "-c", "20"], capsys)
    assert "holds 20" in line
    assert "--ctx-size" in line


def test_zero_tokens_reads_the_prompt_and_succeeds(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "-m", model, "-p", "hello", "-n", "0"]) == OK
    err = capsys.readouterr().err
    assert "nothing generated" in err
    assert len(err.splitlines()) == 1


def test_no_prompt(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "-p TEXT" in failing(["generate", "-m", model], capsys)


def test_a_prompt_file_that_is_not_utf8(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in failing(["generate", "-m", model, "-f", str(file)], capsys)


def test_a_closed_stdin(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in failing(["generate", "-m", model, "-f", "-"], capsys)


def test_the_last_newline_of_a_file_is_not_meant(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("hello\n\n")
    assert run(["generate", "-m", model, "-f", str(file), "-n", "0", "--json"]) == OK
    assert last_json(capsys.readouterr().out)["prompt_tokens"] == 2


def test_unknown_and_missing_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert "dance" in failing(["dance"], capsys)
    assert run([]) == OK
    assert "generate" in capsys.readouterr().out
    assert run(["--version"]) == OK
    assert capsys.readouterr().out.startswith("pinfer ")


def test_a_runtime_failure_exits_1(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise MemoryError("no room\nfor 7 GB")

    monkeypatch.setattr("pinfer.cli.generate.load_engine", explode)
    assert "no room for 7 GB" in failing(["generate", "-m", model, "-p", "hi"], capsys, FAILED)


def endless(model: str, **streams: Any) -> subprocess.Popen[bytes]:
    arguments = ["generate", "-m", model, "-p", "hello", "-n", "-1", "--ignore-eos", "-c", "256"]
    return subprocess.Popen([*PINFER, *arguments], **streams)


def test_ctrl_c_exits_130_with_one_line(model: str) -> None:
    arguments = ["generate", "-m", model, "-i"]  # waits for a line, so that the signal finds it running
    process = subprocess.Popen(
        [*PINFER, *arguments, "-p", "hello", "-n", "3"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    assert b"decode" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == INTERRUPTED
    assert rest == b"pinfer: interrupted\n"


@pytest.mark.parametrize("milliseconds", [20, 150, 500])
def test_ctrl_c_while_loading_exits_130_with_one_line(milliseconds: int) -> None:
    """A signal while torch's C parts load, which swallow a KeyboardInterrupt."""
    script = (
        "import os, signal, threading\n"
        "from pinfer.__main__ import main\n"
        f"threading.Timer({milliseconds} / 1000, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "main()\n"
    )
    arguments = ["generate", "-p", "hello", "-n", "-1", "--ignore-eos"]
    process = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, timeout=120)
    assert process.returncode == INTERRUPTED
    assert process.stderr == b"pinfer: interrupted\n"


def test_a_pipe_closed_early_exits_1_with_one_line(model: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run([*PINFER, "inspect", model], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert process.returncode == FAILED
    assert process.stderr == b"pinfer: the reader of the output closed it\n"


def test_a_closed_stdout_exits_1_with_one_line(model: str) -> None:
    command = f"exec {' '.join(PINFER)} inspect {model} >&-"
    process = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, timeout=60)
    assert process.returncode == FAILED
    assert process.stderr == b"pinfer: failed: standard output is closed\n"


def test_a_closed_pipe_exits_1_with_one_line(model: str) -> None:
    reader, writer = os.pipe()
    process = endless(model, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert process.returncode == FAILED
    assert err == b"pinfer: the reader of the output closed it\n"


def test_text_streams_as_it_is_made(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece reaches the reader before the next one is computed."""

    class Recorder(io.StringIO):
        unflushed = 0
        flushes = 0

        def write(self, text: str) -> int:
            assert text == "\n" or self.unflushed == 0
            self.unflushed += 1
            return super().write(text)

        def flush(self) -> None:
            self.unflushed = 0
            self.flushes += 1

    monkeypatch.setattr(sys, "stdout", recorder := Recorder())
    arguments = ["-p", "hello", "-n", "20", "--ignore-eos", "--no-display-prompt"]
    assert run(["generate", "-m", model, *arguments]) == OK
    assert recorder.flushes > 5


def test_a_run_tells_of_its_placement(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "run.safetensors"
    flags = ["--device", "emulated", "-ngl", "1", "--stats", "--save-stats", str(saved), "--temp", "0", "-t", "1"]
    assert run(["generate", "-m", model, "-p", "hello", "-n", "6", "--ignore-eos", *flags]) == OK
    out, err = capsys.readouterr()
    assert "1 of 2 layers wholly on the emulated GPU" in err
    assert "hits" in err
    assert "are of 1 token each" in err
    statistics = from_tensors(load_file(saved), 2)
    assert int(statistics[0].tokens) == 1
    arguments = ["generate", "-m", model, "-p", "hello", "-n", "6", "--ignore-eos", "--json", *flags[:5], *flags[7:]]
    assert run(arguments) == OK
    found = json.loads(capsys.readouterr().out)
    assert found["text"] in out
    assert found["placement"]["gpu_layers"] == 1
    assert 0 < found["vram_bytes"] == found["placement"]["placed_bytes"] <= found["placement"]["estimated_bytes"]
    assert [layer["hot_hits"] for layer in found["layers"]] == [0.0, 1.0]
    assert [layer["recall"] for layer in found["layers"]] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (
            ["--device", "emulated", "--gpu-layers", "2", "--gpu-memory-gb", "0.0001"],
            "most that fits is --gpu-layers 0",
        ),
        (["--device", "nothing"], "nothing"),
        (["--device", "emulated", "--gpu-memory-gb", "-1"], "-1"),
        (["--device", "emulated", "--plan", "nowhere.json"], "nowhere.json"),
        (["--device", "cpu", "--plan", "nowhere.json"], "nowhere.json"),
        (["--stats", "--method", "dense"], "dense"),
    ],
)
def test_a_placement_that_cannot_be_is_one_line(
    model: str, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert named in failing(["generate", "-m", model, "-p", "hi", *flags], capsys)


def test_a_plan_of_another_model_is_refused_without_a_gpu_too(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(Plan.uniform(80, 16, 0.5).to_plain()))
    arguments = ["generate", "-m", model, "-p", "hi", "-n", "1", "--device", "cpu", "--plan", str(other)]
    assert "a plan of 80 layers for a model of 2" in failing(arguments, capsys)
