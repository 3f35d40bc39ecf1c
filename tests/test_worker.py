"""The core's workers: jobs run beside the caller, what fails ends in an error, and no wait is endless."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from pinfer.kernels import ops
from pinfer.kernels.cpp import binding, core_problem, load_core
from pinfer.kernels.cpp import worker as workers
from pinfer.kernels.cpp.binding import StepFailed
from pinfer.kernels.cpp.program import Program, noting
from pinfer.kernels.cpp.worker import Job, Place, Worker

pytestmark = pytest.mark.skipif(core_problem() is not None, reason=f"no CPU core: {core_problem()}")


@pytest.fixture
def worker() -> Iterator[Worker]:
    one = Worker(Place(2), timeout_s=20.0)
    yield one
    one.stop()


def program_of(*arguments: binding.Arguments, kept: tuple[object, ...] = ()) -> Program:
    program = Program(1)
    for one in arguments:
        program.append(one, kept)
    return program


def adding(a: torch.Tensor, b: torch.Tensor) -> tuple[Program, torch.Tensor]:
    with noting(Program(1)) as program:
        y = ops.add(a, b)
    return program, y


def raised(value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A flag at 0 and the epoch that it is to reach."""
    return torch.zeros(1, dtype=torch.int32), torch.tensor([value], dtype=torch.int32)


def awaiting(flag: torch.Tensor, epoch: torch.Tensor, timeout_s: float = 20.0) -> Program:
    return program_of(binding.Await(flag.data_ptr(), epoch.data_ptr(), timeout_s), kept=(flag, epoch))


def test_a_job_runs_once_for_each_submission(worker: Worker) -> None:
    a, b = torch.zeros(5), torch.ones(5)
    program, y = adding(a, b)
    job = Job(worker, program)
    for i in range(200):
        a.fill_(i)
        job.submit()
        job.wait()
        assert torch.equal(y, torch.full((5,), i + 1.0))


def test_ops_on_a_worker_equal_those_on_the_callers_threads(worker: Worker) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = ops.sparse_ffn.make_inputs(generator, type="Q8_0", tokens=3, neurons=431, width=4352, density=0.3)
    expected = ops.sparse_ffn(**inputs)
    seen: set[int] = set()
    with worker.computing():
        for _ in range(5):
            assert torch.equal(ops.sparse_ffn(**inputs), expected)
            seen.add(threading.get_ident())


def test_a_job_runs_beside_the_program_that_forks_it(worker: Worker) -> None:
    """The fork raises what the job waits for: one after the other, in either order, would never end."""
    (go, epoch), (back, _) = raised(1), raised(1)
    job = Job(
        worker,
        program_of(
            binding.Await(go.data_ptr(), epoch.data_ptr(), 20.0), binding.Raise(back.data_ptr(), epoch.data_ptr(), 0.0)
        ),
    )
    step = program_of(
        binding.Fork(job.address), binding.Raise(go.data_ptr(), epoch.data_ptr(), 0.0),
        binding.Await(back.data_ptr(), epoch.data_ptr(), 20.0), binding.Join(job.address),
        kept=(go, epoch, back, job),
    )  # fmt: skip
    for i in range(1, 50):
        epoch.fill_(i)
        step.run()
    assert int(back) == 49


def test_flags_wrap_around() -> None:
    flag, epoch = raised(-(2**31))
    flag.fill_(2**31 - 1)
    with pytest.raises(StepFailed, match="did not end in time"):
        awaiting(flag, epoch, 0.01).run()
    flag.fill_(-(2**31) + 5)
    awaiting(flag, epoch).run()


@pytest.mark.parametrize(
    ("listed", "count", "good"),
    [([0, 3, 9], 3, True), ([], 0, True), ([0, 3, 10], 3, False), ([-1], 1, False), ([3, 3], 2, False), ([1], 11, False),
     ([1], -1, False), ([4, 2], 2, False)],
)  # fmt: skip
@pytest.mark.parametrize("threads", [1, 3])
def test_a_list_from_elsewhere_is_checked(listed: list[int], count: int, good: bool, threads: int) -> None:
    """Also that nothing after it runs."""
    indices, held = torch.tensor([*listed, 0], dtype=torch.int32), torch.tensor([count], dtype=torch.int32)
    program, y = adding(torch.ones(4), torch.ones(4))
    y.zero_()
    checked = program_of(binding.CheckList(indices.data_ptr(), held.data_ptr(), 10))
    checked.append(program._arguments[0], (program, indices, held))
    checked.threads = threads
    if good:
        checked.run()
    else:
        with pytest.raises(StepFailed, match="not there"):
            checked.run()
    assert bool(y.any()) == good


STOPPED = """
import threading, torch
from pinfer.kernels.cpp import binding
from pinfer.kernels.cpp.program import Program
from pinfer.kernels.cpp.worker import Job, Place, Worker
from pinfer.overlap.stream import Stream
import time

mark, program = torch.zeros(2, dtype=torch.int64), Program(1)
for _ in range(12):
    fields = mark.data_ptr(), None, 0.05, 0.0
    program.append(binding.Mark(*fields), (mark,))
    program.append(binding.Pace(*fields), (mark,))
job, stream = Job(Worker(Place(), timeout_s=1.5), program), Stream(1.5)

def slow():
    for _ in range(12):
        time.sleep(0.05)
    return torch.ones(1)

job.submit()
with stream.running(slow) as task:
    print("running", flush=True)
    job.wait()
    task.result(1.5)
print("done", flush=True)
"""


def test_a_process_that_is_stopped_and_continued_goes_on() -> None:
    """Ctrl-Z and fg: nobody could answer meanwhile, so it does not count as waiting."""
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        time.sleep(0.2)  # until it waits
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "done\n"


def test_a_failing_job_fails_the_program_that_joins_it(worker: Worker) -> None:
    indices, count = torch.zeros(1, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    job = Job(worker, program_of(binding.CheckList(indices.data_ptr(), count.data_ptr(), 1), kept=(indices, count)))
    step = program_of(binding.Fork(job.address), binding.Join(job.address), kept=(job,))
    with pytest.raises(StepFailed, match="not there"):
        step.run()
    count.fill_(0)
    step.run()  # and it goes on working


def test_a_job_that_does_not_end_in_time_is_an_error_and_its_memory_stays() -> None:
    worker = Worker(Place(), timeout_s=0.05)
    flag, epoch = raised(1)
    owner = weakref.ref(flag)
    job = Job(worker, awaiting(flag, epoch, 1.0))
    step = program_of(binding.Fork(job.address), binding.Join(job.address), kept=(job,))
    for _ in range(2):  # the second finds it busy
        with pytest.raises(StepFailed, match="did not end in time"):
            step.run()
    del job, step
    before = len(workers._abandoned)
    address, flag = flag.data_ptr(), None  # type: ignore[assignment]
    gc.collect()
    assert len(workers._abandoned) > before - 1
    assert owner() is not None, "the job may still read it"
    ctypes.c_int32.from_address(address).value = 1
    worker.stop()


def test_a_program_that_fails_waits_for_what_it_forked(worker: Worker) -> None:
    (go, epoch), (never, _) = raised(1), raised(1)
    job = Job(worker, awaiting(go, epoch))
    step = program_of(
        binding.Fork(job.address), binding.Await(never.data_ptr(), epoch.data_ptr(), 0.01), binding.Join(job.address),
        kept=(go, never, epoch, job),
    )  # fmt: skip
    timer = threading.Timer(0.2, lambda: go.fill_(1))
    timer.start()
    with pytest.raises(StepFailed):
        step.run()
    assert int(go) == 1, "it came back while the job was running"
    assert job.struct.status == 0
    timer.join()


def test_a_stopped_worker_refuses(worker: Worker) -> None:
    program, _ = adding(torch.ones(3), torch.ones(3))
    job = Job(worker, program)
    worker.stop()
    worker.stop()
    with pytest.raises(StepFailed, match="stopped"):
        job.submit()
    with pytest.raises(StepFailed, match="stopped"), worker.computing():
        ops.add(torch.ones(3), torch.ones(3))


def test_two_threads_share_a_worker(worker: Worker) -> None:
    wrong = []

    def use(seed: int) -> None:
        a = torch.full((50,), float(seed))
        program, y = adding(a, a)
        job = Job(worker, program)
        step = program_of(binding.Fork(job.address), binding.Join(job.address), kept=(job,))
        for i in range(300):
            a.fill_(seed + i)
            step.run()
            if not torch.equal(y, 2 * a):
                wrong.append((seed, i))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in (1, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_chained_jobs_run_beside_each_other() -> None:
    """As a CUDA host function: the first waits for a flag that the second raises."""
    ours = [Worker(Place(), timeout_s=20.0) for _ in range(2)]
    flag, epoch = raised(1)
    second = Job(ours[1], program_of(binding.Raise(flag.data_ptr(), epoch.data_ptr(), 0.0), kept=(flag, epoch)))
    first = Job(ours[0], awaiting(flag, epoch))
    first.struct.next = second.address
    load_core().pinfer_run_job(first.address)
    first.check()
    second.check()
    ours[1].stop()
    load_core().pinfer_run_job(first.address)
    first.check()
    with pytest.raises(StepFailed, match="stopped"):
        second.check()


@pytest.mark.parametrize(
    ("place", "problem"),
    [(lambda: Place(0), "0"), (lambda: Place(5000), "5000"), (lambda: Place(2, (0,)), "2 threads .* 1 processors"),
     (lambda: Worker(Place(), timeout_s=0), "above 0")],
)  # fmt: skip
def test_impossible_places_are_refused(place: Callable[[], object], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        place()


def test_threads_are_pinned_and_their_memory_is_their_nodes() -> None:
    cpu = sorted(os.sched_getaffinity(0))[-1]
    worker = Worker(Place(1, (cpu,), 0))
    assert worker.settled
    assert os.sched_getaffinity(0) != {cpu} or len(os.sched_getaffinity(0)) == 1, "the caller stays as it is"
    assert not Worker(Place(1, (4095,))).settled


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


BUSY = """
import os, sys, torch
from pinfer.kernels import ops
from pinfer.kernels.cpp import binding
from pinfer.kernels.cpp.program import Program
from pinfer.kernels.cpp.worker import Job, Place, Worker
worker = Worker(Place(2), timeout_s=0.2)
flag, epoch = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
program = Program(1)
program.append(binding.Await(flag.data_ptr(), epoch.data_ptr(), 100.0), (flag, epoch))
job = Job(worker, program)
"""


@pytest.mark.parametrize("submitted", [True, False])
def test_the_interpreter_ends_whatever_a_worker_does(submitted: bool) -> None:
    done = run_python(BUSY + ("job.submit()\n" if submitted else "") + "print('end')")
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_a_forked_process_is_told_and_ends() -> None:
    done = run_python(
        BUSY
        + """
child = os.fork()
if not child:
    try:
        job.submit()
    except binding.StepFailed as problem:
        os.write(1, b"refused " if "forked" in str(problem) else b"wrong ")
    del job, worker
    sys.exit(0)
print(os.waitpid(child, 0)[1], flush=True)
flag.fill_(1)
job.submit(); job.wait()
print("parent works")
"""
    )
    assert done.stdout == "refused 0\nparent works\n", done.stderr
