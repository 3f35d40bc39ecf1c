"""Bundled models: one file runs as the model and its solved directory do, and what it says of its rows is so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.cli.main import BAD_INPUT, OK, run
from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import SHIPPED_MODEL, Engine, Generation, load_engine
from pinfer.engine.bundle import write_bundle
from pinfer.engine.embedded import embedded_solved
from pinfer.engine.fitting import FitSettings, fit_predictors, keep_predictors, sequences_to_fit_on
from pinfer.engine.solved import ACTIVATIONS, Solved
from pinfer.engine.text import Text
from pinfer.ffn import SparseFFN
from pinfer.formats import open_model
from pinfer.formats.gguf_writer import metadata_of, stored, write_gguf
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.placement.statistics import from_tensors
from pinfer.quant import F16, Q4_0, Q5_0, Q5_K, Q6_K, Q8_0, QuantType
from pinfer.sparsify import density
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama
from tests.powerinfer_files import write_powerinfer

DIRECTORY = SHIPPED_MODEL.with_name("pinfer-tiny.pinfer")
PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with its directory, by the command, alone in a folder."""
    path = tmp_path_factory.mktemp("bundle") / "tiny.gguf"
    arguments = ["convert", str(SHIPPED_MODEL), "--to", "pinfer", "-o", str(path)]
    assert run([*arguments, "--predictor-path", str(DIRECTORY)]) == OK
    return path


def engine_of(path: Path, **settings: Any) -> Engine:
    return load_engine(RunConfig(model=str(path), sampling=SamplingConfig(temperature=0), **settings))


def text_of(engine: Engine) -> str:
    tokens = engine.tokenizer.encode(PROMPT)
    generation = Generation(engine, tokens, max_tokens=48, sampling=engine.run.sampling, ignore_eos=True)
    list(generation)
    return generation.text


def test_it_runs_alone_as_the_model_with_its_directory(bundled: Path) -> None:
    one, two = engine_of(SHIPPED_MODEL, predictor_path=str(DIRECTORY)), engine_of(bundled)
    assert one.method == two.method == "low_rank"
    assert text_of(one) == text_of(two)
    assert density(one.model) == pytest.approx(density(two.model), rel=0.01)  # sums run in another order
    assert [note for note in one.notes if "catches" in note] == [note for note in two.notes if "catches" in note]
    assert [one.name for one in bundled.parent.iterdir()] == [bundled.name]


@pytest.mark.parametrize("method", ["exact", "dense"])
def test_it_runs_without_its_predictors(bundled: Path, method: Any) -> None:
    assert text_of(engine_of(bundled, method=method)) == text_of(engine_of(SHIPPED_MODEL, method=method))


def test_neurons_are_sorted_by_how_often_they_fired(bundled: Path) -> None:
    file, before = open_model(bundled), open_model(SHIPPED_MODEL)
    assert file.format == "pinfer bundle v3"
    solved = embedded_solved(file)
    assert solved is not None
    counted = from_tensors(Solved.open(DIRECTORY).read_tensors(ACTIVATIONS), 6)
    for layer, statistics in enumerate(from_tensors(solved.read_tensors(ACTIVATIONS), 6)):
        assert bool((statistics.fired.diff() <= 0).all())
        order = file.raw(f"pinfer.neurons.{layer}").clone().view(torch.int32).long()
        assert order.sort().values.tolist() == list(range(1024))
        assert torch.equal(statistics.mass, counted[layer].mass[order])
        assert torch.equal(statistics.up_mean, counted[layer].up_mean[:, order])
        for name in ("gate", "up"):
            name = f"blk.{layer}.ffn_{name}.weight"
            assert torch.equal(file.tensor(name).blocks, before.tensor(name).blocks[order])


def test_predictors_are_computed_on_in_the_file(bundled: Path) -> None:
    engine = engine_of(bundled)
    data = engine.file.parts[0].data
    for ffn in engine.model.ffns():
        assert isinstance(ffn, SparseFFN)
        for held in (ffn.weights.down, ffn.predictor.first, ffn.predictor.second):  # type: ignore[union-attr]
            assert data.data_ptr() <= held.blocks.data_ptr() < data.data_ptr() + data.numel()


def test_plans_are_solved_from_the_file_alone(bundled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"device": "emulated", "gpu_memory_gb": 0.4, "threads": 2}
    engine = engine_of(bundled, **settings)
    assert engine.placement is not None
    assert "solved for the budget" in engine.placement.source
    assert text_of(engine) == text_of(engine_of(bundled))
    arguments = ["plan", "--gpu", "rtx4090", "--ram-bandwidth", "80", "--json", "-m"]
    assert run([*arguments, str(bundled)]) == OK
    alone = json.loads(capsys.readouterr().out)
    assert run([*arguments, str(SHIPPED_MODEL), "--predictor-path", str(DIRECTORY)]) == OK
    beside = json.loads(capsys.readouterr().out)
    assert alone["tokens_per_s"] == pytest.approx(beside["tokens_per_s"], rel=1e-3)


@pytest.mark.parametrize("method", ["sign_bits", "weighted_threshold", "shift_threshold", "gate_threshold"])
def test_every_kind_of_predictor_is_carried(tmp_path: Path, method: Any) -> None:
    """Fitted to a model, kept in a directory, and then in its bundle: the same neurons, and so the same logits."""
    activation = "relu" if method == "sign_bits" else "silu"
    path = write_tiny_llama(tmp_path / "m.gguf", weight_type="Q8_0", activation=activation)
    dense = engine_of(path, method="dense")
    sequences = sequences_to_fit_on(method, dense.tokenizer, Text.read(None), 256, tokens=512)
    with dense.computing():
        fitted = fit_predictors(dense.model, FitSettings(method), sequences)
    solved = Solved.open_or_create(tmp_path / "m.pinfer", dense.file)
    with solved.lock():
        keep_predictors(solved, fitted, method, {"activation": activation}, {})
    solved = Solved.open(tmp_path / "m.pinfer", dense.file)
    write_bundle(dense.file, tmp_path / "b" / "m.gguf", solved)
    sparsity = None if method == "sign_bits" else 0.4
    one = engine_of(path, predictor_path=str(solved.path), sparsity=sparsity, precision="float32")
    two = engine_of(tmp_path / "b" / "m.gguf", sparsity=sparsity, precision="float32")
    assert one.method == two.method == method
    tokens = torch.tensor(one.tokenizer.encode("hello the world"))
    logits = []
    for engine in (one, two):
        with engine.computing():
            logits.append(engine.model(tokens, engine.model.new_cache()))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)
    assert density(one.model) == density(two.model) < 1


def test_orders_apply_to_predictors_and_biases_alike(tmp_path: Path) -> None:
    """An ungated model with biases, whose statistics are made up: a bundle computes what the model does."""
    path = write_powerinfer(tmp_path / "opt.gguf", "opt", F16)
    engine = engine_of(path)
    solved = Solved.open_or_create(tmp_path / "opt.pinfer", engine.file)
    counted = from_tensors(Solved.open(DIRECTORY).read_tensors(ACTIVATIONS), 6)
    sizes = torch.arange(engine.config.d_ffn)
    with solved.lock():
        tensors = {
            f"blk.{layer}.{name}": value
            for layer in range(engine.config.n_layers)
            for name, value in vars(counted[layer].renumbered(sizes)).items()
        }
        solved.write(ACTIVATIONS, tensors, stage="profile", settings={}, figures={})
    write_bundle(engine.file, tmp_path / "b.gguf", Solved.open(solved.path, engine.file))
    two = engine_of(tmp_path / "b.gguf")
    assert two.method == "mlp"
    assert text_of(engine) == text_of(two)
    assert not torch.equal(engine.file.raw("blk.0.ffn_up.bias"), two.file.raw("blk.0.ffn_up.bias"))


@pytest.mark.parametrize(
    ("kind", "limit"), [(Q8_0, 0.0), (Q6_K, 0.02), (Q5_K, 0.04), (Q5_0, 0.05), (Q4_0, 0.095), (F16, 3e-4)], ids=str
)
def test_rows_of_down_in_other_types(tmp_path: Path, kind: QuantType, limit: float) -> None:
    source = open_model(SHIPPED_MODEL)
    found = write_bundle(source, tmp_path / "b.gguf", down_type=kind)
    file = open_model(tmp_path / "b.gguf")
    errors = []
    for layer, told in enumerate(found.down_errors):
        rows = file.tensor(f"blk.{layer}.ffn_down_t.weight")
        assert rows.type is kind
        before = dequantize(source.tensor(f"blk.{layer}.ffn_down.weight")).T
        errors.append(float((dequantize(rows) - before).norm() / before.norm()))
        assert told == pytest.approx(errors[-1], rel=1e-3, abs=1e-9)
    assert found.down_error <= limit
    assert found.down_bytes == sum(file.info(f"blk.{layer}.ffn_down_t.weight").nbytes for layer in range(6))
    assert found.nbytes == (tmp_path / "b.gguf").stat().st_size


def test_rows_of_a_powerinfer_file_in_another_type(tmp_path: Path) -> None:
    path = write_powerinfer(tmp_path / "m.gguf")
    found = write_bundle(open_model(path), tmp_path / "b.gguf", down_type=Q8_0)
    assert 0 < found.down_error < 0.006
    assert text_of(engine_of(tmp_path / "b.gguf")) == text_of(engine_of(path))


def test_a_bundle_without_predictors_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "no predictors are in the file"
    for more, expected in (([], True), (["--predictor-path", str(DIRECTORY)], False)):
        output = str(tmp_path / f"{len(more)}.gguf")
        assert run(["convert", str(SHIPPED_MODEL), "--to", "pinfer", "-o", output, *more]) == 0
        assert (said in capsys.readouterr().err) is expected


def test_what_cannot_be_bundled_is_refused_and_leaves_nothing(
    bundled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma = write_tiny_gemma3(tmp_path / "gemma.gguf")
    output = str(tmp_path / "out" / "b.gguf")
    for arguments, said in (
        ([str(bundled)], "is a bundled model already"),
        ([str(gemma), "--down-type", "Q6_K"], "64 columns are no multiple of Q6_K"),
        ([str(gemma), "--down-type", "Q9"], "--down-type Q9 is none of"),
        ([str(gemma), "--type", "f16"], "--type f16 has no meaning with --to pinfer"),
        ([str(gemma), "--predictor-path", str(DIRECTORY)], "made for another model"),
    ):
        assert run(["convert", *arguments, "--to", "pinfer", "-o", output]) == BAD_INPUT
        assert said in capsys.readouterr().err
    assert run(["convert", str(gemma), "--to", "gguf", "-o", output, "--down-type", "Q6_K"]) == BAD_INPUT
    assert "--down-type Q6_K has no meaning with --to gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("key", "value"),
    [("pinfer.contents", "{"), ("pinfer.contents", "{}"), ("pinfer.contents", "[1]"), ("pinfer.contents", 3)],
)
def test_damaged_contents_are_refused(bundled: Path, tmp_path: Path, key: str, value: Any) -> None:
    with open_model(bundled) as file:
        tensors = [stored(file, name) for name in file.tensors]
        write_gguf(tmp_path / "bad.gguf", metadata_of(file) | {key: value}, tensors)
    with pytest.raises(ValueError, match=key):
        engine_of(tmp_path / "bad.gguf")


def test_predictors_that_are_missing_are_named(bundled: Path, tmp_path: Path) -> None:
    with open_model(bundled) as file:
        tensors = [stored(file, name) for name in file.tensors if name != "pinfer.predictor.blk.2.second"]
        write_gguf(tmp_path / "bad.gguf", metadata_of(file), tensors)
    with pytest.raises(ValueError, match=r"pinfer\.predictor\.blk\.2\.second"):
        engine_of(tmp_path / "bad.gguf")


def test_a_directory_without_statistics_leaves_neurons_where_they_are(tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "m.gguf", weight_type="Q8_0")
    write_bundle(open_model(path), tmp_path / "b.gguf")
    one, two = open_model(path), open_model(tmp_path / "b.gguf")
    assert torch.equal(one.raw("blk.3.ffn_up.weight"), two.raw("blk.3.ffn_up.weight"))
    assert embedded_solved(two) is None


@pytest.mark.parametrize("kind", ["bundle", "powerinfer"])
def test_neuron_major_files_are_quantised_as_they_are(
    bundled: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = bundled if kind == "bundle" else write_powerinfer(tmp_path / "m.gguf")
    assert run(["quantize", str(source), "-o", str(tmp_path / "q.gguf"), "--type", "Q5_0"]) == OK
    said = capsys.readouterr()
    assert "llama.cpp does not read it" in said.err
    assert "predictors" in said.out
    one, two = engine_of(source), engine_of(tmp_path / "q.gguf")
    assert one.method == two.method
    assert two.file.info("blk.0.ffn_down_t.weight").type is Q5_0
    for engine in (one, two):
        assert text_of(engine)
    assert density(two.model) == pytest.approx(density(one.model), abs=0.05)
