"""Models in another weight type: which tensor gets which, what the file holds, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from experiments.quantization import TYPES, ours, random_weights
from pinfer.cli.main import BAD_INPUT, FAILED, OK, run
from pinfer.engine.quantize_model import Total, quantize_model, targets
from pinfer.formats import open_model
from pinfer.formats.gguf_writer import Outgoing, fuse, metadata_of, stored, write_gguf
from pinfer.formats.standard import fused_tensors
from pinfer.formats.type_mix import Facts, tensor_type
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.quant import BY_NAME, F16, F32, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0
from pinfer.quantize import quantize
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

ERRORS = Path(__file__).resolve().parent.parent / "experiments/results/quantization/errors.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 256 and of 512, so that K-quants fit."""
    return write_tiny_llama(tmp_path_factory.mktemp("quantize") / "m.gguf", d_model=256, d_ffn=512)


@pytest.mark.parametrize("kind", TYPES)
def test_errors_are_at_most_a_twentieth_above_llama_cpps(kind: str) -> None:
    recorded = {
        row["weights"]: row["llama.cpp"] for row in json.loads(ERRORS.read_text())["rows"] if row["type"] == kind
    }
    weights = random_weights()
    assert recorded.keys() > weights.keys()
    for name, values in weights.items():
        assert ours(values, BY_NAME[kind]) <= 1.05 * recorded[name], name


@pytest.mark.parametrize("type_name", ["q8_0", "q4_0", "q4_k", "q5_k", "q6_k", "q4_k_m", "q5_k_m", "f16"])
def test_the_file_holds_what_our_quantiser_makes_of_each_matrix(model: Path, tmp_path: Path, type_name: str) -> None:
    with open_model(model) as source:
        chosen = {one.name: one for one in targets(source, type_name)}
        quantize_model(source, type_name, tmp_path / "q.gguf", threads=2)
        made = open_model(tmp_path / "q.gguf")
        assert made.metadata == dict(source.metadata) | {
            "general.file_type": made.metadata["general.file_type"],
            "general.quantization_version": 2,
        }
        assert list(made.tensors) == list(source.tensors)
        for name, info in made.tensors.items():
            assert info.type is chosen[name].type
            if len(info.shape) == 1:
                assert torch.equal(made.raw(name), source.raw(name))
            else:
                expected = quantize(dequantize(source.tensor(name)), info.type)
                assert torch.equal(made.tensor(name).blocks, expected.blocks), name


def test_threads_do_not_change_the_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(model) as source:
        monkeypatch.setattr("pinfer.engine.quantize_model.PIECE_WEIGHTS", 48 * 256)  # several pieces a matrix
        quantize_model(source, "q4_k_m", tmp_path / "one.gguf")
        quantize_model(source, "q4_k_m", tmp_path / "two.gguf", threads=3)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes()


def test_the_error_told_is_that_of_the_file(model: Path, tmp_path: Path) -> None:
    with open_model(model) as source:
        found = quantize_model(source, "q4_k", tmp_path / "q.gguf")
        made = open_model(tmp_path / "q.gguf")
        names = [name for name in source.tensors if "ffn_up" in name]
        before, after = (
            torch.cat([dequantize(file.tensor(name)).flatten() for name in names]) for file in (source, made)
        )
    expected = float((after - before).double().square().mean().sqrt() / before.double().square().mean().sqrt())
    assert found["ffn_up"].error == pytest.approx(expected, rel=1e-4)
    assert sum(found.values(), Total()).nbytes == made.nbytes


LLAMA_7B, LLAMA_70B = Facts(32), Facts(80, is_70b=True)


def types_of(part: str, facts: Facts, mix: str) -> Counter[str]:
    """Of a part, over all layers."""
    names = (f"blk.{layer}.{part}.weight" for layer in range(facts.n_layers))
    return Counter(tensor_type(mix, name, (512, 512), F16, facts).name for name in names)


def test_the_mixes_are_llama_cpps() -> None:
    assert types_of("ffn_down", LLAMA_7B, "q4_k_m") == {"Q6_K": 16, "Q4_K": 16}
    assert types_of("attn_v", LLAMA_7B, "q5_k_m") == {"Q6_K": 16, "Q5_K": 16}
    assert types_of("attn_v", LLAMA_70B, "q4_k_m") == {"Q6_K": 40, "Q5_K": 40}
    assert types_of("attn_q", LLAMA_70B, "q4_k_m") == {"Q4_K": 80}
    assert types_of("ffn_down", Facts(32, falcon=True), "q4_k_m") == {"Q6_K": 2, "Q5_K": 14, "Q4_K": 16}
    assert types_of("attn_qkv", Facts(32, falcon=True), "q4_k_m") == {"Q6_K": 16, "Q4_K": 16}
    mixture = Facts(32, n_experts=8)
    assert types_of("attn_k", mixture, "q4_k_m") == types_of("attn_v", mixture, "q4_k_m") == {"Q8_0": 32}
    assert types_of("attn_output", mixture, "q4_k_m") == {"Q5_K": 32}
    assert types_of("ffn_down_exps", mixture, "q4_k_m") == {"Q6_K": 16, "Q4_K": 16}


@pytest.mark.parametrize(
    ("type_name", "name", "columns", "expected"),
    [
        ("q4_0", "output.weight", 512, Q6_K),
        ("q8_0", "output.weight", 512, Q8_0),
        ("q4_k", "token_embd.weight", 512, Q4_K),
        ("q4_k", "output.weight", 640, Q8_0),
        ("q4_k", "blk.0.attn_q.weight", 640, Q5_0),
        ("q5_k", "blk.0.attn_q.weight", 640, Q5_1),
        ("q6_k", "blk.0.attn_q.weight", 640, Q8_0),
        ("q4_k", "blk.0.attn_q.weight", 650, F16),
        ("q4_0", "blk.0.attn_q.weight", 650, F16),
        ("q4_k", "blk.0.ffn_gate_inp.weight", 512, F32),
        ("q4_k", "position_embd.weight", 512, F32),
        ("f16", "output.weight", 512, F16),
    ],
)
def test_what_gets_another_type_than_asked_for(type_name: str, name: str, columns: int, expected: Any) -> None:
    assert tensor_type(type_name, name, (64, columns), F32, LLAMA_7B) is expected


def test_a_tied_embedding_is_the_output_matrix() -> None:
    tied = Facts(32, tied=True)
    assert tensor_type("q4_k", "token_embd.weight", (64, 512), F32, tied) is Q6_K
    assert tensor_type("q4_k", "token_embd.weight", (64, 512), F32, Facts(32, tied=True, falcon=True)) is Q8_0


def test_fused_matrices_have_one_type_and_are_written_as_one(tmp_path: Path) -> None:
    """A model whose query, key and value are one matrix in its files."""
    source = write_tiny_llama(tmp_path / "m.gguf", d_model=256, d_ffn=512, n_layers=4)
    with open_model(source) as file:
        fused = {
            f"blk.{layer}.attn_qkv.weight": tuple(f"blk.{layer}.attn_{part}.weight" for part in "qkv")
            for layer in range(4)
        }
        quantize_model(file, "q4_k_m", tmp_path / "q.gguf", fused=fused)
        write_gguf(tmp_path / "f.gguf", metadata_of(file), fuse([stored(file, name) for name in file.tensors], fused))
    stored_as = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert [stored_as[f"blk.{layer}.attn_qkv.weight"] for layer in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert list(stored_as) == [one.name for one in gguf.GGUFReader(tmp_path / "f.gguf").tensors]
    made, before = open_model(tmp_path / "q.gguf"), open_model(source)
    for name, info in made.tensors.items():
        if len(info.shape) == 2:
            assert torch.equal(made.tensor(name).blocks, quantize(dequantize(before.tensor(name)), info.type).blocks)


def test_models_without_fused_matrices_have_none(model: Path) -> None:
    assert fused_tensors(open_model(model)) == {}


def test_the_command_writes_a_model_that_runs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "q.gguf"
    assert run(["quantize", str(model), "-o", str(path), "--type", "Q4_K_M", "--json"]) == OK
    figures = json.loads(capsys.readouterr().out)
    assert figures["tensors"]["all"]["bytes"] == open_model(path).nbytes
    assert 0.05 < figures["tensors"]["ffn_up"]["relative_rmse"] < 0.08
    assert run(["generate", "-m", str(path), "-p", "hello", "-n", "3", "--temp", "0", "--ignore-eos"]) == OK


def test_a_dry_run_tells_the_same_types_and_writes_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["quantize", str(model), "-o", str(tmp_path / "q.gguf"), "--type", "q5_k", "--json"]
    assert run([*arguments, "--dry-run"]) == OK
    told = json.loads(capsys.readouterr().out)["tensors"]
    assert not list(tmp_path.iterdir())
    assert run(arguments) == OK
    made = json.loads(capsys.readouterr().out)["tensors"]
    for name, figures in told.items():
        assert figures == made[name] | {"relative_rmse": None}


def test_rows_that_do_not_fit_and_second_roundings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny_gemma3(tmp_path / "m.gguf", weight_type="Q8_0")
    assert run(["quantize", str(source), "-o", str(tmp_path / "q.gguf"), "--type", "Q4_K"]) == OK
    said = capsys.readouterr()
    assert "tensors of 64 columns are no whole blocks of Q4_K: they are Q5_0" in said.err
    assert "the source is quantised already (Q8_0)" in said.err
    assert "Q5_0 x7" in said.out


def test_bad_targets_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = model.read_bytes()
    for output, kind, said in (
        (tmp_path / "q.gguf", "Q9_9", "type Q9_9 is none of"),
        (model, "Q8_0", "the model is read from it"),
        (tmp_path, "Q8_0", "this is a directory"),
    ):
        assert run(["quantize", str(model), "-o", str(output), "--type", kind]) == BAD_INPUT
        assert said in capsys.readouterr().err
    assert model.read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_replaced(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    arguments = ["quantize", str(model), "-o", str(path), "--type", "q8_0"]
    assert run(arguments) == BAD_INPUT
    assert f"{path} exists; --force" in capsys.readouterr().err
    assert path.read_text() == "{}"
    assert run([*arguments, "--force"]) == OK
    assert path.read_bytes()[:4] == b"GGUF"


def test_threads_have_limits(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for threads in ("0", "-5", "100000"):
        assert run(["quantize", str(model), "-o", str(tmp_path / "q"), "--type", "q8_0", "-t", threads]) == BAD_INPUT
        assert f"threads must lie in [1, 4096], not {threads}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tiny_llama(tmp_path / "m.gguf")
    with open_model(source) as file:
        bad = torch.full((96, 64), float("nan")).view(torch.uint8)
        tensors = [stored(file, name) for name in file.tensors]
        name = "blk.1.ffn_gate.weight"
        tensors = [Outgoing(name, (96, 64), F32, lambda: [bad]) if one.name == name else one for one in tensors]
        write_gguf(tmp_path / "bad.gguf", metadata_of(file), tensors)
    assert run(["quantize", str(tmp_path / "bad.gguf"), "-o", str(tmp_path / "q.gguf"), "--type", "Q4_0"]) == BAD_INPUT
    assert f"tensor {name}: a weight is not finite" in capsys.readouterr().err
    assert sorted(one.name for one in tmp_path.iterdir()) == ["bad.gguf", "m.gguf"]


def test_a_full_disk_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinfer.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert run(["quantize", str(model), "-o", str(tmp_path / "q.gguf"), "--type", "Q4_0"]) == FAILED
    assert "no room for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
