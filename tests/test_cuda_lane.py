"""Lanes beside a CUDA device, without one: a stand-in issues, captures and replays what a GPU would."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.engine.step import DecodeStep
from pinfer.ffn import HybridFFN
from pinfer.kernels import ops
from pinfer.kernels.cpp import binding, core_problem, load_core
from pinfer.kernels.cpp.binding import StepFailed
from pinfer.kernels.cpp.compile import call, find_compiler
from pinfer.kernels.cpp.program import Program, noting, recording
from pinfer.kernels.cpp.worker import Job, Place, Worker
from pinfer.kernels.select_active import Active
from pinfer.overlap import Lane, emulated
from pinfer.overlap.capture import Capture, becoming
from pinfer.overlap.cuda import STAGES, Stage, Staged, cuda
from pinfer.overlap.device import Device
from pinfer.overlap.driver import Driver
from tests.gguf_files import write_tiny_llama
from tests.test_overlap import PROMPT, greedy, split

pytest.importorskip("triton", reason="Triton is not installed on this platform")
pytestmark = pytest.mark.skipif(core_problem() is not None, reason=f"no CPU core: {core_problem()}")
POISON = float("nan")


class Graph:
    """Nodes in the order of their issue: programs of the core, for kernels, and what Python does in between."""

    def __init__(self) -> None:
        self.nodes: list[Callable[[], object]] = []
        self._program: Program | None = None

    def note(self, arguments: binding.Arguments, kept: tuple[object, ...]) -> None:
        if self._program is None:
            self._program = Program(1)
            self.nodes.append(self._program.run)
        self._program.append(arguments, kept)

    def add(self, node: Callable[[], object]) -> None:
        self.nodes.append(node)
        self._program = None

    def replay(self) -> None:
        for node in self.nodes:
            node()


class StandIn(Device):
    """Issues at once, or into a graph while one is captured; what is issued aside ends when it is joined."""

    def __init__(self) -> None:
        self.graph: Graph | None = None
        self._launched: list[threading.Thread] = []
        self._after: list[Callable[[], object]] | None = None

    @contextmanager
    def capture(self) -> Iterator[Capture]:
        self.graph = Graph()
        with binding.listening(self.graph.note), becoming(Capture(self.graph, lambda: None)) as capture:
            yield capture
        self.graph = None

    def capturing(self) -> bool:
        return self.graph is not None

    def _issue(self, node: Callable[[], object]) -> None:
        if self.graph is None:
            node()
        else:
            self.graph.add(node)

    @contextmanager
    def aside(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        after, self._after = self._after or [], None

        def joined() -> None:
            while self._launched:
                self._launched.pop().join()
            for node in after:
                node()

        self._issue(joined)

    def wait_aside(self) -> None:
        pass

    def host(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(like)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.full_like(like, POISON)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        node = lambda: target.copy_(source)  # noqa: E731
        if self._after is None:
            self._issue(node)
        else:  # behind a host function
            self._after.append(node)

    def launch(self, job: Job) -> None:
        def launched() -> None:
            self._launched.append(threading.Thread(target=load_core().pinfer_run_job, args=(job.address,)))
            self._launched[-1].start()

        self._issue(launched)
        self._after = []

    def publish(self, *arguments: Any) -> None:
        self._issue(lambda: super(StandIn, self).publish(*arguments))

    def collect(self, *arguments: Any) -> None:
        self._issue(lambda: super(StandIn, self).collect(*arguments))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("cuda") / "m.gguf", d_model=96, d_ffn=200)


def hybrid_of(path: Path, lane: Lane | None, **how: Any) -> HybridFFN:
    engine = load_engine(RunConfig(model=str(path), method="exact", precision="float32", threads=1))
    return split(engine, lane, 60, **how)[0]


@pytest.mark.parametrize("one_predictor", [False, True])
@pytest.mark.parametrize("n_cold", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_computes_what_its_shards_do(
    model_path: Path, stage: Stage, n_cold: int, one_predictor: bool, poisoned_memory: None
) -> None:
    """Also replayed, on other inputs than those of the capture, for which nothing was computed."""
    device = StandIn()
    lane = Staged(device, [Place()] * n_cold, stage, 20.0)
    plain, hybrid = (hybrid_of(model_path, one, one_predictor=one_predictor, n_cold=n_cold) for one in (None, lane))
    inputs = torch.randn(5, 2, 1, 96, generator=torch.Generator().manual_seed(2))
    expected = [plain(x, residual) for x, residual in inputs]
    for (x, residual), y in zip(inputs, expected, strict=True):
        assert torch.equal(hybrid(x, residual), y)
    many = torch.randn(7, 96)
    assert torch.equal(hybrid(many, many), plain(many, many))
    assert lane.recordable == (stage != "eager")
    if lane.recordable:
        x, residual = torch.zeros(2, 1, 96)
        before = hybrid.cold[0].activity.totals.clone()
        with device.capture() as capture:
            out = hybrid(x, residual)
        assert torch.equal(hybrid.cold[0].activity.totals, before), "the cold part runs with the graph alone"
        for given, y in zip(inputs, expected, strict=True):
            x.copy_(given[0])
            residual.copy_(given[1])
            out.fill_(POISON)
            capture.run()
            assert torch.equal(out, y)
    lane.close()


def test_weights_are_brought_piece_by_piece_and_one_ahead() -> None:
    device = StandIn()
    lane = Staged(device, [Place()], "eager", 20.0)
    pieces = [(torch.full((3,), float(i)), torch.full((2, 2), -float(i))) for i in range(5)]
    begun: list[int] = []

    def given() -> Iterator[tuple[torch.Tensor, ...]]:
        for i, piece in enumerate(pieces):
            begun.append(i)
            yield piece

    for i, brought in enumerate(lane.brought(given())):
        assert begun == list(range(min(i + 2, 5)))
        assert all(torch.equal(one, other) for one, other in zip(brought, pieces[i], strict=True))
    assert list(lane.brought([])) == []
    lane.close()


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_damaged_list_is_an_error_and_not_a_crash(model_path: Path, stage: Stage) -> None:
    """The device's list is what the worker checks before it reads weights by it."""
    device = StandIn()
    lane = Staged(device, [Place()], stage, 5.0)
    hybrid = hybrid_of(model_path, lane, one_predictor=True)
    x = torch.randn(1, 96)
    lists: list[torch.Tensor] = []
    original = device.publish, device.copy

    def publish(x: torch.Tensor, active: Active, *rest: Any) -> None:
        lists.append(active.count)
        original[0](x, active, *rest)

    def copy(source: torch.Tensor, target: torch.Tensor) -> None:
        if source.dtype == torch.int32 and source.numel() == 1:
            lists.append(source)
        original[1](source, target)

    device.publish, device.copy = publish, copy  # type: ignore[method-assign]
    with device.capture() as capture:
        hybrid(x, x)
    capture.run()
    assert device.graph is None
    graph: Any = capture._graph
    at = next(i for i, node in enumerate(graph.nodes) if getattr(node, "__self__", None).__class__ is not Program)
    graph.nodes.insert(at, lambda: lists[0].fill_(10**6))  # after the predictor, before the hand-over
    if stage == "flags":  # the collecting kernel is not to wait long for what does not come
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pinfer.kernels.handover.POLLS", 10)
            with pytest.raises(StepFailed):
                capture.run()
    else:
        with pytest.raises(StepFailed, match="not there"):
            capture.run()
    del graph.nodes[at]
    capture.run()
    lane.close()


def test_a_worker_that_comes_too_late_is_an_error(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIn()
    lane = Staged(device, [Place()], "flags", 5.0)
    hybrid, x = hybrid_of(model_path, lane), torch.randn(1, 96)
    with device.capture() as capture:
        hybrid(x, x)
    monkeypatch.setattr("pinfer.kernels.handover.POLLS", 0)
    original, (turn,) = device.publish, capture.turns.values()
    go = turn.programs[0]._kept[0][0]  # type: ignore[attr-defined]
    graph: Any = capture._graph
    late = [node for node in graph.nodes if "publish" in getattr(node, "__qualname__", "")]
    graph.nodes.remove(late[0])  # the flag is raised only after the device has given up
    graph.nodes.append(late[0])
    with pytest.raises(StepFailed, match="waited too long"):
        capture.run()
    assert int(go) == 1
    assert original is not None
    lane.close()


@pytest.mark.parametrize("listed", [None, [], [0, 3, 17]])
@pytest.mark.parametrize("width", [31, 1024, 2500])
def test_publish_and_collect_meet_a_worker(listed: list[int] | None, width: int, poisoned_memory: None) -> None:
    """The kernels in the interpreter, against the core's threads: y = x + x, many epochs."""
    worker = Worker(Place(), timeout_s=20.0)
    x, box, y = torch.zeros(1, width), torch.zeros(1, width), torch.zeros(1, width)
    go, back, epoch, failed = torch.zeros(4, 1, dtype=torch.int32)
    active = to_active = None
    if listed is not None:
        indices = torch.tensor([*listed, *[-7] * (20 - len(listed))], dtype=torch.int32)
        active = Active(indices, torch.tensor([len(listed)], dtype=torch.int32))
        to_active = Active(torch.full((20,), -1, dtype=torch.int32), torch.full((1,), -1, dtype=torch.int32))
    device = StandIn()
    program = Program(1)
    program.append(binding.Await(go.data_ptr(), epoch.data_ptr(), 20.0), (go, epoch))
    with noting(program), binding.running_on(lambda *_: None):
        twice = ops.add(box, box)
        binding.run(binding.Copy(twice.data_ptr(), twice.nbytes, y.data_ptr()), 1, twice, y)
    program.append(binding.Raise(back.data_ptr(), epoch.data_ptr(), 0.0), (back, epoch))
    job = Job(worker, program)
    for i in range(1, 6):
        epoch += 1
        x.normal_()
        out = torch.full((1, width), POISON)
        job.submit()
        device.publish(x, active, box, to_active, go, epoch)
        device.collect(y, back, epoch, failed, out)
        job.wait()
        assert torch.equal(out, x + x)
        assert int(go) == int(back) == i
        assert int(failed) == 0
    if to_active is not None and listed is not None:
        assert to_active.count.tolist() == [len(listed)]
        assert to_active.indices[: len(listed)].tolist() == listed
    worker.stop()


def test_collect_gives_up_once_a_step() -> None:
    y, out = torch.ones(1, 4), torch.zeros(1, 4)
    flag, epoch, failed = torch.tensor([[6], [7], [0]], dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pinfer.kernels.handover.POLLS", 3)
        StandIn().collect(y, flag, epoch, failed, out)
        assert int(failed) == 7
        patch.setattr("pinfer.kernels.handover.POLLS", 2**31 - 1)  # would take hours
        StandIn().collect(y, flag, epoch, failed, out)
    flag.fill_(-(2**31))  # far behind, or just before a number that has wrapped around
    epoch.fill_(2**31 - 1)
    failed.zero_()
    StandIn().collect(y, flag, epoch, failed, out)
    assert int(failed) == 0


FAKE_DRIVER = """
typedef void (*Function)(void*);
extern "C" {
int calls;
void* stream;
int cuLaunchHostFunc(void* on, Function function, void* data) {
    if (!on) return 400;  // CUDA_ERROR_INVALID_HANDLE
    ++calls, stream = on;
    function(data);
    return 0;
}
}
"""


def test_the_driver_is_called_as_its_documentation_says(tmp_path: Path) -> None:
    """A library of the driver's name and signature, whose 'stream' runs the function at once."""
    (tmp_path / "fake.cpp").write_text(FAKE_DRIVER)
    library = tmp_path / "libcuda.so.1"
    call(find_compiler(), ("-shared", "-fPIC", str(tmp_path / "fake.cpp"), "-o", str(library)))
    driver, worker = Driver(str(library)), Worker(Place())
    a = torch.ones(3)
    with noting(Program(1)) as program:
        y = ops.add(a, a)
    job = Job(worker, program)
    y.zero_()
    stream = 0x7FFF_1234_5678_9ABC  # all 64 bits must arrive
    driver.launch(stream, job)
    assert y.tolist() == [2, 2, 2]
    job.check()
    fake = ctypes.CDLL(str(library))
    assert ctypes.c_int.in_dll(fake, "calls").value == 1
    assert ctypes.c_void_p.in_dll(fake, "stream").value == stream
    with pytest.raises(RuntimeError, match="CUresult 400"):
        driver.launch(0, job)
    worker.stop()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_cuda_a_lane_says_so() -> None:
    with pytest.raises((OSError, RuntimeError, AssertionError)):
        cuda(1)


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(ValueError, match="stage 'fast' is none of eager, graph, flags"):
        Staged(StandIn(), [Place()], "fast", 1.0)  # type: ignore[arg-type]


class Faulty(Lane):
    """An emulated lane that is wrong, or fails, in recorded steps until it has stepped down."""

    def __init__(self, fails: bool, levels: int) -> None:
        self.inner, self.fails, self.left = emulated(1), fails, levels
        self.bad = torch.tensor([5], dtype=torch.int32)  # a count, of one neuron

    @property
    def recordable(self) -> bool:
        return True

    def run(self, *arguments: Any) -> list[torch.Tensor]:
        results = self.inner.run(*arguments)
        if (program := recording()) is not None and self.left:
            if self.fails:
                bad = self.bad
                program.append(binding.CheckList(bad.data_ptr(), bad.data_ptr(), 1), (bad,))
            else:
                y = results[0]
                program.append(binding.Add(y.data_ptr(), y.data_ptr(), y.numel(), y.data_ptr()), (y,))
        return results

    def step_down(self) -> str | None:
        self.left -= 1
        return "the safe way" if self.left >= 0 else None

    def close(self) -> None:
        self.inner.close()


def test_a_proven_step_that_fails_later_is_recorded_anew_as_well(model_path: Path) -> None:
    engine = load_engine(RunConfig(model=str(model_path), method="exact", threads=1))
    expected = greedy(engine)[0]
    lane = Faulty(fails=True, levels=1)
    lane.bad.zero_()
    split(engine, lane, 50)
    cache = engine.model.new_cache()
    with engine.computing():
        token = int(
            engine.model(torch.tensor([t % engine.config.vocab_size for t in PROMPT]), cache, last_only=True).argmax()
        )
        step, drawn = DecodeStep(engine.model, cache), [token]
        for number in range(len(expected) - 1):
            lane.bad.fill_(5 if number == 4 else 0)
            drawn.append(token := int(step(token).argmax()))
            assert step.recorded == (number != 4)
    assert drawn == expected
    assert len(step.remarks) == 1
    lane.bad.fill_(5)
    lane.close()


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_step_that_differs_or_fails_is_recorded_anew_in_a_safer_way(
    model_path: Path, fails: bool, levels: int
) -> None:
    engine = load_engine(RunConfig(model=str(model_path), method="exact", threads=1))
    expected = greedy(engine)[0]
    lane = Faulty(fails, levels)
    split(engine, lane, 50)
    drawn, step = greedy(engine)
    assert drawn == expected
    assert isinstance(step, DecodeStep)
    assert step.recorded
    assert len(step.remarks) == levels
    assert all(remark.endswith(": the safe way") for remark in step.remarks)
    lane.close()
