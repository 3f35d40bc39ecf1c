"""Profiles: right against a direct computation, the same after any interruption, and clear about bad input."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pinfer.cli import profile as command
from pinfer.cli import profile_plots, profile_report
from pinfer.cli.main import BAD_INPUT, INTERRUPTED, OK, run
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.manifest import MANIFEST
from pinfer.engine.measure import estimate_profile, measure_layer
from pinfer.engine.profile import FOLDER, Profile, Watcher, profile
from pinfer.engine.solved import ACTIVATIONS, Solved
from pinfer.engine.text import MIN_TOKENS, Text, cut
from pinfer.ffn import DenseFFN
from pinfer.kernels import norms
from pinfer.kernels.activation import hidden_of
from pinfer.kernels.ops import dequantize, quant_matmul
from pinfer.models import KVCache, LayerWalk
from pinfer.placement import accumulate
from pinfer.placement.accumulate import Accumulator, Magnitudes, holding
from pinfer.placement.statistics import (
    QUANTILES,
    LayerStatistics,
    from_tensors,
    hottest_first,
    share_holding,
    to_tensors,
)
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

TEXT = Text("test text", "".join(f"hello the {word} world, hello. " for word in range(300)))
TOKENS = 300
N_LAYERS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("profile") / "m.gguf", n_layers=N_LAYERS, weight_type="Q8_0")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT.content)
    return path


def load(path: Path | None, **settings: Any) -> Engine:
    return load_engine(RunConfig(model=None if path is None else str(path), method="dense", **settings))


def run_profile(engine: Engine, folder: Path, watcher: Watcher | None = None, text: Text = TEXT, n: int = TOKENS):
    sequences = cut(engine.tokenizer, text, n, engine.model.context)
    return profile(engine, Solved.open_or_create(folder, engine.file), text, sequences, watcher)


def listing(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, with its content."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def same(one: Profile, other: Profile) -> bool:
    pairs = zip(to_tensors(one.layers).items(), to_tensors(other.layers).items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# Statistics.


def direct(ffn: DenseFFN, inputs: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """A layer's statistics in plain float64 numpy over the inputs of every sequence, all tokens at once."""
    x = torch.cat([one[1:] for one in inputs]).double()
    gate = x @ dequantize(ffn.gate).double().T
    up = None if ffn.up is None else x @ dequantize(ffn.up).double().T
    acted = hidden_of(ffn.activation, gate, None)
    hidden = hidden_of(ffn.activation, gate, up)
    contribution = (hidden.abs() * dequantize(ffn.down).double().norm(dim=0)).numpy()
    size = np.abs((up.clamp(min=0) if ffn.activation == "drelu" else up).numpy())
    negative = gate.numpy() < 0
    fired = np.zeros(gate.shape[1], np.int64)
    for row, act in zip(contribution, acted.numpy(), strict=True):
        order = np.argsort(-row, kind="stable")
        needed = next(k for k in range(1, len(row) + 1) if row[order[:k]].sum() >= 0.8 * row.sum())
        fired[act.nonzero()[0] if "relu" in ffn.activation else order[:needed]] += 1
    half = len(x) // 2
    with np.errstate(invalid="ignore"):
        up_mean = np.stack([(size * side).sum(0) / side.sum(0) for side in (negative, ~negative)])
    return {
        "tokens": np.array([len(x)]),
        "fired": fired,
        "mass": contribution.sum(0),
        "first_half_mass": contribution[:half].sum(0),
        "up_mean": np.where(np.isnan(up_mean), size.mean(0), up_mean),
        "center": np.sort(acted.numpy(), axis=0)[(len(x) - 1) // 2],
        "input_quantiles": np.quantile(x.abs().numpy(), np.linspace(0, 1, QUANTILES), method="nearest"),
        "hidden_quantiles": np.quantile(hidden.abs().numpy(), np.linspace(0, 1, QUANTILES), method="nearest"),
    }


def check(found: LayerStatistics, expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        ours = getattr(found, name).double().numpy()
        if name == "fired":  # a neuron at the edge may fall on the other side in float32
            assert np.abs(ours - value).sum() <= max(2, 1e-3 * value.sum())
        else:
            tolerance = 2e-3 if "quantiles" in name else 1e-4
            np.testing.assert_allclose(ours, value, rtol=tolerance, atol=tolerance * np.abs(value).mean(), err_msg=name)


@pytest.mark.parametrize("activation", ["relu", "relu2", "drelu", "silu", "gelu_tanh"])
def test_statistics_are_those_of_a_direct_computation(tmp_path: Path, activation: str) -> None:
    if activation == "gelu_tanh":
        engine = load(write_tiny_gemma3(tmp_path / "m.gguf"))
    else:
        engine = load(write_tiny_llama(tmp_path / "m.gguf"), activation=activation)
    sequences = cut(engine.tokenizer, TEXT, TOKENS, 90)
    assert len(sequences) > 2
    inputs: list[list[torch.Tensor]] = [[] for _ in engine.model.blocks]
    with engine.computing():
        for ffn, seen in zip(engine.model.ffns(), inputs, strict=True):
            ffn.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        for tokens in sequences:
            engine.model(tokens, engine.model.new_cache())
        for ffn in engine.model.ffns():
            ffn._forward_pre_hooks.clear()
        walk = LayerWalk(engine.model, sequences)
        for ffn, seen in zip(engine.model.ffns(), inputs, strict=True):
            check(measure_layer(engine, walk), direct(ffn, seen))
    assert all(isinstance(ffn, DenseFFN) for ffn in engine.model.ffns())


def test_an_ungated_layer_has_no_up_to_average(generator: torch.Generator) -> None:
    gate = torch.randn(40, 7, generator=generator)
    found = accumulated(gate, None, "relu")
    assert torch.equal(found.up_mean, torch.ones(2, 7))
    assert torch.equal(found.fired, (gate > 0).sum(0))


def accumulated(gate: torch.Tensor, up: torch.Tensor | None, activation: str, chunk: int = 9) -> LayerStatistics:
    tokens, n = gate.shape
    counting = Accumulator(torch.ones(n), activation, tokens)
    for at in range(0, tokens, chunk):
        part = slice(at, at + chunk)
        ups = None if up is None else up[part]
        counting.add(gate[part, :3], gate[part], ups, hidden_of(activation, gate[part], ups))
    return counting.finish()


@pytest.mark.parametrize("chunk", [1, 7, 41])
def test_chunks_do_not_matter(generator: torch.Generator, chunk: int) -> None:
    gate, up = torch.randn(2, 41, 13, generator=generator)
    whole, parts = accumulated(gate, up, "silu", 41), accumulated(gate, up, "silu", chunk)
    for name, tensor in to_tensors((whole,)).items():
        torch.testing.assert_close(to_tensors((parts,))[name], tensor)


def test_a_neuron_of_one_sign_has_its_overall_mean_on_the_other(generator: torch.Generator) -> None:
    gate, up = torch.rand(20, 3, generator=generator) + 0.1, torch.randn(20, 3, generator=generator)
    torch.testing.assert_close(accumulated(gate, up, "silu").up_mean, up.abs().mean(0).expand(2, 3))


def test_medians_are_taken_of_tokens_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate, "CENTER_TOKENS", 5)
    gate = torch.arange(1.0, 42.0)[:, None]  # the tokens 1, 11, 21, 31, 41
    assert accumulated(gate, None, "relu").center == 21


def test_what_is_not_finite_is_refused() -> None:
    gate = torch.zeros(5, 2)
    gate[3, 1] = float("inf")
    with pytest.raises(ValueError, match="the activations are not finite"):
        accumulated(gate, None, "relu")
    with pytest.raises(ValueError, match="0 tokens have come, not the 3"):
        Accumulator(torch.ones(2), "relu", 3).finish()


def test_the_fewest_neurons_that_hold_a_share() -> None:
    contribution = torch.tensor([[1.0, 5, 0, 4], [0, 0, 0, 0], [1, 1, 1, 1], [0, 9, 0, 1]])
    assert holding(contribution, 0.8).tolist() == [
        [False, True, False, True],
        [False] * 4,
        [True] * 4,
        [False, True, False, False],
    ]


@pytest.mark.parametrize("weight_type", ["F32", "Q4_0", "Q8_0"])
def test_norms_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_type: str) -> None:
    monkeypatch.setattr(norms, "CHUNK_WEIGHTS", 96 * 5)  # 64 rows: chunks that do not divide them
    engine = load(write_tiny_llama(tmp_path / "m.gguf", weight_type=weight_type))
    down = engine.file.tensor("blk.1.ffn_down.weight")
    torch.testing.assert_close(norms.column_norms(down), dequantize(down).norm(dim=0))
    torch.testing.assert_close(norms.row_norms(down), dequantize(down).norm(dim=1))


def test_magnitudes_to_a_thousandth(generator: torch.Generator) -> None:
    values = torch.randn(5000, generator=generator) * torch.logspace(-20, 20, 5000)
    values[:600] = 0
    counts = Magnitudes()
    counts.add(values[:1234].view(2, -1))
    counts.add(values[1234:])
    expected = np.quantile(values.abs().numpy(), np.linspace(0, 1, QUANTILES), method="nearest")
    np.testing.assert_allclose(counts.quantiles().numpy(), expected, rtol=1e-3, atol=0)
    assert (counts.quantiles()[:12] == 0).all()


def test_shares_and_ranks_by_hand() -> None:
    assert share_holding(torch.tensor([1, 0, 8, 1]), 0.8) == 0.25
    assert share_holding(torch.tensor([1, 0, 8, 1]), 0.81) == 0.5
    assert share_holding(torch.zeros(3), 0.8) == 0
    assert hottest_first(torch.tensor([1.0, 3, 1, 2])).tolist() == [1, 3, 0, 2]


def test_convergence_is_what_both_halves_agree_on() -> None:
    layer = accumulated(torch.rand(30, 10), None, "relu")
    first = torch.tensor([9.0, 8, 1, 1, 1, 1, 1, 1, 1, 1])
    second = torch.tensor([9.0, 1, 8, 1, 1, 1, 1, 1, 1, 1])
    fields = {name.removeprefix("blk.0."): tensor for name, tensor in to_tensors((layer,)).items()}
    halves = {"first_half_mass": first.double(), "mass": (first + second).double()}
    assert LayerStatistics(**(fields | halves)).convergence == 0.5


def test_statistics_survive_their_file_and_are_checked() -> None:
    layers = tuple(accumulated(torch.rand(30, 10), None, "relu") for _ in range(2))
    tensors = to_tensors(layers)
    again = from_tensors(tensors, 2)
    assert all(torch.equal(tensor, to_tensors(again)[name]) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match=r"tensor blk.2.tokens is missing"):
        from_tensors(tensors, 3)
    with pytest.raises(ValueError, match=r"blk.1: mass is torch.float32 \[10\], expected torch.float64"):
        from_tensors(tensors | {"blk.1.mass": torch.ones(10)}, 2)


# The walk.


@pytest.mark.parametrize("family", [write_tiny_llama, write_tiny_gemma3])
def test_the_walk_is_the_plain_forward_with_one_layers_cache(tmp_path: Path, family: Any) -> None:
    engine = load(family(tmp_path / "m.gguf"))
    sequences = [torch.arange(3, 60), torch.arange(40, 43), torch.arange(100, 220)]
    with engine.computing():
        walk = LayerWalk(engine.model, sequences)
        caches = walk._cache.layers
        assert len(caches) == engine.config.n_layers
        assert len({cache.data_ptr() for cache in caches}) == 1
        while walk.layer < engine.config.n_layers:
            walk.advance()
        for tokens, residual in zip(sequences, walk.residuals, strict=True):
            expected = engine.model(tokens, KVCache(engine.config, len(tokens)))
            assert torch.equal(quant_matmul(engine.model.norm(residual), engine.model.head), expected)


# Texts.


def test_cutting_takes_from_all_over(model: Path) -> None:
    engine = load(model)
    ids = engine.tokenizer.encode(TEXT.content, add_bos=False)
    sequences = cut(engine.tokenizer, TEXT, 1000, 256)
    assert 990 <= sum(map(len, sequences)) <= 1010
    assert max(map(len, sequences)) <= 256
    assert sequences[0].tolist() == ids[: len(sequences[0])]
    assert sequences[-1][0] == ids[(len(ids) // len(sequences)) * (len(sequences) - 1)]
    assert sum(map(len, cut(engine.tokenizer, TEXT, 10**9, 256))) > 0.99 * len(ids)


def test_a_long_text_is_thinned_before_it_is_tokenised(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(model).tokenizer
    long = Text("long", "".join(f"{number:07} " for number in range(100_000)))
    assert Text("short", "abc").thinned(100) == "abc"
    spans = long.thinned(40_000).split("\n")
    assert [len(span) for span in spans] == [20_000, 20_000]
    assert long.content.find(spans[1]) == 400_000
    encode, seen = tokenizer.encode, list[int]()
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text, **options: seen.append(len(text)) or encode(text, **options)
    )
    assert 990 <= sum(map(len, cut(tokenizer, long, 1000, 256))) <= 1010
    assert seen[0] < 33_000


def test_cutting_opens_with_bos(tmp_path: Path) -> None:
    tokenizer = load(write_tiny_gemma3(tmp_path / "m.gguf")).tokenizer
    assert {int(tokens[0]) for tokens in cut(tokenizer, TEXT, 500, 100)} == {tokenizer.bos_id}


# Interruptions.


class Recorder(Watcher):
    """Notes what it is told, and interrupts after so many layers or sequences of this run."""

    def __init__(self, layers: int = 99, sequences: int = 999) -> None:
        self.layers_left, self.sequences_left = layers, sequences
        self.began_after, self.notes = -1, list[str]()

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        self.began_after = layers_done

    def sequence(self) -> None:
        self.sequences_left -= 1
        if not self.sequences_left:
            raise KeyboardInterrupt

    def layer(self, number: int, found: LayerStatistics) -> None:
        self.layers_left -= 1
        if not self.layers_left:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> Profile:
    return run_profile(load(model), tmp_path / "whole")


@pytest.mark.parametrize("layers", range(1, N_LAYERS + 1))
def test_an_interrupted_profile_goes_on(model: Path, tmp_path: Path, whole: Profile, layers: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_profile(load(model), tmp_path / "m", Recorder(layers=layers))
    watcher = Recorder()
    again = run_profile(load(model), tmp_path / "m", watcher)
    assert watcher.began_after == layers
    assert watcher.notes == [f"going on after layer {layers - 1} of an interrupted run"]
    assert same(again, whole)
    assert listing(tmp_path / "m") == listing(tmp_path / "whole")


def test_interrupted_within_a_layer(model: Path, tmp_path: Path, whole: Profile) -> None:
    n_sequences = whole.settings["sequences"]
    with pytest.raises(KeyboardInterrupt):
        run_profile(load(model), tmp_path / "m", Recorder(sequences=n_sequences + 1))
    watcher = Recorder()
    assert same(run_profile(load(model), tmp_path / "m", watcher), whole)
    assert watcher.began_after == 1


def test_threads_do_not_matter(model: Path, tmp_path: Path) -> None:
    one, two = (run_profile(load(model, threads=n), tmp_path / str(n)) for n in (1, 2))
    assert same(one, two)


def test_other_settings_or_another_text_start_anew(model: Path, tmp_path: Path, whole: Profile) -> None:
    others: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"n": TOKENS + 100}),
        ({}, {"text": Text("other", TEXT.content.replace("world", "earth"))}),
        ({"activation": "silu"}, {}),
        ({"precision": "float32"}, {}),
    ]
    for number, (settings, arguments) in enumerate(others):
        folder = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):
            run_profile(load(model, **settings), folder, Recorder(layers=2), **arguments)
        watcher = Recorder()
        assert same(run_profile(load(model), folder, watcher), whole)
        assert watcher.began_after == 0
        assert "starting anew" in watcher.notes[0]
        assert "other settings, another text" in watcher.notes[0]


@pytest.mark.parametrize("damaged", ["layer-000.safetensors", "residuals-001.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("kind", ["truncated", "flipped", "gone"])
def test_a_damaged_checkpoint_is_not_read(model: Path, tmp_path: Path, whole: Profile, damaged: str, kind: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_profile(load(model), tmp_path / "m", Recorder(layers=2))
    path = tmp_path / "m" / FOLDER / damaged
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + (b"" if kind == "truncated" else b"\0" + content[middle + 1 :]))
    watcher = Recorder()
    assert same(run_profile(load(model), tmp_path / "m", watcher), whole)
    assert watcher.began_after == 0
    assert listing(tmp_path / "m") == listing(tmp_path / "whole")


def test_a_finished_profile_is_not_made_again(model: Path, tmp_path: Path, whole: Profile) -> None:
    watcher = Recorder()
    assert same(run_profile(load(model), tmp_path / "whole", watcher), whole)
    assert watcher.began_after == -1
    assert "holds this profile already" in watcher.notes[0]
    run_profile(load(model), tmp_path / "whole", watcher, n=TOKENS + 100)
    assert "to be replaced" in watcher.notes[1]
    assert Solved.open(tmp_path / "whole").stages["profile"].settings["tokens"] > whole.settings["tokens"]


# Forks a process for each number given, which kills itself before its so many-th step that touches the disk.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import pinfer.cli.profile_plots
from pinfer.cli.main import run

def no_plots(_):
    raise ImportError(name="matplotlib")  # they take most of the time and write as other files do

pinfer.cli.profile_plots.draw = no_plots
left = -1

def deadly(function):
    def call(*arguments, **options):
        global left, steps
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

for module, names in ((os, ("fsync", "replace", "unlink")), (shutil, ("rmtree",)), (Path, ("unlink", "mkdir"))):
    for name in names:
        setattr(module, name, deadly(getattr(module, name)))
folder, model, text, *points = sys.argv[1:]
for point in points:
    child = os.fork()
    if child == 0:
        left = int(point)
        # A thread alone: OpenMP's do not survive a fork.
        os._exit(run(["profile", "-m", model, "-o", f"{folder}/{point}", "--text", text, "--tokens", "300", "-t", "1"]))
    print(point, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def killed(folder: Path, model: Path, text: Path, points: list[int]) -> dict[int, int]:
    """Profiles one after the other, each killed at its point; exit codes by point."""
    command = [sys.executable, "-c", KILLED, *map(str, (folder, model, text, *points))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return {int(point): int(code) for point, code in re.findall(r"^(\d+) (-?\d+)$", done.stdout, re.MULTILINE)}


def test_killed_anywhere_it_ends_the_same(model: Path, tmp_path: Path, text_file: Path) -> None:
    never = 9999
    seed = random.randrange(1000)
    points = sorted({*random.Random(seed).sample(range(1, 58), 5), 1, 40})
    codes = killed(tmp_path, model, text_file, [never, *points])
    assert codes[never] == OK
    died = [point for point in points if codes[point] == -signal.SIGKILL]
    assert {1, 40} <= set(died), (seed, codes)  # the last ones may lie after the end
    expected = listing(tmp_path / str(never))
    assert sorted(expected) == [ACTIVATIONS, MANIFEST, profile_report.REPORT]
    assert listing(tmp_path / "40") != expected
    # The same command again, and once more in the same folder: its point lies too far now.
    for point in points:
        (tmp_path / str(point)).mkdir(exist_ok=True)
        (tmp_path / str(point)).rename(tmp_path / f"{never + point}")
    again = killed(tmp_path, model, text_file, [never + point for point in points])
    assert set(again.values()) == {OK}, (seed, again)
    for point in points:
        assert listing(tmp_path / str(never + point)) == expected, (seed, point)


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "_Watcher", lambda _: Recorder(layers=1))
    assert run(["profile", "-m", str(model), "-o", str(tmp_path / "m"), "--tokens", "200"]) == INTERRUPTED
    assert "the same command goes on from there" in capsys.readouterr().err
    assert (tmp_path / "m" / FOLDER).is_dir()


# The command.


def test_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["profile", "--tokens", "600", "--json"]) == OK
    out, err = capsys.readouterr()
    figures = json.loads(out.splitlines()[-1])
    assert figures["directory"] == "pinfer-tiny-q8_0.pinfer"
    assert 0.03 < figures["density"] < 0.1
    assert len(figures["layer_convergence"]) == 6
    assert all(0.2 < share < 0.6 for share in figures["layer_hot_share"])
    assert [f"layer {number}, {number + 1} of 6" in err for number in range(6)] == [True] * 6
    assert "left" in err
    layers = from_tensors(Solved.open("pinfer-tiny-q8_0.pinfer").read_tensors(ACTIVATIONS), 6)
    assert [layer.density for layer in layers] == figures["layer_density"]
    report = Path("pinfer-tiny-q8_0.pinfer/report.html").read_text()
    assert "Profile of pinfer-tiny-q8_0.gguf" in report
    assert run(["profile", "--tokens", "600"]) == OK
    out, err = capsys.readouterr()
    assert "holds this profile already" in err
    assert f"density {100 * figures['density']:.1f} % over all layers" in out


def test_the_report_holds_its_plots(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run_profile(load(model), tmp_path / "m")
    files, problem = profile_report.write_report(tmp_path, "<m>.gguf", "a & b", done)
    assert problem is None
    assert [path.name for path in files] == ["curves.png", "heat.png", "convergence.png", "report.html"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in files[:3])
    page = files[3].read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "&lt;m&gt;.gguf" in page
    assert "a &amp; b" in page
    assert 'src="data:' in page
    assert "http" not in page  # nothing is loaded from elsewhere


def test_many_layers_have_a_colour_bar() -> None:
    pytest.importorskip("matplotlib")
    layers = tuple(accumulated(torch.rand(30, 7) - 0.5, None, "relu") for _ in range(33))
    assert all(png.startswith(b"\x89PNG") for png in profile_plots.draw(layers).values())
    single = (accumulated(torch.zeros(30, 3), None, "relu"),)  # nothing fires
    assert len(profile_plots.draw(single)) == 3


def test_without_matplotlib_the_figures_are_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["profile", "-m", str(model), "-o", str(tmp_path / "m"), "--tokens", "200"]) == OK
    assert "no plots: matplotlib is not installed (pip install 'pinfer[plots]')" in capsys.readouterr().err
    page = (tmp_path / "m" / "report.html").read_text()
    assert "<td>" in page
    assert "no plots: matplotlib" in page


def test_a_dry_run_writes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(model.parent.rglob("*"))
    arguments = ["profile", "-m", str(model), "--dry-run", "--tokens", "300"]
    assert run([*arguments, "--json"]) == OK
    figures = json.loads(capsys.readouterr().out)
    assert figures["layers"] == N_LAYERS
    assert figures["total_s"] >= N_LAYERS * figures["layer_s"] > 0
    assert figures["peak_rss_bytes"] > 50e6
    assert 290 <= figures["tokens"] <= 310
    assert run(arguments) == OK
    assert "Nothing was written." in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert sorted(model.parent.rglob("*")) == before


def test_an_estimate_leaves_the_model_as_it_was(model: Path, tmp_path: Path, whole: Profile) -> None:
    engine = load(model)
    estimate_profile(engine, cut(engine.tokenizer, TEXT, TOKENS, engine.model.context))
    assert same(run_profile(engine, tmp_path / "m"), whole)


def test_bad_input_gets_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 200)
    (tmp_path / "short.txt").write_text("hello")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "file").touch()
    cases = [
        (["--text", "latin.txt"], "latin.txt: not UTF-8 at byte 3"),
        (["--text", "short.txt"], "short.txt: too short a text: 64 tokens are needed, it has 1"),
        (["--text", "empty.txt"], "empty.txt: too short a text"),
        (["--text", "gone.txt"], "gone.txt: No such file"),
        (["--text", "."], "Is a directory"),
        (["--tokens", str(MIN_TOKENS - 1)], f"tokens must be at least {MIN_TOKENS}, not {MIN_TOKENS - 1}"),
        (["--tokens", "-5"], "tokens must be at least"),
        (["-o", "file"], "file: not a directory"),
        (["-o", "file/below"], "Not a directory"),
        (["-o", "."], "it has no pinfer.json but other files"),
        (["-o", "/proc/nowhere"], "/proc/nowhere"),
    ]
    before = listing(tmp_path)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for arguments, message in cases:
            assert run(["profile", "-m", str(model), *arguments]) == BAD_INPUT, arguments
            err = capsys.readouterr().err
            assert message in err, (arguments, err)
            assert len(err.splitlines()) == 1
    finally:
        os.chdir(here)
    assert listing(tmp_path) == before


def test_a_text_that_is_shorter_than_asked_for_is_said_so(
    model: Path, tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["profile", "-m", str(model), "--text", str(text_file), "--tokens", "99999", "--dry-run"]
    assert run(arguments) == OK
    assert re.search(
        r"text.txt has \d+ tokens for this model: all of them are used, not 99999", capsys.readouterr().err
    )


def test_a_model_that_computes_nonsense_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.gguf_files._random_matrix", lambda rng, rows, columns: np.full((rows, columns), np.nan))
    path = write_tiny_llama(tmp_path / "nan.gguf")
    assert run(["profile", "-m", str(path), "-o", str(tmp_path / "m")]) == BAD_INPUT
    assert "nan.gguf: layer 0: the activations are not finite" in capsys.readouterr().err
