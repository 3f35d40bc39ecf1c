"""Predictors in a solved directory: what was fitted runs again from there, and says so where it cannot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.cli.main import BAD_INPUT, OK
from pinfer.cli.main import run as cli
from pinfer.config import Method, RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.fitting import CALIBRATE, FitSettings, fit_predictors, keep_predictors, sequences_to_fit_on
from pinfer.engine.solved import CALIBRATION, PREDICTOR, Solved
from pinfer.engine.text import Text
from pinfer.sparsify import layer_densities, reset_activity
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

TEXT = Text("test text", "".join(f"hello the {word} world, hello. " for word in range(300)))
FAMILIES: dict[Method, Any] = {
    "gate_threshold": write_tiny_gemma3,
    "weighted_threshold": write_tiny_gemma3,
    "shift_threshold": write_tiny_gemma3,
    "low_rank": write_tiny_llama,
    "sign_bits": write_tiny_llama,
}
pytestmark = pytest.mark.usefixtures("quick_fits")


def logits(engine: Engine) -> torch.Tensor:
    reset_activity(engine.model)
    with engine.computing():
        return engine.model(torch.arange(4, 44), engine.model.new_cache())


def solved_for(path: Path, method: Method, directory: Path) -> Solved:
    """The predictors of a model, fitted to a text of the test's own, in a directory."""
    dense = load_engine(RunConfig(model=str(path), method="dense"))
    how = FitSettings(method, rank=32, recall=0.9)
    with dense.computing():
        sequences = sequences_to_fit_on(method, dense.tokenizer, TEXT, dense.config.context_length)
        fitted = fit_predictors(dense.model, how, sequences)
    solved = Solved.open_or_create(directory, dense.file)
    with solved.lock():
        keep_predictors(solved, fitted, method, {}, {})
    return solved


def calibrated(solved: Solved, densities: list[float]) -> None:
    with solved.lock():
        content = json.dumps({"densities": densities}).encode()
        solved.write(CALIBRATION, content, stage=CALIBRATE, settings={}, figures={}, made_from=(PREDICTOR,))


@pytest.mark.parametrize("method", FAMILIES)
def test_a_run_takes_method_and_densities_from_the_directory(tmp_path: Path, method: Method) -> None:
    path = FAMILIES[method](tmp_path / "m.gguf")
    solved = solved_for(path, method, tmp_path / "solved")
    n_layers = load_engine(RunConfig(model=str(path), method="dense")).config.n_layers
    calibrated(solved, [0.25, 0.6] * (n_layers // 2) + [0.25] * (n_layers % 2))
    run = RunConfig(model=str(path), predictor_path=str(solved.path), precision="float32")
    engine = load_engine(run)
    assert engine.method == method
    found = logits(engine)
    reached = [layer.density for layer in layer_densities(engine.model)]
    assert reached[0] < reached[1]
    for one, asked in zip(reached[:2], (0.25, 0.6), strict=True):
        assert one == pytest.approx(asked, abs=0.2)  # on another text than it was fitted to
    assert torch.equal(found, logits(load_engine(dataclasses.replace(run, method=method))))
    hybrid = logits(load_engine(dataclasses.replace(run, cold_fraction=0.5)))
    torch.testing.assert_close(hybrid, found, rtol=1e-3, atol=1e-3)


def test_a_sparsity_takes_the_place_of_the_calibrated_one(tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "m.gguf")
    solved = solved_for(path, "shift_threshold", tmp_path / "solved")
    run = RunConfig(model=str(path), predictor_path=str(solved.path), sparsity=0.5)
    without = logits(load_engine(run))
    calibrated(solved, [0.9, 0.2, 0.5, 0.5, 0.5, 0.5, 0.5])
    assert torch.equal(logits(load_engine(run)), without)
    assert not torch.equal(logits(load_engine(dataclasses.replace(run, sparsity=None))), without)


def test_predictors_fitted_to_a_recall_need_no_calibration(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf")
    solved = solved_for(path, "low_rank", tmp_path / "solved")
    engine = load_engine(RunConfig(model=str(path), predictor_path=str(solved.path)))
    assert any("low_rank catches" in note for note in engine.notes)


def refused(path: Path, directory: str, *more: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli(["generate", "-m", str(path), "-p", "hi", "--predictor-path", directory, *more]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_cannot_be_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, relu = write_tiny_gemma3(tmp_path / "m.gguf"), write_tiny_llama(tmp_path / "relu.gguf")
    solved = solved_for(path, "shift_threshold", tmp_path / "solved")
    name = str(solved.path)
    assert "never calibrated" in refused(path, name, capsys=capsys)
    assert "for method shift_threshold, not exact" in refused(path, name, "--method", "exact", capsys=capsys)
    assert "another model" in refused(relu, name, capsys=capsys)
    assert "no such directory" in refused(path, str(tmp_path / "none"), capsys=capsys)
    fitted = solved_for(relu, "low_rank", tmp_path / "low")
    assert "fitted already" in refused(relu, str(fitted.path), "--sparsity", "0.5", capsys=capsys)
    empty = Solved.open_or_create(tmp_path / "empty", load_engine(RunConfig(model=str(path), method="dense")).file)
    assert "no predictors in it" in refused(path, str(empty.path), capsys=capsys)
    (solved.path / PREDICTOR).write_bytes(b"noise")
    assert "truncated" in refused(path, name, "--sparsity", "0.5", capsys=capsys)


def test_new_predictors_drop_the_calibration_of_the_old(tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "m.gguf")
    solved = solved_for(path, "shift_threshold", tmp_path / "solved")
    calibrated(solved, [0.5] * 7)
    assert CALIBRATE in Solved.open(solved.path).stages
    assert CALIBRATE not in solved_for(path, "gate_threshold", tmp_path / "solved").stages


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_eval_and_bench_take_it_too(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf")
    solved = solved_for(path, "low_rank", tmp_path / "solved")
    sizes = {"eval": ["--window", "64", "--windows", "2"], "bench": ["-p", "8", "-n", "4", "--rounds", "1"]}
    arguments = [command, "-m", str(path), "--predictor-path", str(solved.path), "--json", *sizes[command]]
    assert cli(arguments) == OK
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["method"] == "low_rank"
