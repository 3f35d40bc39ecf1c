"""The recipe of the shipped model, end to end in miniature: invented text, tokenizer, training, export, and a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import Generation, load_engine
from pinfer.kernels.transpose import transpose_weights

train_tiny = pytest.importorskip(
    "experiments.train_tiny", reason="matplotlib is not installed (pip install 'pinfer[train]')"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    threads = torch.get_num_threads()
    flags = ["--smoke", "--no-compile", "--tokens", "4000"]
    for name in ("work", "results", "assets", "data"):
        flags += [f"--{name}", str(folder / name)]
    try:
        assert not train_tiny.main(flags)
    finally:
        torch.set_num_threads(threads)
    return folder


def test_every_figure_is_recorded(trained: Path) -> None:
    metrics = json.loads((trained / "results" / "metrics.json").read_text())
    assert metrics["q8_0"]["perplexity"] > 1
    assert 0 < metrics["q8_0"]["density"] < 1
    assert metrics["tokens"] >= 4000
    log = [json.loads(line) for line in (trained / "results" / "loss.jsonl").read_text().splitlines()]
    assert log[0]["loss"] > 0
    for name in ("loss.png", "frequencies.png"):
        assert (trained / "results" / name).read_bytes().startswith(b"\x89PNG")


def test_the_export_runs_here_and_sparse_equals_dense(trained: Path) -> None:
    (path,) = (trained / "assets").glob("*.gguf")
    texts = []
    for method in ("exact", "dense"):
        engine = load_engine(RunConfig(model=str(path), method=method))
        ids = engine.tokenizer.encode("the near")
        generation = Generation(engine, ids, max_tokens=20, sampling=SamplingConfig(temperature=0), ignore_eos=True)
        list(generation)
        texts.append(generation.ids)
    assert texts[0] == texts[1]
    ffn = load_engine(RunConfig(model=str(path), method="dense")).model.ffns()[0]
    assert transpose_weights(ffn.down)[1] == 0, "down must be exported in tiles that share a scale"


@pytest.mark.parametrize("flag", [["--tokens", "0"], ["--target-density", "2"], ["--ablation", "magic"], ["--what"]])
def test_bad_arguments_exit_2_with_one_line(flag: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_tiny.main(flag)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
