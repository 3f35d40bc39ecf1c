"""Which plan a run has, that it keeps to its budget, and what happens where memory runs out all the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.cli.main import BAD_INPUT, OK
from pinfer.cli.main import run as cli
from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import SHIPPED_MODEL, Engine, Generation, load, load_engine
from pinfer.engine.devices import Account, Cuda, Device, Emulated, device_for
from pinfer.engine.place import place_model
from pinfer.engine.plans import Placer, read_plan
from pinfer.engine.rates import GpuRates, Rates
from pinfer.engine.shape import model_shape
from pinfer.ffn import HybridFFN
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.models import build_model
from pinfer.overlap.lane import WorkerLane
from pinfer.placement import LayerPlan, Plan
from pinfer.placement.memory import Reserves
from pinfer.sparsify import exact_predictors, sparsify
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

PROMPT = [104, 101, 108, 108, 111]
LAYERS, NEURONS, CONTEXT = 4, 96, 64
SHIPPED_SOLVED = str(SHIPPED_MODEL.with_name("pinfer-tiny.pinfer"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("plans") / "m.gguf", n_layers=LAYERS, weight_type="Q8_0")


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gemma3(tmp_path_factory.mktemp("plans") / "g.gguf", weight_type="Q8_0")


def run_config(path: Path | str, **more: Any) -> RunConfig:
    return RunConfig(model=str(path), context=CONTEXT, **({"device": "emulated"} | more))


def drawn(engine: Engine, prompt: list[int] = PROMPT) -> list[int]:
    generation = Generation(engine, prompt, max_tokens=10, sampling=SamplingConfig(temperature=0), ignore_eos=True)
    for _ in generation:
        pass
    return generation.ids


def placer(path: Path, device: Device, **more: Any) -> Placer:
    gguf = GGUFFile.open(path)
    shape = model_shape(gguf, model_config(gguf), "exact", rearranged=False)
    return Placer(run_config(path, **more), "exact", shape, CONTEXT, device)


@pytest.mark.parametrize("gpu_layers", [0, 1, 4, 5, 20, -1])
def test_gpu_layers_draw_the_same_text(llama: Path, gpu_layers: int) -> None:
    engine = load_engine(run_config(llama, gpu_layers=gpu_layers))
    assert drawn(engine) == drawn(load_engine(run_config(llama, device="cpu")))
    found = engine.placement
    assert found is not None
    assert found.n_layers == (4 if gpu_layers == -1 else min(4, gpu_layers))
    assert found.plan.head == ("gpu" if gpu_layers in (5, 20, -1) else "cpu")
    assert engine.vram_bytes == found.device.account.used > 0 or gpu_layers == 0
    assert any("layers wholly on the emulated GPU" in note for note in engine.notes)


@pytest.mark.parametrize("method", [{"method": "dense"}, {"method": "gate_threshold", "sparsity": 0.4}], ids=str)
def test_gpu_layers_work_for_other_families_and_methods(gemma3: Path, method: dict[str, Any]) -> None:
    expected = drawn(load_engine(run_config(gemma3, device="cpu", **method)), [300, 301])
    assert drawn(load_engine(run_config(gemma3, gpu_layers=3, **method)), [300, 301]) == expected


def test_without_a_gpu_a_run_goes_on_and_says_so(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = load_engine(run_config(llama, device="auto", gpu_layers=20, gpu_memory_gb=16))
    assert engine.placement is None
    assert engine.vram_bytes == 0
    [note] = [note for note in engine.notes if "--gpu-layers 20" in note]
    assert "--gpu-memory-gb 16" in note
    assert "no CUDA device" in note
    assert "--device emulated" in note
    on_cpu = load_engine(run_config(llama, device="auto", backend="cpu", gpu_layers=20))
    assert any("--gpu-layers 20: backend is cpu" in note for note in on_cpu.notes)
    with pytest.raises(ValueError, match="device cuda: torch finds no CUDA device"):
        load_engine(run_config(llama, device="cuda"))


def written(folder: Path, plan: Plan) -> str:
    path = folder / "plan.json"
    path.write_text(json.dumps(plan.to_plain()))
    return str(path)


def half(n_layers: int = LAYERS, n: int = NEURONS) -> Plan:
    hot = torch.arange(n) % 2 == 0
    return Plan(tuple(LayerPlan("gpu" if i % 2 else "cpu", hot) for i in range(n_layers)), "gpu")


def test_a_plan_file_is_run(llama: Path, tmp_path: Path) -> None:
    engine = load_engine(run_config(llama, plan=written(tmp_path, half())))
    assert [type(ffn) for ffn in engine.model.ffns()] == [HybridFFN] * LAYERS
    assert drawn(engine) == drawn(load_engine(run_config(llama, device="cpu")))
    both = load_engine(run_config(llama, plan=written(tmp_path, half()), gpu_layers=2))
    assert [isinstance(ffn, HybridFFN) for ffn in both.model.ffns()] == [True, True, False, False]
    assert both.placement is not None
    assert both.placement.n_layers == 2


@pytest.mark.parametrize(("threads", "of_device", "of_worker"), [(1, 1, 1), (2, 1, 1), (5, 2, 3)])
def test_an_emulated_device_and_its_workers_share_the_threads(
    llama: Path, tmp_path: Path, threads: int, of_device: int, of_worker: int
) -> None:
    path = written(tmp_path, Plan.uniform(LAYERS, NEURONS, 0.5))
    engine = load_engine(run_config(llama, method="exact", plan=path, threads=threads))
    ffn = engine.model.ffns()[0]
    assert isinstance(ffn, HybridFFN) and isinstance(ffn.lane, WorkerLane)
    assert (torch.get_num_threads(), [one.place.threads for one in ffn.lane.workers]) == (of_device, [of_worker])


def test_prompts_bring_cold_weights_where_that_was_measured_to_be_faster(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, Plan.uniform(LAYERS, NEURONS, 0.5))
    ways: list[str] = []
    brought = Emulated.lane

    def watched(device: Emulated, places: Any, prefill: Any = None) -> Any:
        lane = brought(device, places, prefill)
        assert lane is not None
        before = lane.brought
        monkeypatch.setattr(lane, "brought", lambda pieces: ways.append("brought") or before(pieces))
        return lane

    monkeypatch.setattr(Emulated, "lane", watched)
    texts = []
    for to_gpu in (1.0, 1e15):
        rates = Rates({1: 1e9}, GpuRates(1e12, to_gpu, 1e9, 1e-5, 1e-6, 1e-6), 1e9)
        monkeypatch.setattr(load, "kept_rates", lambda _, rates=rates: rates)
        texts.append(drawn(load_engine(run_config(llama, method="exact", plan=path, precision="float32"))))
        assert ways == ([] if to_gpu == 1.0 else ["brought"] * LAYERS)
    assert texts[0] == texts[1]


def test_a_plan_of_whole_layers_runs_a_dense_model(llama: Path, tmp_path: Path) -> None:
    plan = written(tmp_path, Plan.whole_layers(LAYERS, NEURONS, 3))
    engine = load_engine(run_config(llama, method="dense", plan=plan))
    assert engine.placement is not None
    assert (engine.placement.n_layers, engine.placement.source) == (3, f"plan {plan}")
    assert drawn(engine) == drawn(load_engine(run_config(llama, method="dense", device="cpu")))


def test_a_plan_that_does_not_belong_here_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a plan of 3 layers for a model of 4"):
        load_engine(run_config(llama, plan=written(tmp_path, half(3))))
    with pytest.raises(ValueError, match="the dense method does not name"):
        load_engine(run_config(llama, plan=written(tmp_path, half()), method="dense"))
    for content, problem in (("{", "not JSON"), ("[]", "a list"), ('{"format": 1}', "no plan")):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=rf"bad\.json.*{problem}"):
            read_plan(str(tmp_path / "bad.json"))
    with pytest.raises(FileNotFoundError):
        read_plan(str(tmp_path / "none.json"))


def test_what_does_not_fit_is_refused_with_what_would(llama: Path) -> None:
    every = placer(llama, Emulated())
    needed = [every.memory(every._layers(count)).gpu_bytes for count in range(6)]
    assert needed == sorted(needed)
    budget = (needed[2] + needed[3]) / 2e9
    with pytest.raises(ValueError, match=r"--gpu-layers 4.*kv.*budget is .* most that fits is --gpu-layers 2"):
        load_engine(run_config(llama, gpu_layers=4, gpu_memory_gb=budget))
    engine = load_engine(run_config(llama, gpu_layers=2, gpu_memory_gb=budget))
    assert engine.vram_bytes <= 1e9 * budget
    most = load_engine(run_config(llama, gpu_memory_gb=budget)).placement
    assert most is not None
    assert most.n_layers == 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_the_estimate_covers_what_is_placed(llama: Path, seed: int, data: st.DataObject) -> None:
    """Random plans, and random budgets that they fit: never a byte above either."""
    generator = torch.Generator().manual_seed(seed)
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), min_size=LAYERS, max_size=LAYERS))
    homes = data.draw(st.lists(st.sampled_from(["gpu", "cpu"]), min_size=LAYERS, max_size=LAYERS))
    layers = [
        LayerPlan(home, torch.rand(NEURONS, generator=generator) < share)  # type: ignore[arg-type]
        for home, share in zip(homes, shares, strict=True)
    ]
    plan = Plan(tuple(layers), data.draw(st.sampled_from(["gpu", "cpu"])))
    estimate = placer(llama, Emulated()).checked(plan, "random").estimate.gpu_bytes
    budget = estimate + data.draw(st.integers(0, 1000))
    device = Emulated(budget)
    found = placer(llama, device).checked(plan, "random")
    gguf = GGUFFile.open(llama)
    model = sparsify(build_model(gguf, model_config(gguf), CONTEXT), exact_predictors, found.plan)
    place_model(model, found.plan, device)
    assert device.account.peak <= estimate <= budget
    if estimate:
        with pytest.raises(ValueError, match="the most that fits"):
            placer(llama, Emulated(estimate - 1)).checked(plan, "random")


@pytest.mark.parametrize("context", [1025, 20_000])
def test_a_budget_of_the_estimate_is_enough_for_a_long_context(tmp_path: Path, context: int) -> None:
    """The tables of the rotary embedding, of which Gemma has two, grow with it."""
    path = write_tiny_gemma3(tmp_path / "g.gguf", weight_type="Q8_0", context=context)
    run = dataclasses.replace(run_config(path, gpu_layers=1, method="dense"), context=context)
    found = load_engine(run).placement
    assert found is not None
    engine = load_engine(dataclasses.replace(run, gpu_memory_gb=found.estimate.gpu_bytes / 1e9))
    assert not [note for note in engine.notes if "out of GPU memory" in note]
    assert engine.vram_bytes <= found.placed_bytes + found.estimate.gpu["rope"]


class Short(Emulated):
    """A device with less memory than it says."""

    def __init__(self, said: int | None, really: int) -> None:
        super().__init__(said)
        self.account = Account(really)


@pytest.mark.parametrize("plan", [None, half()], ids=["layers", "neurons"])
def test_memory_that_runs_out_is_stepped_down_from_once(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Plan | None
) -> None:
    asked: dict[str, Any] = {"gpu_layers": -1} if plan is None else {"plan": written(tmp_path, plan)}
    asked["threads"] = 4
    whole = load_engine(run_config(llama, **asked))
    expected, short = drawn(whole), whole.vram_bytes - 1
    devices: list[Short] = []

    def fewer(name: str, limit: int | None) -> Short:
        devices.append(Short(limit, short))
        return devices[-1]

    monkeypatch.setattr(load, "device_for", fewer)
    engine = load_engine(run_config(llama, **asked))
    assert len(devices) == 2
    assert torch.get_num_threads() == (4 if plan is None else 2)
    assert drawn(engine) == expected
    assert 0 < engine.vram_bytes <= short
    assert any("out of GPU memory" in note and "smaller placement" in note for note in engine.notes)


def test_memory_that_runs_out_twice_is_a_clean_end(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = iter([150_000, 100])
    monkeypatch.setattr(load, "device_for", lambda name, limit: Short(limit, next(really)))
    with pytest.raises(RuntimeError, match=r"out of GPU memory.*twice: give a smaller") as failure:
        load_engine(run_config(llama, gpu_layers=-1))
    assert not isinstance(failure.value, torch.OutOfMemoryError)


def test_a_budget_and_statistics_are_solved_for(tmp_path: Path) -> None:
    """The shipped model's directory has statistics and no plan."""
    run = RunConfig(
        predictor_path=SHIPPED_SOLVED, device="emulated", gpu_layers=2, gpu_memory_gb=0.018, context=CONTEXT
    )
    engine = load_engine(run)
    assert engine.placement is not None
    assert "statistics" in engine.placement.source
    assert 0 < engine.vram_bytes <= engine.placement.estimate.gpu_bytes <= 0.018e9
    prompt = engine.tokenizer.encode("In the beginning")
    expected = drawn(load_engine(dataclasses.replace(run, device="cpu", gpu_layers=None, gpu_memory_gb=None)), prompt)
    assert drawn(engine, prompt) == expected


def test_an_account_counts_to_its_limit() -> None:
    account = Account(100)
    account.take(60)
    with pytest.raises(torch.OutOfMemoryError, match="41 bytes more than 60 would pass the limit of 100"):
        account.take(41)
    account.take(40)
    assert (account.used, account.peak) == (100, 100)


def test_an_evaluation_of_a_dense_run_is_placed_as_well(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello the world " * 20)
    arguments = ["eval", "-m", str(llama), "-f", str(text), "--window", "32", "--windows", "1", "--method", "dense"]
    emulated = ["--device", "emulated", "--gpu-layers", "2"]
    assert cli([*arguments, *emulated]) == OK
    assert "2 of 4 layers wholly on the emulated GPU" in capsys.readouterr().err
    assert cli([*arguments, *emulated, "--gpu-memory-gb", "0.00001"]) == BAD_INPUT
    assert "the budget is" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["generate", "-p", "hello"], ["eval"]])
def test_a_cold_fraction_beside_a_device_is_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli([*command, "--device", "emulated", "--cold-fraction", "0.5"]) == BAD_INPUT
    assert "cold_fraction 0.5 has no meaning with device emulated" in capsys.readouterr().err


def test_an_evaluation_runs_a_placement(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("hello the world " * 20)
    arguments = [
        "eval",
        "-m",
        str(llama),
        "-f",
        str(text),
        "--window",
        "32",
        "--windows",
        "2",
        "--method",
        "exact",
        "--json",
    ]
    found = []
    for more in ([], ["--device", "emulated", "--plan", written(tmp_path, half())]):
        assert cli([*arguments, *more]) == OK
        found.append(json.loads(capsys.readouterr().out))
    for name in ("perplexity", "dense_perplexity", "density", "recall"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "budget"), [(24_000_000_000, 24_000_000_000), (None, 70_550_000_000), (10**12, 70_550_000_000)]
)
def test_a_card_is_capped_at_its_budget(monkeypatch: pytest.MonkeyPatch, asked: int | None, budget: int) -> None:
    """70 of 80 GB are free; the process's own context of 0.55 GB is taken already, and not torch's."""
    shares: list[float] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70_000_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    card = device_for("auto", asked)
    assert isinstance(card, Cuda)
    assert card.budget == budget
    assert card.account.limit == budget - Reserves().context_bytes
    assert shares == [card.account.limit / 80_000_000_000]


def test_devices_go_by_name_and_by_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_for("cpu", None) is None
    assert device_for("auto", 5) is None
    emulated = device_for("emulated", 5)
    assert isinstance(emulated, Emulated)
    assert (emulated.budget, emulated.account.limit) == (5, 5)
    with pytest.raises(ValueError, match="device is cuda"):
        RunConfig(device="cuda", backend="cpu")
    with pytest.raises(ValueError, match=r"cold_fraction 0\.5 has no meaning with device emulated"):
        RunConfig(device="emulated", cold_fraction=0.5)
