"""pinfer eval: a sparse run beside dense, its predictor held against every neuron, and what the command writes."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer import sparsify as S
from pinfer.cli.main import BAD_INPUT, OK
from pinfer.cli.main import run as cli
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.engine.text import CALIBRATION_TEXT, EVALUATION_TEXT
from pinfer.ffn import DenseFFN
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.kernels.activation import ACTIVATIONS
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.select_active.reference import listed
from pinfer.models import Transformer, build_model
from pinfer.placement import Plan
from pinfer.predictors import GateThreshold, Prediction, Predictor
from pinfer.quality import (
    NeuronCounts,
    NeuronObserver,
    Perplexity,
    evaluate,
    report,
    sliding_windows,
    summarise,
    write_records,
)
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

HELD_OUT = Path(__file__).parent.parent / "experiments" / "data" / "heldout.txt"
TEXT = " ".join(f"hello the world {i} wells of the {7 * i % 11} hells." for i in range(12))
BOS = 263
TOKENS = torch.randint(0, 260, (75,), generator=torch.Generator().manual_seed(5)).tolist()


class Arbitrary(Predictor):
    """Names neurons by no reason: neuron n where table[t % 16, n] says so; one listed for no token is left out."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
        mask = self.table[torch.arange(len(x)) % 16]
        return Prediction(listed(mask.any(0)), None if len(x) == 1 else mask, None)

    def shard(self, neurons: torch.Tensor) -> Arbitrary:
        return Arbitrary(self.table[:, neurons])


def tables(n_layers: int, n_neurons: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.rand(16, n_neurons, generator=generator) < 0.2 + 0.1 * layer for layer in range(n_layers)]


def load(path: Path, activation: str | None = None) -> Transformer:
    gguf = GGUFFile.open(path)
    model = build_model(gguf, model_config(gguf), 64)
    for ffn in model.ffns():
        ffn.activation = activation or ffn.activation  # type: ignore[assignment]
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("eval") / "relu.gguf")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def expected_counts(
    dense_path: Path, layer: int, activation: str, x: torch.Tensor, table: torch.Tensor, skip: int
) -> NeuronCounts:
    """One neuron of one token at a time, in float64, from the file's matrices.

    x [T, D] is what the FFN was given; its first `skip` tokens are context.
    """
    gguf = GGUFFile.open(dense_path)
    gate, up, down = (dequantize(gguf.tensor(f"blk.{layer}.ffn_{n}.weight")).double() for n in ("gate", "up", "down"))
    computed = active = caught = 0
    share = 0.0
    for t, row in list(enumerate(x.double()))[skip:]:
        named = {i for i in range(len(gate)) if table[t % 16, i]}
        gates, ups = gate @ row, up @ row
        fired = ACTIVATIONS[activation](gates)
        hidden = fired * (ups.relu() if activation == "drelu" else ups)
        weight = [abs(float(hidden[i])) * float(down[:, i].norm()) for i in range(len(gate))]
        if activation == "silu":
            true = set(sorted(range(len(gate)), key=lambda i: -weight[i])[: len(named)])
        else:
            true = {i for i in range(len(gate)) if fired[i] != 0}
        computed, active, caught = computed + len(named), active + len(true), caught + len(named & true)
        share += sum(weight[i] for i in named) / sum(weight)
    return NeuronCounts(len(x) - skip, (len(x) - skip) * len(gate), computed, active, caught, share, computed)


@pytest.mark.parametrize("activation", ["relu", "silu", "drelu"])
@pytest.mark.parametrize("cold_fraction", [None, 0.3])
@pytest.mark.parametrize("stride", [30, 13])
def test_counts_are_those_of_every_neuron_by_hand(
    llama: Path, activation: str, cold_fraction: float | None, stride: int
) -> None:
    chosen = tables(2, 96)
    plan = None if cold_fraction is None else Plan.uniform(2, 96, cold_fraction)
    sparse = S.sparsify(load(llama, activation), lambda layer, ffn: Arbitrary(chosen[layer]), plan)
    inputs: list[torch.Tensor] = []
    hooks = [ffn.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for ffn in sparse.ffns()]
    windows = sliding_windows(TOKENS[: 31 + 26 * (stride == 13)], 30, stride, BOS)
    with torch.inference_mode():
        found = list(evaluate(load(llama, activation), windows, sparse))
    for hook in hooks:
        hook.remove()
    assert [one.window.scored for one in found] == ([30, 1] if stride == 30 else [30, 13, 13, 1])
    given = iter(inputs)
    for one in found:
        for layer, got in enumerate(one.layers):
            x = next(given)
            want = expected_counts(llama, layer, activation, x, chosen[layer], len(x) - one.window.scored)
            assert (got.tokens, got.neurons, got.computed) == (want.tokens, want.neurons, want.computed)
            assert (got.active, got.caught) == (want.active, want.caught)
            assert got.weight_share == pytest.approx(want.weight_share, rel=1e-4)
            assert got.recall < 0.7, "the predictor knows nothing, so this tests nothing if it finds all"


def test_a_neuron_named_but_not_listed_is_not_computed(llama: Path) -> None:
    class Unlisted(Arbitrary):
        def forward(self, x: torch.Tensor, residual: torch.Tensor) -> Prediction:
            prediction = super().forward(x, residual)
            assert prediction.mask is not None
            return prediction._replace(active=listed(torch.arange(96) < 10))

    sparse = S.sparsify(load(llama), lambda layer, ffn: Unlisted(torch.ones(16, 96, dtype=torch.bool)))
    with torch.inference_mode():
        (scores,) = evaluate(load(llama), sliding_windows(TOKENS[:20], 20, 20, BOS), sparse)
    assert [counts.density for counts in scores.layers] == [10 / 96] * 2


def test_only_scored_positions_are_counted(llama: Path) -> None:
    sparse = S.sparsify(load(llama), S.exact_predictors)
    with torch.inference_mode():
        found = list(evaluate(load(llama), sliding_windows(TOKENS, 32, 10, BOS), sparse))
    assert (
        [one.layers[0].tokens for one in found] == [len(one.tokens["kl"]) for one in found] == [32, 10, 10, 10, 10, 3]
    )
    assert summarise(found).tokens == 75


@pytest.mark.parametrize("cold_fraction", [None, 0.4])
def test_computing_every_neuron_is_dense(tmp_path: Path, cold_fraction: float | None) -> None:
    path = write_tiny_gemma3(tmp_path / "gelu.gguf")
    plan = None if cold_fraction is None else Plan.uniform(7, 96, cold_fraction)

    def everything(layer: int, ffn: DenseFFN) -> GateThreshold:
        return GateThreshold(ffn.gate, ffn.activation, torch.tensor([-1.0]))

    sparse = S.sparsify(load(path), everything, plan)
    with torch.inference_mode():
        summary = summarise(list(evaluate(load(path), sliding_windows(TOKENS, 32, 32, 2), sparse)))
    result = summary.sparse
    assert result is not None
    assert result.kl.value == pytest.approx(0, abs=1e-6)
    assert result.added.value == pytest.approx(0, abs=1e-5)
    shares = (result.argmax_agreement, result.argmax_in_dense_top5, result.top5_overlap)
    assert [share.value for share in shares] == [1.0, 1.0, 1.0]
    for counts in (result.neurons, *result.layers):
        assert (counts.density, counts.recall, counts.over_prediction) == (1.0, 1.0, 1.0)
        assert counts.weighted_recall == pytest.approx(1)


@pytest.mark.parametrize("stride", [32, 9])
def test_exact_catches_what_fires(llama: Path, stride: int) -> None:
    sparse = S.sparsify(load(llama), S.exact_predictors)
    with torch.inference_mode():
        summary = summarise(list(evaluate(load(llama), sliding_windows(TOKENS, 32, stride, BOS), sparse)))
    assert summary.sparse is not None
    assert (summary.sparse.neurons.recall, summary.sparse.neurons.over_prediction) == (1.0, 1.0)
    assert 0.3 < summary.sparse.neurons.density < 0.7
    assert summary.sparse.kl.value < 1e-6


def test_a_damaged_run_shows(llama: Path) -> None:
    sparse = S.sparsify(load(llama), lambda layer, ffn: Arbitrary(tables(2, 96)[layer]))
    with torch.inference_mode():
        summary = summarise(list(evaluate(load(llama), sliding_windows(TOKENS, 25, 25, BOS), sparse)))
    assert summary.sparse is not None
    assert summary.sparse.kl.value > 0.05
    assert summary.sparse.kl_p99 > summary.sparse.kl.value
    assert summary.sparse.argmax_agreement.value < 0.95
    added = summary.sparse.perplexity.nll - summary.dense.nll
    assert summary.sparse.added.value == pytest.approx(added)
    # Paired: far below what the two errors would give if the windows were not the same.
    apart = (summary.sparse.perplexity.standard_error**2 + summary.dense.standard_error**2) ** 0.5
    assert 0 < summary.sparse.added.standard_error < apart


def test_logits_in_pieces_give_the_same_figures(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse = S.sparsify(load(llama), lambda layer, ffn: Arbitrary(tables(2, 96)[layer]))
    found = []
    for n_bytes in (64 << 20, 4 * 264 * 7, 1):
        monkeypatch.setattr("pinfer.quality.compare.LOGIT_BYTES", n_bytes)
        with torch.inference_mode():
            found.append(next(iter(evaluate(load(llama), sliding_windows(TOKENS, 32, 32, BOS), sparse))).tokens)
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2][name], whole, rtol=1e-4, atol=1e-5)


def test_a_broken_model_gives_no_numbers(llama: Path) -> None:
    """NaN is null in the figures, and no error: JSON has no other word for it."""
    sparse = S.sparsify(load(llama), S.exact_predictors)
    sparse.blocks[0].attention_norm.weight = torch.full((64,), float("nan"))
    with torch.inference_mode():
        scores = list(evaluate(load(llama), sliding_windows(TOKENS, 32, 32, BOS), sparse))
    summary = summarise(scores)
    flat = report.figures(summary)
    assert flat["dense_perplexity"] > 1
    assert flat["layers"][0]["weighted_recall"] is None
    rows = list(report.records(summary, scores))
    json.dumps(rows, allow_nan=False)
    assert [row["value"] for row in rows if row["metric"] == "sparse_nll"] == [None] * 4


def test_a_loss_beyond_floats_is_an_infinite_perplexity() -> None:
    assert Perplexity(1000.0, 1.0, 5).perplexity == math.inf


def test_observing_leaves_no_hook_and_needs_a_sparse_model(llama: Path) -> None:
    sparse = S.sparsify(load(llama), S.exact_predictors)
    with torch.inference_mode(), contextlib.suppress(RuntimeError), NeuronObserver(sparse).watch(4):
        raise RuntimeError
    assert not any(module._forward_hooks for module in sparse.modules())
    with pytest.raises(ValueError, match="layer 0 is dense"):
        NeuronObserver(load(llama))


def test_the_shipped_text_is_held_out() -> None:
    paragraphs = EVALUATION_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    assert set(paragraphs) <= set(HELD_OUT.read_text(encoding="utf-8").strip().split("\n\n"))
    assert not set(paragraphs) & set(CALIBRATION_TEXT.read_text(encoding="utf-8").strip().split("\n\n"))
    assert len(paragraphs) > 100


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert cli(["eval", *arguments, "--json"]) == OK
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_json_and_long_table_say_the_same(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "long.jsonl"
    flags = ["--window", "64", "--stride", "32", "--method", "gate_threshold", "--sparsity", "0.5", "-t", "1"]
    found = figures(capsys, "-m", str(llama), "--text", str(text), *flags, "--cold-fraction", "0.25", "-o", str(out))
    run, *rows = (json.loads(line) for line in out.read_text(encoding="utf-8").splitlines())
    assert (run["kind"], run["command"], run["method"], run["truly_active"]) == (
        "run",
        "eval",
        "gate_threshold",
        "nonzero",
    )
    assert (run["config"]["sparsity"], run["config"]["cold_fraction"], run["config"]["threads"]) == (0.5, 0.25, 1)
    assert (run["window_tokens"], run["stride_tokens"]) == (64, 32)
    assert len(run["text_sha256"]) == 64
    assert len(run["model_fingerprint"]) == 32
    assert run["environment"]["torch"] == torch.__version__
    table = {(row["metric"], row["layer"], row["window"]): row for row in rows}
    assert len(table) == len(rows), "one record a figure"
    names = {
        "sparse_perplexity": "perplexity", "dense_perplexity": "dense_perplexity", "added": "added_nats", "kl": "kl_nats",
        "kl_p99": "kl_p99_nats", "argmax_agreement": "argmax_agreement", "top5_overlap": "top5_overlap",
        "density": "density", "recall": "recall", "weighted_recall": "weighted_recall", "over_prediction": "over_prediction",
    }  # fmt: skip
    for metric, name in names.items():
        assert table[metric, None, None]["value"] == found[name]
    assert table["added", None, None]["standard_error"] == found["added_nats_standard_error"] > 0
    assert table["kl", None, None]["unit"] == "nats"
    for layer in (0, 1):
        assert table["recall", layer, None]["value"] == found["layers"][layer]["recall"]
    assert (found["windows"], found["scored_tokens"]) == (len({w for _, _, w in table}) - 1, found["text_tokens"] - 1)
    windows = [row for row in rows if row["metric"] == "kl" and row["window"] is not None]
    assert sum(row["tokens"] for row in windows) == found["scored_tokens"]
    mean = sum(row["value"] * row["tokens"] for row in windows) / found["scored_tokens"]
    assert mean == pytest.approx(found["kl_nats"])
    assert ("recall", 1, found["windows"] - 1) in table
    assert list(out.parent.iterdir()) == [out], "nothing half-written beside it"


def test_dense_alone_gives_perplexity_alone(llama: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(
        capsys, "-m", str(llama), "--text", str(text), "--window", "64", "--windows", "2", "--method", "dense"
    )
    assert found["perplexity"] == found["dense_perplexity"] > 1
    assert (found["windows"], found["scored_tokens"], found["method"]) == (2, 128, "dense")
    assert not {"kl_nats", "density", "recall", "layers"} & set(found)
    sparse = figures(capsys, "-m", str(llama), "--text", str(text), "--window", "64", "--windows", "2")
    assert (sparse["method"], sparse["dense_perplexity"]) == ("exact", found["perplexity"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    write_records(path, {"method": "exact"}, iter([{"value": 1.0}]))
    before = path.read_text()
    assert [json.loads(line) for line in before.splitlines()] == [
        {"kind": "run", "format": 1, "method": "exact"},
        {"value": 1.0},
    ]

    def broken() -> Iterator[dict[str, Any]]:
        yield {"value": 2.0}
        assert path.read_text() == before, "written in place"
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_records(path, {}, broken())
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("method", "row"), [("exact", True), ("dense", False)])
def test_the_table(llama: Path, text: Path, capsys: pytest.CaptureFixture[str], method: str, row: bool) -> None:
    assert cli(["eval", "-m", str(llama), "--text", str(text), "--window", "64", "--method", method]) == OK
    out, err = capsys.readouterr()
    assert "relu.gguf" in out
    assert "perplexity" in out
    for part in ("added nats", "KL(dense ‖ sparse)", "weighted recall %", "computed / active", "truly active"):
        assert (part in out) == row
    lines = {line.split()[0]: line.count("±") for line in out.splitlines() if "±" in line}
    assert lines["dense"] == 2
    assert lines.get("exact") == (3 if row else None)
    assert "window 1 of" in err
    assert "left" in err


def test_default_text_and_model_through_low_rank(capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--method", "low_rank", "--recall", "0.9", "--window", "128", "--windows", "3")
    assert found["text"] == "evaluation.txt"
    assert 0.8 < found["recall"] < 0.98
    assert found["recall"] < found["weighted_recall"] < 1, "what is missed weighs little"
    assert found["over_prediction"] > 1
    assert 0 < found["kl_nats"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--window", "300"], "context of 256"),
        (["--window", "1"], "at least 2"),
        (["--window", "0"], "at least 2"),
        (["--window", "-3"], "at least 2"),
        (["--window", "64", "--stride", "65"], "[1, 64]"),
        (["--window", "64", "--stride", "0"], "[1, 64]"),
        (["--window", "64", "--windows", "0"], "windows"),
        (["--window", "64", "--windows", "9999"], "9999"),
        (["--text", "SHORT"], "too few for a window of 256"),
        (["--text", "EMPTY"], "0 tokens"),
        (["--text", "LATIN"], "not UTF-8 at byte 3"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--method", "gate_threshold"], "needs a sparsity"),
        (["--method", "dense", "--cold-fraction", "0.5"], "cold_fraction"),
        (["--method", "exact", "--sparsity", "0.5"], "no meaning"),
        (["-o", "nowhere/out.jsonl"], "no such folder"),
        (["-o", "."], "is a folder"),
        (["-m", "nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_bad_input_is_one_line(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {"SHORT": b"hello", "EMPTY": b"", "LATIN": b"caf\xe9 " * 500}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    whole = ["eval", "-m", str(llama), "--text", str(text), "--window", "256", "-o", "out.jsonl", *arguments]
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert cli(whole) == BAD_INPUT
    message = err.getvalue()
    assert says in message
    assert message.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("tokens", [33, 64])
@pytest.mark.parametrize("cold_fraction", [0.0, 0.5])
def test_an_opening_token_computed_whole_is_counted_as_such(tmp_path: Path, tokens: int, cold_fraction: float) -> None:
    """Also where a window holds nothing else: the predictor is not asked then."""
    run = RunConfig(
        model=str(write_tiny_llama(tmp_path / "m.gguf")),
        method="shift_threshold",
        sparsity=0.6,
        activation="silu",
        cold_fraction=cold_fraction,
        precision="float32",
    )
    engine = load_engine(run)
    observer = NeuronObserver(engine.model)
    with engine.computing():
        for length in (1, tokens):
            S.reset_activity(engine.model)
            with observer.watch(length) as counts:
                engine.model(torch.arange(length) % 20, engine.model.new_cache())
            assert [one.tokens for one in counts] == [length] * engine.config.n_layers
            by_layer = [layer.density for layer in S.layer_densities(engine.model)]
            assert [one.density for one in counts] == pytest.approx(by_layer)
            if length == 1:
                assert by_layer == [1.0] * engine.config.n_layers
            else:
                assert max(by_layer) < 0.8
