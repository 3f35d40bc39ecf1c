"""Tuned launch parameters without a GPU: a toy op over a named device, with a timer that knows the times."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pinfer.kernels import ops, tuning
from pinfer.kernels.registry import Op
from pinfer.kernels.tuning import expect_density, launch_for, tune, use_cache

CPU = torch.device("cpu")
GPU = "Toy, 9.0, 4 multiprocessors, Triton 3"


@dataclass(frozen=True)
class Launch:
    rows: int
    num_warps: int


DEFAULT = Launch(4, 8)
BETTER, WORSE, RAISES, WRONG, FORGETS = (Launch(rows, 1) for rows in (1, 2, 3, 5, 6))
TIMES = {DEFAULT: 10.0, BETTER: 5.0, WORSE: 12.0, RAISES: 1.0, WRONG: 2.0, FORGETS: 3.0}
launched: list[Launch] = []


def double(x: torch.Tensor) -> torch.Tensor:
    """The toy op, 2 x: a launcher that asks as ours do, and does as its parameters say."""
    launch = launch_for("double", x.device, DEFAULT, candidates=lambda: [*TIMES, BETTER], width=len(x))
    launched.append(launch)
    if launch == RAISES:
        raise RuntimeError("out of registers")
    out = torch.empty_like(x)
    # Fresh memory may well hold the last run's result: then only the fill with NaN tells.
    if launch != FORGETS or not out.isnan().any():
        out.copy_(2.01 * x if launch == WRONG else 2 * x)
    return out


def double_twice(x: torch.Tensor) -> torch.Tensor:
    """Two kernels: `double`, and one after it that has its own default and one candidate."""
    y = double(x)
    launch = launch_for("after", x.device, DEFAULT, candidates=lambda: [BETTER], width=len(x))
    launched.append(launch)
    return y


def known_times(launches: Sequence[Callable[[], object]]) -> float:
    """The sum over the kernels of a launch."""
    launched.clear()
    for launch in launches:
        launch()
    return sum(TIMES[one] for one in launched) / len(launches)


def toy_op(name: str = "double") -> Op:
    """A row whose implementation is this module's function of that name."""
    return dataclasses.replace(
        ops.rms_norm,
        name="double",
        reference=lambda x: 2 * x,
        triton=f"{__name__}:{name}",
        make_inputs=lambda generator, width: {"x": torch.randn(width, generator=generator)},
        bytes_moved=lambda x: 8 * x.numel(),
        tolerance=1e-5,
    )


def two_inputs() -> list[dict[str, Any]]:
    return [{"x": torch.arange(1.0, 9.0)}, {"x": torch.arange(2.0, 10.0)}]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache on a toy GPU, for an op list of the toy alone."""
    monkeypatch.setattr(ops, "OPS", (toy_op(),))
    tuning.forget()
    with use_cache(tmp_path / "cache" / "tuning.json", GPU):
        yield tmp_path / "cache" / "tuning.json"
    tuning.forget()


def asked(width: int = 8, default: Any = DEFAULT, **more: Any) -> Any:
    return launch_for("double", CPU, default, width=width, **more)


def found(**options: Any) -> dict[str, Any]:
    """The entry that tuning the toy op leaves."""
    entries = tune("double", two_inputs, **{"timer": known_times, **options})
    assert list(entries) == ["double width=8"]
    return entries["double width=8"]


def edited(file: Path, **changes: Any) -> None:
    """Change the one entry of the file as another hand would."""
    content = json.loads(file.read_text())
    content["gpus"][GPU]["double width=8"]["any"].update(changes)
    file.write_text(json.dumps(content))
    tuning.forget()


# Lookups


def test_without_a_result_the_default_comes_back(file: Path) -> None:
    assert asked() is DEFAULT
    assert not file.exists()


def test_a_tuned_launch_comes_back_also_in_a_new_process(file: Path) -> None:
    found()
    assert asked() == BETTER
    tuning.forget()
    assert asked() == BETTER
    code = (
        "import torch; from pathlib import Path; from dataclasses import make_dataclass; from pinfer.kernels import tuning\n"
        "Launch = make_dataclass('Launch', ['rows', 'num_warps'], frozen=True)\n"
        f"with tuning.use_cache(Path({str(file)!r}), {GPU!r}):\n"
        "    print(tuning.launch_for('double', torch.device('cpu'), Launch(4, 8), width=8))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "Launch(rows=1, num_warps=1)\n", ran.stderr


def test_the_order_of_a_shapes_names_is_of_no_matter(file: Path) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        launched.append(launch_for("double", x.device, DEFAULT, candidates=lambda: [BETTER], type="F16", width=8))
        return 2 * x

    tune("double", two_inputs, run=run, timer=known_times)
    assert launch_for("double", CPU, DEFAULT, width=8, type="F16") == BETTER


def test_another_gpu_triton_shape_or_kernel_keeps_its_default(file: Path) -> None:
    found()
    assert asked() == BETTER  # and what was answered once is not taken for another's answer
    assert asked(width=9) is DEFAULT
    assert asked(type="F16") is DEFAULT
    assert launch_for("triple", CPU, DEFAULT, width=8) is DEFAULT
    for other in (GPU.replace("Toy", "Other"), GPU.replace("9.0", "8.0"), GPU.replace("Triton 3", "Triton 4")):
        with use_cache(file, other):
            assert asked() is DEFAULT


def test_a_gpus_name_tells_what_results_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(name="Toy", major=9, minor=0, multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3"))
    tuning.gpu_key.cache_clear()
    assert tuning.gpu_key(torch.device("cuda", 0)) == GPU
    assert tuning.gpu_key(CPU) is None
    tuning.gpu_key.cache_clear()


def test_a_cpu_and_a_switched_off_cache_give_defaults(file: Path) -> None:
    found()
    with use_cache(file):
        assert asked() is DEFAULT
        with pytest.raises(ValueError, match="not on a GPU"):
            found()
    with use_cache(None, GPU):
        assert asked() is DEFAULT
        with pytest.raises(ValueError, match="switched off"):
            found()
    assert asked() == BETTER
    file.write_text("damaged")
    tuning.forget()
    with use_cache(file), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked() is DEFAULT  # without a look at the file


def test_the_environment_names_the_file_and_switches_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PINFER_TUNING", "PINFER_NO_TUNING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PINFER_CACHE", str(tmp_path))
    assert tuning.cache_path() == tmp_path / "tuning.json"
    monkeypatch.setenv("PINFER_TUNING", str(tmp_path / "mine.json"))
    assert tuning.cache_path() == tmp_path / "mine.json"
    monkeypatch.setenv("PINFER_NO_TUNING", "1")
    assert tuning.cache_path() is None


# Densities


def test_results_are_kept_by_density_and_the_nearest_is_taken(file: Path) -> None:
    with expect_density(0.09):
        found()
    with expect_density(0.5):
        assert asked() == BETTER  # of 0.1, until there is one of its own
        found(timer=lambda launches: 1.0)  # nothing is quicker: the default is the result
        assert asked() == DEFAULT
    expected = {0.0: BETTER, 0.1: BETTER, 0.2: BETTER, 0.3: DEFAULT, 1.0: DEFAULT}
    for density, launch in expected.items():
        with expect_density(density):
            assert asked() == launch, density
    assert asked() == BETTER  # who states none is taken to be sparse
    with expect_density(0.5), expect_density(None):
        assert asked() == BETTER


def test_what_is_tuned_without_a_density_holds_for_all(file: Path) -> None:
    found()
    with expect_density(0.1):
        assert asked() == BETTER
        found(timer=lambda launches: 1.0)
        assert asked() == DEFAULT


@pytest.mark.parametrize(
    ("density", "bucket"), [(None, "any"), (0, "0.03"), (0.06, "0.1"), (0.4, "0.5"), (0.75, "1.0"), (1, "1.0")]
)
def test_buckets_go_by_ratio(density: float | None, bucket: str) -> None:
    assert tuning.density_bucket(density) == bucket


@pytest.mark.parametrize("density", [-0.1, 1.1, math.nan])
def test_a_density_is_a_share(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        expect_density(density)


# The search


def test_the_quickest_right_candidate_is_found_and_the_rest_counted(file: Path) -> None:
    entry = found()
    assert (entry["launch"], entry["us"]) == ({"rows": 1, "num_warps": 1}, 5.0)
    assert (entry["default"], entry["default_us"]) == ({"rows": 4, "num_warps": 8}, 10.0)
    # Those that raise, give another result or leave memory unwritten are quicker and out.
    assert (entry["tried"], entry["failed"], entry["wrong"]) == (5, 1, 2)


@pytest.mark.parametrize(("better_us", "launch"), [(9.81, DEFAULT), (9.79, BETTER)])
def test_a_default_gives_way_to_two_percent(
    file: Path, monkeypatch: pytest.MonkeyPatch, better_us: float, launch: Launch
) -> None:
    monkeypatch.setitem(TIMES, BETTER, better_us)
    assert found()["launch"] == dataclasses.asdict(launch)


def test_a_lucky_first_timing_does_not_win(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Launch] = []

    def timer(launches: Sequence[Callable[[], object]]) -> float:
        us = known_times(launches)
        lucky = launched[0] == WORSE and WORSE not in seen
        seen.append(launched[0])
        return 1.0 if lucky else us

    assert found(timer=timer)["launch"] == dataclasses.asdict(DEFAULT)


def test_all_rotating_inputs_are_timed_and_candidates_prepared(file: Path) -> None:
    sizes, prepared = [], []

    def timer(launches: Sequence[Callable[[], Any]]) -> float:
        sizes.append([float(launch()[0]) for launch in launches])
        return known_times(launches)

    def prepare(jobs: Any) -> None:
        assert not sizes
        launched.clear()
        for job in jobs:
            try:
                job()
            except RuntimeError:
                prepared.append("raised")
        prepared.extend(launched)

    found(timer=timer, prepare=prepare)
    assert set(map(tuple, sizes)) == {(2.0, 4.0)}
    assert set(prepared) == {*TIMES, "raised"}
    assert len(prepared) == len(TIMES) + 1


def test_a_result_is_kept_unless_asked_again(file: Path) -> None:
    found()
    before = file.stat().st_mtime_ns
    assert found(timer=lambda launches: pytest.fail("timed again"))["us"] == 5.0
    assert file.stat().st_mtime_ns == before
    assert found(timer=lambda launches: 1.0, again=True)["us"] == 1.0
    assert asked() == DEFAULT


def test_only_so_many_are_tried(file: Path) -> None:
    entry = found(at_most=1)
    assert (entry["tried"], entry["launch"]["rows"]) == (1, BETTER.rows)


def test_kernels_of_an_op_are_tuned_one_after_the_other(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "OPS", (toy_op("double_twice"),))
    entries = tune("double", two_inputs, timer=known_times)
    assert {key: (entry["default_us"], entry["us"]) for key, entry in entries.items()} == {
        "double width=8": (20.0, 15.0),
        "after width=8": (15.0, 10.0),  # with the first as tuned
    }
    assert asked() == launch_for("after", CPU, DEFAULT, width=8) == BETTER


def test_the_first_kernel_is_on_disk_when_the_second_fails(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "OPS", (toy_op("double_twice"),))

    def timer(launches: Sequence[Callable[[], object]]) -> float:
        if file.exists():
            raise KeyboardInterrupt
        return known_times(launches)

    with pytest.raises(KeyboardInterrupt):
        tune("double", two_inputs, timer=timer)
    tuning.forget()
    assert asked() == BETTER
    launched.clear()
    double(torch.ones(8))
    assert launched == [BETTER]  # and nothing stays forced


def test_what_the_default_raises_is_raised(file: Path) -> None:
    def run(x: torch.Tensor) -> None:
        double(x)
        raise RuntimeError("no default either")

    with pytest.raises(RuntimeError, match="no default"):
        found(run=run)
    with pytest.raises(ValueError, match="'nothing' is none of double"):
        tune("nothing", two_inputs)


def test_agreement_looks_into_tuples_and_dataclasses() -> None:
    @dataclass
    class Pair:
        one: torch.Tensor
        other: int = 1

    right, wrong = torch.ones(4), torch.tensor([1.0, 1, 1, 1.1])
    agrees = tuning._agrees
    assert agrees((right, Pair(right)), (right, Pair(right)), 0.0)
    assert not agrees((right, Pair(wrong)), (right, Pair(right)), 1e-3)
    assert agrees((right, Pair(wrong)), (right, Pair(right)), 0.1)
    assert not agrees(Pair(right, 2), Pair(right), 0.1)
    assert not agrees(torch.tensor([math.nan]), torch.ones(1), 0.1)
    assert not agrees(torch.ones(2), torch.ones(1), 0.1)
    assert agrees(torch.zeros(3), torch.zeros(3), 0.0)


def test_memory_is_poisoned_for_the_check_alone() -> None:
    with tuning._poisoned_memory():
        assert torch.empty(100).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_forced_launch_reaches_a_triton_kernel(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed on this platform")
    import triton.language as tl

    monkeypatch.setitem(globals(), "tl", tl)  # where a jitted function looks names up

    @triton.jit
    def _kernel(x_ptr, out_ptr, block_ptr, size, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, 2 * tl.load(x_ptr + at, mask=at < size), mask=at < size)
        tl.store(block_ptr, BLOCK)

    blocks: list[int] = []

    def run(x: torch.Tensor) -> torch.Tensor:
        candidates = [Launch(2, 1), Launch(3, 1), Launch(8, 1)]  # 3 is no power of two: it does not compile
        launch = launch_for("jitted", x.device, DEFAULT, candidates=lambda: candidates, width=len(x))
        out, block = torch.empty_like(x), torch.zeros(1, dtype=torch.int32)
        _kernel[(triton.cdiv(len(x), launch.rows),)](x, out, block, len(x), BLOCK=launch.rows)
        blocks.append(int(block))
        return out

    def timer(launches: Sequence[Callable[[], object]]) -> float:
        launches[0]()
        return 100.0 / blocks[-1]

    entry = tune("double", two_inputs, run=run, timer=timer)["jitted width=8"]
    assert (entry["launch"]["rows"], entry["tried"], entry["failed"], entry["wrong"]) == (8, 3, 1, 0)
    assert torch.equal(run(torch.ones(8)), torch.full((8,), 2.0))
    assert blocks[-1] == 8


# The file


@pytest.mark.parametrize(
    "changes",
    [
        {"launch": {"rows": 1}},
        {"launch": {"rows": 1, "num_warps": 1, "stages": 1}},
        {"launch": {"rows": 0, "num_warps": 1}},
        {"launch": {"rows": 1.5, "num_warps": 1}},
        {"launch": {"rows": True, "num_warps": 1}},
        {"default": {"rows": 8, "num_warps": 8}},
    ],
)
def test_an_entry_that_does_not_fit_is_ignored_with_one_warning(file: Path, changes: dict[str, Any]) -> None:
    found()
    edited(file, **changes)
    with pytest.warns(RuntimeWarning, match=r"tuning\.json.*double width=8") as caught:
        assert asked() is DEFAULT
        assert launch_for("double", CPU, Launch(4, 9), width=8) == Launch(4, 9)
    assert len(caught) == 1
    assert found()["us"] == 5.0  # searched anew
    assert asked() == BETTER


def test_a_launch_class_of_other_fields_does_not_take_the_entry(file: Path) -> None:
    @dataclass(frozen=True)
    class Other:
        rows: int

    found()
    with pytest.warns(RuntimeWarning):
        assert asked(default=Other(4)) == Other(4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"gpus": {}}',
        '{"format": 2, "gpus": {}}',
        '{"format": 1, "gpus": []}',
        '{"format": 1, "gpus": {"a": {"b": {"any": {"launch": {}}}}}}',
        '{"format": 1, "gpus": {"a": {"b": {"any": 3}}}}',
        "\udce4\udcff",
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_one_warning_and_replaced(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(RuntimeWarning, match=r"tuning\.json") as caught:
        assert asked() is DEFAULT
        assert asked(width=9) is DEFAULT
        found()
    assert len(caught) == 1
    tuning.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked() == BETTER


def test_a_kill_while_writing_leaves_the_last_results(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found()
    before = file.read_bytes()

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            found(again=True, timer=lambda launches: 1.0)
    assert file.read_bytes() == before
    assert asked() == BETTER
    found(again=True, timer=lambda launches: 1.0)  # what the kill left behind is in nobody's way
    assert asked() == DEFAULT


def test_writers_at_the_same_time_are_all_kept(file: Path) -> None:
    file.parent.mkdir()
    entry = found()
    start = threading.Barrier(4)

    def write(writer: int) -> None:
        start.wait()
        for number in range(10):
            tuning._keep(file, GPU, f"kernel {writer} {number}", "any", entry)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(file.read_text())["gpus"][GPU]) == 1 + 4 * 10


def test_what_another_process_wrote_is_kept(file: Path) -> None:
    found()
    assert asked() == BETTER  # the file is known as it was
    content = json.loads(file.read_text())
    content["gpus"]["another GPU"] = content["gpus"][GPU]
    file.write_text(json.dumps(content))
    found(again=True)
    assert set(json.loads(file.read_text())["gpus"]) == {GPU, "another GPU"}


def test_the_command_shows_and_clears(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with expect_density(0.1):
        found()
    monkeypatch.setenv("PINFER_TUNING", str(file))
    assert tuning.main([]) == 0
    shown = capsys.readouterr().out
    assert "double width=8 density 0.1: 10.0 -> 5.0 us, 5 tried, 1 failed, 2 wrong: rows=1 num_warps=1\n" in shown
    assert tuning.main(["--clear"]) == 0
    assert not file.exists()
    monkeypatch.setenv("PINFER_NO_TUNING", "1")
    assert tuning.main([]) == 2
    assert "PINFER_NO_TUNING" in capsys.readouterr().err


def test_it_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; sys.modules['numpy'] = None; import pinfer.kernels.tuning as t;"
    code += "import torch; print(t.gpu_key(torch.device('cpu')), 'pinfer.kernels.ops' in sys.modules)"
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert ran.stdout == "None False\n", ran.stderr
