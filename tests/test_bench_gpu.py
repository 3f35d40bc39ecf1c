"""The GPU benchmark without a GPU: its baselines and checks in the interpreter, its bookkeeping, its command."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from bench.baselines import deja_vu, dense, teal
from bench.gpu import __main__ as command
from bench.gpu import bandwidth, machine, measure, run, timing, trees
from bench.gpu.candidates import Candidate, candidates, of_op
from bench.gpu.cells import SHAPES, Cell, planned
from bench.gpu.checks import check
from bench.gpu.report import best_dense, derive, write_report
from bench.gpu.run import Bench, is_ours_and_red
from bench.gpu.store import Store
from bench.gpu.timing import Timer, Times
from bench.gpu.verdict import Line, verdict
from pinfer.kernels import ops, tuning
from pinfer.kernels.registry import Op
from pinfer.kernels.select_active.reference import Active
from pinfer.quant import QuantTensor

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {"gpu": "test", "code": "1"}
FP32 = {"dtype": torch.float32}  # the interpreter's atomics know no fp16


def error_of(result: torch.Tensor, expected: torch.Tensor) -> float:
    return trees.relative_error(result, expected)


def among_nans(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with NaN right before and behind them, so that a read out of bounds shows."""
    if not tensor.is_floating_point():
        return tensor
    room = torch.full((tensor.numel() + 2 * 4096,), math.nan)
    room[4096:-4096] = tensor.flatten()
    return room[4096:-4096].view(tensor.shape)


# The two schemes and the dense chain


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("neurons", "width"), [(64, 48), (123, 31), (200, 257)])
def test_teal_computes_what_it_defines(
    neurons: int, width: int, density: float, generator: torch.Generator, poisoned_memory: None
) -> None:
    inputs = trees.map_tensors(
        among_nans, teal.make_inputs(generator, neurons=neurons, width=width, density=density, **FP32)
    )
    result = teal.teal_ffn(**inputs, block_inputs=64, block_outputs=128)
    assert error_of(result, teal.reference(**inputs)) < 1e-6


def test_teals_definition_is_the_sum_over_kept_inputs(generator: torch.Generator) -> None:
    inputs = teal.make_inputs(generator, neurons=9, width=7, density=0.5, **FP32)
    x, (gate, up), down = inputs["x"][0].double(), inputs["gate_up"].double(), inputs["down"].double()
    pre = [
        sum((x[j] * w[j] for j in range(7) if abs(x[j]) > inputs["x_threshold"]), torch.zeros(9)) for w in (gate, up)
    ]
    hidden = [float(g * u / (1 + math.exp(-g))) for g, u in zip(*pre, strict=True)]
    expected = sum((h * row for h, row in zip(hidden, down, strict=True) if abs(h) > inputs["hidden_threshold"]))
    assert error_of(teal.reference(**inputs)[0], expected.float()) < 1e-6
    assert (inputs["x"].abs() > inputs["x_threshold"]).sum() == round(0.5 * 7)


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("neurons", "width"), [(64, 48), (123, 31), (50, 300)])
def test_deja_vu_computes_what_it_defines(
    neurons: int, width: int, density: float, generator: torch.Generator, poisoned_memory: None
) -> None:
    inputs = trees.map_tensors(
        among_nans, deja_vu.make_inputs(generator, neurons=neurons, width=width, density=density, **FP32)
    )
    assert inputs["indices"].numel() == round(density * neurons)
    result = deja_vu.deja_vu_ffn(**inputs, block_neurons=16, block_width=128)
    assert error_of(result, deja_vu.reference(**inputs)) < 1e-6


def test_deja_vus_definition_is_a_dense_ffn_of_the_listed_neurons(generator: torch.Generator) -> None:
    inputs = deja_vu.make_inputs(generator, neurons=40, width=24, density=0.5, **FP32)
    chosen = torch.zeros(40, 1)
    chosen[inputs["indices"].long()] = 1
    gate_up = torch.cat([inputs["gate"], inputs["up"]])
    everything = dense.reference(inputs["x"], gate_up, (inputs["down"] * chosen).T)
    assert error_of(deja_vu.reference(**inputs), everything) < 1e-6


@pytest.mark.parametrize("module", [teal, deja_vu])
def test_every_variant_of_a_scheme_agrees(module: Any, generator: torch.Generator) -> None:
    inputs = module.make_inputs(generator, neurons=70, width=96, density=0.4, **FP32)
    ffn = teal.teal_ffn if module is teal else deja_vu.deja_vu_ffn
    for variant in module.VARIANTS:
        assert error_of(ffn(**inputs, **variant), module.reference(**inputs)) < 1e-6


def test_the_predictor_lists_the_best_scores(generator: torch.Generator) -> None:
    inputs = deja_vu.predictor_inputs(generator, neurons=50, width=16, density=0.2, **FP32)
    values, indices = deja_vu.predict(**inputs)
    scores = torch.relu(inputs["x"] @ inputs["first"].T) @ inputs["second"].T
    torch.testing.assert_close(scores[0][indices.long()], values)
    assert values.min() >= scores[0].sort(descending=True).values[10]


def test_the_dense_chain_is_the_same_stacked_or_not(generator: torch.Generator) -> None:
    inputs = dense.make_inputs(generator, tokens=3, neurons=40, width=24, dtype=torch.float32)
    for variant in dense.VARIANTS:
        assert error_of(dense.chain(**inputs, **variant), dense.reference(**inputs)) < 1e-6


@pytest.mark.parametrize("size", [1, 4096, 5000])
def test_bandwidth_kernels_touch_every_byte(size: int, generator: torch.Generator) -> None:
    source = among_nans(torch.rand(size, generator=generator))
    target, sums = torch.full_like(source, math.nan), torch.full((3,), math.nan)
    bandwidth.copy(source, target)
    bandwidth.read(source, sums)
    assert torch.equal(source, target)
    torch.testing.assert_close(sums.sum(), source.sum())


# Trees of tensors and the check


def test_trees_reach_tensors_inside_dataclasses_and_named_tuples(generator: torch.Generator) -> None:
    inputs = ops.sparse_ffn.make_inputs(generator, type="Q8_0", tokens=2, neurons=9, width=32, density=0.5, masked=True)
    copied = trees.clone(inputs)
    assert len(trees.tensors(copied)) == 7  # x, gate, up, down, the list and its count, the mask
    assert isinstance(copied["active"], Active)
    assert isinstance(copied["gate"], QuantTensor)
    pointers = [{tensor.data_ptr() for tensor in trees.tensors(tree)} for tree in (inputs, copied)]
    assert not pointers[0] & pointers[1]
    copied["x"].zero_()
    trees.restore(copied, inputs)
    assert torch.equal(copied["x"], inputs["x"])
    assert trees.held_bytes({"x": torch.zeros(3), "more": (torch.zeros(2, dtype=torch.int8), None)}) == 14


def test_relative_error_is_never_small_for_a_wrong_result() -> None:
    one = torch.ones(4)
    listed = Active(torch.tensor([1, 2, 9]), torch.tensor([2]))
    assert error_of(one, one) == 0
    assert error_of(1.5 * one, one) == 0.5
    assert trees.relative_error(one[:3], one) == math.inf
    assert trees.relative_error(one.int(), one) == math.inf
    assert math.isnan(trees.relative_error(one * math.nan, one))
    assert math.isnan(trees.relative_error((one, one * math.nan), (one, one)))
    assert trees.relative_error(listed, Active(torch.tensor([1, 2, 0]), torch.tensor([2]))) == 0
    assert trees.relative_error(listed, Active(torch.tensor([1, 3, 9]), torch.tensor([2]))) == math.inf
    assert trees.relative_error((listed, None), (listed, one)) == math.inf


def test_same_bits_tells_minus_zero_from_zero_and_knows_nan() -> None:
    assert trees.same_bits(torch.tensor([math.nan]), torch.tensor([math.nan]))
    assert not trees.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not trees.same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert trees.same_bits((None, torch.ones(1, 2)), (None, torch.ones(1, 2)))


def plain(run: Any, tolerance: float = 1e-5, **options: Any) -> Any:
    inputs = {"x": torch.arange(1.0, 9.0)}
    return check(run, lambda x: 2 * x, inputs, inputs, tolerance, **options)


def test_the_check_passes_what_is_right_and_names_what_is_wrong() -> None:
    results = iter([2.0, 2.000001])
    assert plain(lambda x: 2 * x).passed
    assert "above" in plain(lambda x: 2.1 * x).reason
    assert "above" in plain(lambda x: torch.empty_like(x)).reason  # poisoned, so never luckily right
    assert "two runs differ" in plain(lambda x: next(results) * x).reason
    assert "ZeroDivisionError" in plain(lambda x: x / (1 // 0)).reason
    loose = iter([2.0, 2.000001])
    assert plain(lambda x: next(loose) * x, repeatable=False).passed
    assert plain(lambda x: x * math.nan).record()["error"] is None  # JSON knows no NaN


def test_the_check_gives_each_run_its_own_inputs() -> None:
    assert plain(lambda x: x.mul_(2)).passed


# Candidates and cells


@pytest.mark.parametrize("dry", [True, False])
def test_every_cell_is_one_its_candidate_can_make(dry: bool) -> None:
    cells = planned(dry)
    assert len({json.dumps(cell.config) for cell in cells}) == len(cells)
    for cell in cells:
        inspect.signature(candidates()[cell.candidate].make_inputs).bind(None, **dict(cell.case))
    assert [cell.level for cell in cells] == sorted(cell.level for cell in cells)


def test_the_first_cells_decide_the_headline() -> None:
    first = [cell.label for cell in planned() if cell.level == 0]
    for expected in ("ffn/cublas 7B F16 T1", "ffn/pinfer 7B BF16 T1 90%", "ffn/teal 7B F16 T1 50%"):
        assert expected in first
    by_label = {cell.label: at for at, cell in enumerate(planned())}
    assert (
        by_label["ffn/pinfer 70B F16 T1 90%"]
        < by_label["ffn/pinfer 7B F16 T1 0%"]
        < by_label["ffn/pinfer 7B Q6_K T1 90%"]
    )


def test_shapes_are_whole_in_every_types_blocks() -> None:
    assert all(shape.width % 256 == 0 and shape.neurons % 256 == 0 for shape in SHAPES.values())


TOY: list[tuple[str, dict[str, Any]]] = [
    ("ffn/cublas", {"type": "F16", "tokens": 2, "neurons": 32, "width": 16}),
    ("ffn/pinfer-dense", {"type": "F16", "tokens": 1, "neurons": 32, "width": 32}),
    ("ffn/pinfer", {"type": "F16", "tokens": 1, "neurons": 24, "width": 32, "density": 0.3}),
    ("ffn/teal", {"neurons": 32, "width": 16, "density": 0.3}),
    ("ffn/deja-vu", {"neurons": 32, "width": 16, "density": 0.3}),
    ("predictor/deja-vu", {"neurons": 32, "width": 16, "density": 0.3}),
    ("quant_matmul/cublas", {"type": "F16", "tokens": 1, "rows": 8, "columns": 16}),
    ("select_active/pinfer", {"tokens": 1, "neurons": 40, "density": 0.3}),
]


@pytest.mark.parametrize(("name", "case"), TOY, ids=[name for name, _ in TOY])
def test_a_cell_has_its_error_beside_its_time(name: str, case: dict[str, Any]) -> None:
    values = measure.measure_cell(candidates()[name], case, name, Timer(torch.device("cpu"), 0.4))
    assert values["passed"], values["reason"]
    assert 0 <= values["error"] <= values["tolerance"]
    assert values["us_p20"] <= values["us_p50"] <= values["us_p80"]
    assert values["gb_per_s"] == pytest.approx(values["bytes"] / values["us_p50"] / 1e3)
    assert ("active_neurons" in values) == (name == "ffn/pinfer")


def test_a_wrong_kernel_is_not_timed() -> None:
    name, case = TOY[2]
    right = candidates()[name]
    wrong = dataclasses.replace(right, run=lambda **inputs: 1.01 * right.run(**inputs))
    values = measure.measure_cell(wrong, case, name, Timer(torch.device("cpu"), 0.4))
    assert not values["passed"]
    assert "us_p50" not in values


# Timing, over a device that only counts


class FakeGraph:
    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        FakeEvent.now += 0.032  # milliseconds: 16 launches of 2 µs


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


@pytest.fixture
def counting_device(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    graphs: list[FakeGraph] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    def made() -> FakeGraph:
        graphs.append(FakeGraph())
        return graphs[-1]

    fakes = {
        "CUDAGraph": made, "Event": FakeEvent, "Stream": lambda: stream, "current_stream": lambda: stream,
        "stream": lambda given: contextlib.nullcontext(), "graph": lambda given: contextlib.nullcontext(),
        "synchronize": lambda device=None: None, "mem_get_info": lambda device: (10_000_000_000, 0),
        "memory_reserved": lambda device: 0, "memory_allocated": lambda device: 0,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=50_000_000),
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return graphs


def test_copies_outrun_the_cache_and_fit_the_memory(counting_device: list[FakeGraph]) -> None:
    timer = Timer(torch.device("cuda"), 0.4)
    assert timer.copies(touched=27_000_000, held=270_000_000) == 6  # 162 MB touched, three times 50 MB and more
    assert timer.copies(touched=1_400_000_000, held=1_400_000_000) == 2
    assert timer.copies(touched=1_000_000, held=1_000_000_000) == 4  # 40 % of 10 GB
    assert timer.copies(touched=1_000_000, held=5_000_000_000) == 0
    assert timer.copies(touched=1, held=1) == timing.MAX_COPIES


def test_a_replay_cycles_through_the_copies(counting_device: list[FakeGraph]) -> None:
    launched: list[int] = []
    launches = [lambda n=n: launched.append(n) for n in range(8)]
    times = Timer(torch.device("cuda"), 0.4).measure(launches)
    assert launched == [*range(8), *range(8), *range(8)]  # once each before the capture, then twice in the graph
    assert times.p50_us == pytest.approx(2.0)
    assert timing.MIN_REPLAYS <= times.replays <= timing.MAX_REPLAYS
    warm = counting_device[0].replays - times.replays
    assert warm * 32e-6 >= timing.WARM_SECONDS


def test_percentiles_are_in_order() -> None:
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Times(2.0, 3.5, 5.0, 6)


# Results on disk, the budget, the verdict


def stored(folder: Path, **environment: Any) -> Store:
    return Store(folder, ENVIRONMENT | environment)


def test_results_are_found_again_by_environment_and_config(tmp_path: Path) -> None:
    store = stored(tmp_path)
    store.put("cell", {"n": 1}, {"passed": True, "us_p50": 2.0})
    store.put("cell", {"n": 1}, {"passed": True, "us_p50": 3.0})
    store.save()
    again = stored(tmp_path)
    assert [record["us_p50"] for record in again.current()] == [3.0]
    assert again.find("check", {"n": 1}) is None
    other = stored(tmp_path, code="2")
    assert other.current() == []
    other.put("cell", {"n": 1}, {"passed": True, "us_p50": 4.0})
    other.save()
    assert [record["us_p50"] for record in stored(tmp_path).current()] == [3.0]
    assert Store(tmp_path, ENVIRONMENT, again=True).current() == []


def test_a_kill_while_writing_leaves_the_last_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = stored(tmp_path)
    store.put("cell", {"n": 1}, {"passed": True})
    store.save()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    store.put("cell", {"n": 2}, {"passed": True})
    with pytest.raises(KeyboardInterrupt):
        store.save()
    assert len(stored(tmp_path).current()) == 1


def toy_cell(n: int, provider: str = "cublas") -> Cell:
    case = {"type": "F16", "tokens": 1, "neurons": 32, "width": 32 * n}
    return Cell(f"ffn/{provider}", "toy", "F16", 1, None, tuple(case.items()), 0)


def run_over(folder: Path, seconds: float = 60.0, **options: Any) -> Bench:
    given = {"started": time.time(), "seconds": seconds, "keep_failures": False} | options
    return Bench(stored(folder), Timer(torch.device("cpu"), 0.4), **given)


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_over(tmp_path).cells([toy_cell(1)])
    monkeypatch.setattr("bench.gpu.run.measure_cell", lambda *_: pytest.fail("measured again"))
    again = run_over(tmp_path)
    again.cells([toy_cell(1)])
    assert len(again.store.current("cell")) == 1


def test_cells_that_the_time_does_not_suffice_for_are_named(tmp_path: Path) -> None:
    bench = run_over(tmp_path, seconds=10.0)
    bench.spent_s["cublas"] = [30.0]
    bench.cells([toy_cell(1), toy_cell(1, "pinfer-dense")])
    assert [record["config"]["provider"] for record in bench.store.current("cell")] == ["pinfer-dense"]
    text = write_report(bench.store, [toy_cell(1)], unchecked=0, seconds=1.0, dry=True)
    assert "1 cells" in text
    assert "ffn/cublas toy F16" in text


def test_a_red_op_is_not_timed_and_others_are(tmp_path: Path) -> None:
    bench = run_over(tmp_path)
    bench.failed_ops = {"quant_matmul"}
    bench.cells([toy_cell(1, "pinfer-dense"), toy_cell(1)])
    ours, theirs = bench.store.current("cell")
    assert "quant_matmul failed" in ours["reason"]
    assert "us_p50" not in ours
    assert theirs["passed"]


def test_a_failing_op_is_recorded_and_the_next_one_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = dataclasses.replace(ops.rms_norm, triton="bench.gpu.nowhere:rms_norm")
    monkeypatch.setattr("bench.gpu.run.ops.OPS", (broken, ops.select_active))
    bench = run_over(tmp_path)
    bench.checks(None)
    assert bench.failed_ops == {"rms_norm"}
    passed = {record["config"]["op"]: record["passed"] for record in bench.store.current("check")}
    assert passed == {"rms_norm": False, "select_active": True}
    assert any(is_ours_and_red(record) for record in bench.store.current())


def test_checks_stop_when_their_share_of_the_time_is_gone(tmp_path: Path) -> None:
    bench = run_over(tmp_path, started=time.time() - 59.0)
    bench.checks({"select_active"})
    assert bench.unchecked > 0
    assert bench.store.current() == []


def test_a_failure_is_tried_again_but_not_after_a_restart(tmp_path: Path) -> None:
    bench = run_over(tmp_path)
    bench.store.put("cell", toy_cell(1).config, {"passed": False, "reason": "lost"})
    assert bench.done("cell", toy_cell(1).config) is None
    bench.keep_failures = True
    assert bench.done("cell", toy_cell(1).config)


def a_record(
    provider: str, us: float, type: str = "F16", shape: str = "7B", sparsity: int | None = 90, **more: Any
) -> Any:
    config = {
        "task": "ffn",
        "provider": provider,
        "shape": shape,
        "type": type,
        "tokens": 1,
        "sparsity_percent": sparsity,
    }
    metrics = {"us_p50": us, "gb_per_s": 1800.0, "passed": True, "dense": sparsity is None, "environment": 0}
    return {"kind": "cell", "config": config, **metrics, **more}


def test_speed_ups_are_over_the_best_dense_in_halves_or_the_same_type() -> None:
    records = [
        a_record("cublas", 90.0, sparsity=None),
        a_record("torch-compile", 80.0, sparsity=None),
        a_record("cublas", 10.0, sparsity=None, shape="70B"),
        a_record("cublas", 85.0, sparsity=None, type="BF16"),
        a_record("pinfer-dense", 40.0, sparsity=None, type="Q4_K"),
        a_record("pinfer-dense", 5.0, sparsity=None, passed=False),
        a_record("pinfer", 16.0),
        a_record("pinfer", 17.0, type="BF16"),
        a_record("pinfer", 10.0, type="Q4_K"),
        {"kind": "bandwidth", "config": {"way": "copy (torch)"}, "passed": True, "gb_per_s": 2000.0},
    ]
    derive(records)
    assert [record["speedup"] for record in records[6:9]] == [5.0, 5.0, 4.0]
    assert records[6]["best_dense"] == "torch-compile"
    assert records[6]["share_of_copy"] == 0.9
    assert records[6]["share_of_read"] is None
    assert best_dense(a_record("pinfer", 1.0, shape="13B"), records) is None


def test_the_verdict_passes_fails_and_says_what_was_not_measured() -> None:
    records = [
        a_record("cublas", 80.0, sparsity=None),
        a_record("pinfer", 16.0),
        a_record("pinfer", 60.0, sparsity=50),
        a_record("pinfer", 81.0, sparsity=0),
        a_record("teal", 24.0),
        a_record("deja-vu", 17.0),
    ]
    derive(records)
    lines = {line.promise: line for line in verdict(records)}
    assert lines["7B F16 at 90 %: × best dense"].status == "PASS"
    assert lines["7B F16 at 50 %: × best dense"].status == "FAIL"
    assert lines["7B BF16 at 90 %: × best dense"].status == "not measured"
    assert lines["70B F16 at 90 %: share of copy bandwidth"].status == "not measured"
    assert lines["F16 at 90 %: × teal, the least of the shapes"].figure == 1.5
    assert lines["F16 at 90 %: × deja-vu, the least of the shapes"].status == "FAIL"
    assert lines["At most 10 % sparsity, batch 1: × best dense, the least of all"].status == "FAIL"
    assert Line("at the bound", 4.5, 4.5).status == "PASS"


def test_a_gpus_folder_is_a_plain_name() -> None:
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_digest_changes_with_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "pinfer" / "kernels").mkdir(parents=True)
    source = tmp_path / "pinfer" / "kernels" / "one.py"
    source.write_text("a = 1\n")
    before = machine.code_digest()
    source.write_text("a = 2\n")
    assert machine.code_digest() != before


# The command


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    given = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(given, capture_output=True, text=True, env=clean, cwd=ROOT)


def test_a_dry_run_writes_results_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Within this process, whose interpreter is quick; what it wrote is resumed by the command itself."""
    only = "ffn/deja-vu 7B F16 T1 90,ffn/pinfer 7B F16 T1 90,ffn/cublas 7B F16 T1"
    monkeypatch.setattr(command, "STARTED", time.time())
    assert command.main(["--dry-run", "-o", str(tmp_path), "--only", only]) == 0
    first = capsys.readouterr().out
    saved = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    kinds = [record["kind"] for record in saved["records"]]
    assert (kinds.count("bandwidth"), kinds.count("cell")) == (3, 3)
    assert {r["config"]["op"] for r in saved["records"] if r["kind"] == "check"} == {"sparse_ffn"}
    assert saved["environments"][0]["times_mean_nothing"] is True
    report = (tmp_path / "report.md").read_text()
    assert "The times mean nothing" in report
    assert "PASS" not in report
    assert (tmp_path / "roofline.png").exists() or "matplotlib" in report
    second = run_command("--dry-run", "-o", str(tmp_path), "--only", only)
    assert second.returncode == 0
    assert " s left  ffn" in first
    assert " s left  ffn" not in second.stdout
    assert len(json.loads((tmp_path / "results.json").read_text())["records"]) == len(saved["records"])


def test_a_lost_gpu_restarts_the_run_within_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def lost(*_: Any) -> None:
        raise run.DeviceLost("a kernel faulted")

    def replaced(path: str, arguments: list[str]) -> None:
        calls.append(arguments)
        raise SystemExit

    monkeypatch.setattr(run.Bench, "bandwidth", lost)
    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setattr(sys, "argv", ["bench", "--dry-run", "--again"])
    monkeypatch.setenv(run.RESTARTED, "5.0:0")  # so that monkeypatch puts it back
    options = command.parser().parse_args(["--dry-run", "--again", "-o", str(tmp_path), "--only", "7B F16"])
    with pytest.raises(SystemExit):
        run.run(options, started=7.0)
    assert calls == [[sys.executable, "-m", "bench.gpu", "--dry-run", "-o", str(tmp_path)]]
    assert os.environ[run.RESTARTED] == "5.0:1"
    monkeypatch.setenv(run.RESTARTED, f"5.0:{run.MAX_RESTARTS}")
    assert run.run(options, started=7.0) == 0
    assert len(calls) == 1


@dataclasses.dataclass(frozen=True)
class Launch:
    rows: int


rows_taken: list[int] = []


def rows_of(op: Op, monkeypatch: pytest.MonkeyPatch) -> Candidate:
    """An op's reference as a candidate of ours whose launcher takes 1 row, or 2 or 4 where it is told so."""

    def listed(**inputs: Any) -> Any:
        shape = {"neurons": inputs["scores"].shape[1]}
        options = [Launch(rows) for rows in (1, 2, 4, 8)]
        launch = tuning.launch_for("toy", torch.device("cpu"), Launch(1), candidates=lambda: options, **shape)
        rows_taken.append(launch.rows)
        return op.reference(**inputs)

    candidate = dataclasses.replace(of_op(op), run=listed)
    monkeypatch.setattr(run, "candidates", lambda: {candidate.name: candidate})
    rows_taken.clear()
    return candidate


def listing_cell(sparsity: int, neurons: int = 40) -> Cell:
    case = {"tokens": 1, "neurons": neurons, "density": 1 - sparsity / 100}
    return Cell("select_active/pinfer", "toy", None, 1, sparsity, tuple(case.items()), 0)


def faster_with_more_rows(launches: Any, quick: bool = False) -> Times:
    launches[0]()
    return Times.of([100.0 / rows_taken[-1]])


def test_cells_are_tuned_once_a_bucket_and_timed_as_tuned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of(ops.select_active, monkeypatch)
    bench = run_over(tmp_path)
    monkeypatch.setattr(bench.timer, "measure", faster_with_more_rows)
    near, far, other = listing_cell(90), listing_cell(91), listing_cell(50)
    bench.cells([near])
    assert set(rows_taken) == {1}
    run.tune([near, far, other], bench)
    said = [line for line in capsys.readouterr().out.splitlines() if "tuned toy neurons=40" in line]
    assert [line.split("tuned ")[1] for line in said] == 2 * ["toy neurons=40: 100.0 -> 25.0 us, 2 tried: rows=4"]
    saved = json.loads((tmp_path / "tuning.json").read_text())["gpus"]["interpreter"]["toy neurons=40"]
    assert list(saved) == ["0.1", "0.5"]
    rows_taken.clear()
    bench.cells([near, far, other, listing_cell(90, neurons=41)])  # the last was not tuned
    records = {
        r["config"]["case"]["neurons"] * 100 + r["config"]["sparsity_percent"]: r for r in bench.store.current("cell")
    }
    assert {key: record.get("tuned") for key, record in records.items()} == {
        4090: {"toy neurons=40": {"rows": 4}},  # measured anew: on record by default alone
        4091: {"toy neurons=40": {"rows": 4}},
        4050: {"toy neurons=40": {"rows": 4}},
        4190: None,
    }
    assert set(rows_taken) == {4, 1}
    rows_taken.clear()
    bench.cells([near, far, other])
    assert rows_taken == []
    untuned = run_over(tmp_path)  # a run without --tune beside a file of results
    untuned.cells([near])
    assert set(rows_taken) == {1}


def test_tuning_stops_with_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows_of(ops.select_active, monkeypatch)
    bench = run_over(tmp_path, seconds=-1.0)
    run.tune([listing_cell(90), listing_cell(50)], bench)
    assert "no time to tune 2 of 2" in capsys.readouterr().out
    assert bench.tuned == {}


def test_a_kernel_that_cannot_be_tuned_is_on_record_and_timed_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_of(ops.select_active, monkeypatch)
    bench, cell = run_over(tmp_path), listing_cell(90)
    monkeypatch.setattr(bench.timer, "measure", lambda *_, **__: 1 / 0)
    run.tune([cell], bench)
    record = bench.store.find("tuning", {"launches": cell.launches})
    assert record is not None
    assert "ZeroDivisionError" in record["reason"]
    assert is_ours_and_red(record)
    assert bench.tuned == {}
    bench.keep_failures = True  # after a restart it is left alone
    monkeypatch.setattr(bench.timer, "copies", lambda *_: pytest.fail("tuned again"))
    run.tune([cell], bench)


def test_baselines_and_red_ops_are_not_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("tuned"))
    bench = run_over(tmp_path)
    bench.failed_ops = {"quant_matmul"}
    run.tune([toy_cell(1), toy_cell(1, "pinfer-dense")], bench)
    assert bench.store.records == []


def test_checks_run_with_default_launches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Any] = []
    monkeypatch.setattr(run.Bench, "_check", lambda *_: places.append(tuning._place.get()))
    run_over(tmp_path).checks({"select_active"})
    assert set(places) == {(None, None)}


@pytest.mark.parametrize(("total", "chosen"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 3]), (59, [0, 29, 58])])
def test_a_few_cases_are_spread_over_all(total: int, chosen: list[int]) -> None:
    assert run.spread(range(total), 3) == chosen


def test_a_dry_run_checks_quantised_types_and_several_tokens(tmp_path: Path) -> None:
    for op in (ops.sparse_ffn, ops.quant_matmul):
        chosen = [config["case"] for config in run_over(tmp_path)._check_configs(op)]
        assert any(case["type"].startswith("Q") for case in chosen)
        assert any(case["tokens"] > 1 for case in chosen)


def test_it_runs_with_torch_and_triton_alone(tmp_path: Path) -> None:
    """A GPU machine has no gguf, numpy's plots or command-line libraries; and pinfer is not installed."""
    block = "import sys; sys.modules.update(dict.fromkeys(('gguf', 'matplotlib', 'typer', 'rich', 'tokenizers')));"
    start = "import bench.gpu.__main__ as m; sys.exit(m.main(sys.argv[1:]))"
    given = ["--dry-run", "--only", "quant_matmul/cublas 7B", "-o", str(tmp_path)]
    ran = subprocess.run([sys.executable, "-c", f"{block} {start}", *given], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert "No roofline" not in (tmp_path / "report.md").read_text()  # nothing to draw without an FFN cell


def test_bad_calls_end_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.main([]) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err
    assert command.main(["--dry-run", "--memory", "2"]) == 2
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PINFER_NO_TUNING", "1")
    assert command.main(["--tune"]) == 2
    assert "PINFER_NO_TUNING" in capsys.readouterr().err


# Compiled for an H100 without one: the JIT's own way, up to the launch.

COMPILE = """
import sys, torch
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Named:  # a driver that knows its target and can launch nothing
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Named())
from bench.baselines import deja_vu, teal
from bench.gpu import bandwidth
from bench.gpu.compile_ahead import compile_ahead
from pinfer.kernels.compiled.compile import resource_usage

generator = torch.Generator().manual_seed(1)
jobs, kernels = [], {}
for module, run in ((teal, teal.teal_ffn), (deja_vu, deja_vu.deja_vu_ffn)):
    inputs = module.make_inputs(generator, neurons=256, width=128, density=0.5)
    jobs += [lambda r=run, i=inputs, v=v: r(**i, **v) for v in module.VARIANTS]
x = torch.zeros(4096)
jobs += [lambda: bandwidth.copy(x, torch.zeros(4096)), lambda: bandwidth.read(x, torch.zeros(16)), lambda: 1 / 0]
print("compiled", compile_ahead(jobs))
for kernel in (teal._teal_kernel, deja_vu._gather_glu_kernel, deja_vu._gather_transposed_kernel,
               bandwidth._copy_kernel, bandwidth._read_kernel):
    for made in kernel.device_caches[0][0].values():
        stack = resource_usage(made.asm["cubin"])["STACK"]
        print("kernel", kernel.fn.__name__, stack, "v4" in made.asm["ptx"] or "v8" in made.asm["ptx"])
"""


def test_baselines_compile_ahead_for_an_h100_without_spills(tmp_path: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    clean["TRITON_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=clean, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr[-2000:]
    rows = [line.split() for line in ran.stdout.splitlines()]
    variants = len(teal.VARIANTS), len(deja_vu.VARIANTS)
    assert rows[0] == ["compiled", str(2 * sum(variants) + 2)]
    assert len(rows) == 1 + 2 * sum(variants) + 2
    assert [row for row in rows[1:] if row[2:] != ["0", "True"]] == []  # no stack, 16-byte loads
