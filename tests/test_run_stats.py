"""What a run tells of its placement: right counts, whatever the shards are, and the same text with it as without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import Engine, Generation, load, load_engine, run_stats
from pinfer.engine.place import Elsewhere
from pinfer.engine.run_stats import RunStatistics
from pinfer.ffn import HybridFFN, SparseFFN
from pinfer.kernels.registry import use_backend
from pinfer.overlap import Place
from pinfer.placement import LayerPlan, Plan
from pinfer.placement.statistics import from_tensors
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

PROMPT, TOKENS, NEURONS = [104, 101, 108, 108, 111], 14, 96


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("stats") / "m.gguf", n_layers=3, weight_type="Q8_0")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_stats, "SAMPLE_EVERY", 3)


def plan_file(folder: Path) -> str:
    hot = (torch.arange(NEURONS) % 3 == 0, torch.ones(NEURONS, dtype=torch.bool), torch.arange(NEURONS) < 40)
    path = folder / "plan.json"
    path.write_text(json.dumps(Plan(tuple(LayerPlan("gpu", one) for one in hot), "cpu").to_plain()))
    return str(path)


def generated(engine: Engine, statistics: RunStatistics | None) -> Generation:
    greedy = SamplingConfig(temperature=0)
    made = Generation(engine, PROMPT, max_tokens=TOKENS, sampling=greedy, ignore_eos=True, statistics=statistics)
    for _ in made:
        pass
    return made


def load_with(path: Path, plan: str | None) -> Engine:
    device = "cpu" if plan is None else "emulated"
    return load_engine(RunConfig(model=str(path), method="exact", threads=1, context=64, device=device, plan=plan))


@pytest.mark.parametrize("shards", [1, 2])
def test_a_split_run_is_counted_as_a_whole_one(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    monkeypatch.setattr(load, "_cold_places", lambda run, threads: [Place(1)] * shards)
    whole, split = load_with(llama, None), load_with(llama, plan_file(tmp_path))
    assert isinstance(split.model.ffns()[0], HybridFFN)
    assert len(split.model.ffns()[0].cold) == shards
    plain = generated(split, None)
    found, expected = RunStatistics(split, masses=True), RunStatistics(whole, masses=True)
    made, as_whole = generated(split, found), generated(whole, expected)
    assert made.ids == plain.ids == as_whole.ids
    assert made.stats.density == pytest.approx(plain.stats.density)
    tensors = found.tensors()
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
    statistics = from_tensors(tensors, 3)
    assert int(statistics[0].tokens) == len([step for step in range(TOKENS - 1) if step % 3 == 1])
    layers = found.layers()
    assert [layer.hot for layer in layers] == pytest.approx([1 / 3, 1, 40 / 96])
    assert layers[1].hot_hits == 1.0
    for layer, ffn in ((layers[0], split.model.ffns()[0]), (layers[2], split.model.ffns()[2])):
        parts = [one for one in ffn.modules() if isinstance(one, SparseFFN)]
        assert layer.hot_hits == pytest.approx(parts[0].activity.active / sum(one.activity.active for one in parts))
        assert layer.recall == 1.0
        assert layer.gpu_busy is not None
        assert layer.cpu_busy is not None
        assert min(layer.gpu_busy, layer.cpu_busy) > 0
        assert layer.transfer_bytes == 4 * 3 * shards * split.config.d_model  # x, the residual and the sum
    assert all(one.observe is None for ffn in split.model.ffns() for one in ffn.modules() if isinstance(one, SparseFFN))


def test_counts_are_of_the_decode_steps_of_all_generations(llama: Path) -> None:
    engine = load_with(llama, None)
    statistics = RunStatistics(engine)
    expected = []
    for _ in range(2):
        generated(engine, statistics)
        expected.append([ffn.activity.active for ffn in engine.model.ffns() if isinstance(ffn, SparseFFN)])
    last = Generation(engine, PROMPT, max_tokens=1, sampling=SamplingConfig(temperature=0), statistics=statistics)
    assert len(list(last)) <= 1, "its one token comes out of the prompt"
    steps = 2 * (TOKENS - 1)
    for number, layer in enumerate(statistics.layers()):
        assert layer.density == pytest.approx(sum(one[number] for one in expected) / (steps * NEURONS))


def test_what_crosses_is_counted_wherever_a_layer_lies(llama: Path, tmp_path: Path) -> None:
    """Attention on the GPU with its FFN on the CPU, the other way round, and a hot shard beside attention on the CPU."""
    n_hot = (0, NEURONS, NEURONS // 2)
    layers = [
        LayerPlan(home, torch.arange(NEURONS) < count)  # type: ignore[arg-type]
        for home, count in zip(("gpu", "cpu", "cpu"), n_hot, strict=True)
    ]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(Plan(tuple(layers), "cpu").to_plain()))
    engine = load_with(llama, str(path))
    for block in engine.model.layers:  # as a card would have them: an emulated one is the CPU
        block.ffn = Elsewhere(block.ffn, torch.device("cpu"))
    statistics = RunStatistics(engine)
    generated(engine, statistics)
    assert [layer.transfer_bytes for layer in statistics.layers()] == [
        12 * engine.config.d_model, 12 * engine.config.d_model, 24 * engine.config.d_model
    ]  # fmt: skip


def test_busy_shares_of_several_cold_shards_are_their_mean(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_cold_places", lambda run, threads: [Place(1)] * 2)
    statistics = RunStatistics(load_with(llama, plan_file(tmp_path)))
    timed = statistics._layers[0].timed
    timed.gpu_s, timed.cpu_s, timed.wall_s = 0.5, 1.5, 1.0
    assert (statistics.layers()[0].gpu_busy, statistics.layers()[0].cpu_busy) == (0.5, 0.75)


def test_recall_tells_of_neurons_that_are_missed(llama: Path) -> None:
    run = RunConfig(model=str(llama), method="low_rank", predictor_rank=32, recall=0.5, threads=1, context=64)
    engine = load_engine(run)
    statistics = RunStatistics(engine)
    generated(engine, statistics)
    assert all(layer.recall is not None and 0 < layer.recall < 1 for layer in statistics.layers())
    assert all(layer.gpu_busy is None and layer.hot_hits == 0 for layer in statistics.layers())


def test_without_relu_the_neurons_that_hold_most_count(tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "g.gguf", n_layers=2)
    engine = load_engine(RunConfig(model=str(path), method="gate_threshold", sparsity=0.5, context=64))
    statistics = RunStatistics(engine)
    generated(engine, statistics)
    found = from_tensors(statistics.tensors(), 2)
    truly = statistics.tensors()["blk.0.truly_fired"]
    assert 0 < int(truly.sum()) < int(found[0].tokens) * NEURONS
    assert float(found[0].mass.sum()) > 0


def test_a_dense_run_and_one_without_a_step_have_nothing_to_tell(llama: Path) -> None:
    with pytest.raises(ValueError, match="the dense method names none"):
        RunStatistics(load_engine(RunConfig(model=str(llama), method="dense")))
    with pytest.raises(ValueError, match="no statistics"), use_backend("auto"):
        RunStatistics(load_engine(RunConfig(model=str(llama)))).tensors()
