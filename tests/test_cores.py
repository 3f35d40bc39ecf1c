"""Reading the processors' topology from fake /sys trees, placing threads on it, and pinning them for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pinfer.config import RunConfig
from pinfer.engine import cores, load_engine
from pinfer.engine.cores import (
    DEFAULT,
    INTERLEAVED,
    PREFERRED,
    Core,
    Placement,
    Topology,
    cold_places,
    plan,
    read_topology,
)
from pinfer.kernels.cpp import core_problem
from pinfer.overlap import Place

SYSTEM = "sys/devices/system"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def tree(root: Path, siblings: list[str], nodes: list[str], online: str, name: str = "core_cpus_list") -> Path:
    """A machine: `siblings[i]` lists the hardware threads of processor i's core, `nodes[i]` those of node i."""
    topology = {f"{SYSTEM}/cpu/cpu{i}/topology/{name}": text for i, text in enumerate(siblings)}
    memory = {f"{SYSTEM}/node/node{i}/cpulist": text for i, text in enumerate(nodes)}
    return write(root, {**topology, **memory, f"{SYSTEM}/cpu/online": online, f"{SYSTEM}/node/online": "0-1"})


@pytest.fixture
def two_nodes(tmp_path: Path) -> Path:
    """2 nodes × 2 cores × 2 threads, numbered as servers number them: the second threads come last."""
    return tree(tmp_path, ["0,4", "1,5", "2,6", "3,7"] * 2, ["0-1,4-5", "2-3,6-7"], "0-7")


TWO_NODES = (Core((0, 4), 0), Core((1, 5), 0), Core((2, 6), 1), Core((3, 7), 1))


def test_two_nodes_of_two_cores_of_two_threads(two_nodes: Path) -> None:
    topology = read_topology(two_nodes, range(8))
    assert topology == Topology(TWO_NODES)
    assert topology.threads == 4
    assert topology.nodes == (0, 1)
    assert topology.cpus_of(1) == [2, 3, 6, 7]


def test_older_kernels_call_the_siblings_otherwise(tmp_path: Path) -> None:
    root = tree(tmp_path, ["0-1", "0-1"], ["0-1"], "0-1", name="thread_siblings_list")
    assert read_topology(root, range(2)) == Topology((Core((0, 1), 0),))


def test_offline_processors_do_not_count(two_nodes: Path) -> None:
    write(two_nodes, {f"{SYSTEM}/cpu/online": "0-2,5"})
    topology = read_topology(two_nodes, range(8))
    assert topology == Topology((Core((0,), 0), Core((1, 5), 0), Core((2,), 1)))


def test_only_what_the_affinity_allows_counts(two_nodes: Path) -> None:
    topology = read_topology(two_nodes, {2, 6, 7})
    assert topology == Topology((Core((2, 6), 1), Core((7,), 1)))
    assert topology.threads == 2
    assert topology.nodes == (1,)


def test_processors_without_topology_are_cores_of_one_node(tmp_path: Path) -> None:
    root = write(tmp_path, {f"{SYSTEM}/cpu/online": "0-2"})
    assert read_topology(root, range(4)) == Topology((Core((0,), 0), Core((1,), 0), Core((2,), 0)))


def test_no_sys_no_topology_and_torch_s_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_topology(tmp_path, range(8)) is None
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cores, "read_topology", lambda: None)
    assert cores.default_threads() == cores.TORCH_THREADS
    threads, remarks = cores.place_threads("isolate", 3)
    assert threads == 3
    assert "does not say which cores" in remarks[0]


@pytest.mark.parametrize(
    ("files", "quota", "threads"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "250000 100000"}, 2.5, 2),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 0.5, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, None, 4),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3.0, 3),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "100000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            1.0,
            1,
        ),
        # A container whose name for its cgroup is the host's: its own files are at the top.
        ({"proc/self/cgroup": "0::/docker/1f", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0, 2),
        ({"proc/self/cgroup": "0::/../../up", "sys/fs/cgroup/cpu.max": "200000 100000"}, 2.0, 2),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/job\n1:name=systemd:/\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "50000",
            },
            3.0,
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
            4,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "900000 100000"}, 9.0, 4),
    ],
)
def test_cgroup_quota(two_nodes: Path, files: dict[str, str], quota: float | None, threads: int) -> None:
    topology = read_topology(write(two_nodes, files), range(8))
    assert topology == Topology(TWO_NODES, quota)
    assert topology.threads == threads


def test_omp_num_threads_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(cores, "TORCH_THREADS", 7)
    assert cores.default_threads() == 7


def test_none_places_nothing() -> None:
    assert plan("none", 3, Topology(TWO_NODES), 0) == Placement(3)


def test_distribute_takes_nodes_by_turns_and_second_threads_last() -> None:
    placement = plan("distribute", 6, Topology(TWO_NODES), 0)
    assert placement == Placement(6, (0, 2, 1, 3, 4, 6), INTERLEAVED, (0, 1))
    uneven = Topology((*TWO_NODES[:2], Core((2,), 1)))
    assert plan("distribute", 7, uneven, 0).cpus == (0, 2, 1, 4, 5, 0, 2)


def test_isolate_keeps_to_the_node_of_the_process() -> None:
    assert plan("isolate", 2, Topology(TWO_NODES), 7) == Placement(2, (2, 3), PREFERRED, (1,))
    assert plan("isolate", 1, Topology(TWO_NODES), 0) == Placement(1, (0,), PREFERRED, (0,))


def test_isolate_runs_no_more_threads_than_the_node_has_cores() -> None:
    assert plan("isolate", 8, Topology(TWO_NODES), 3) == Placement(2, (2, 3), PREFERRED, (1,))


@pytest.mark.parametrize("policy", ["distribute", "isolate"])
def test_one_node_pins_and_leaves_memory_alone(policy: cores.Numa) -> None:
    topology = Topology((Core((0, 2), 0), Core((1, 3), 0)))
    assert plan(policy, 2, topology, None) == Placement(2, (0, 1), DEFAULT, ())


def test_cold_shards_have_a_node_each_and_leave_a_core_to_the_device() -> None:
    assert cold_places(3, Topology(TWO_NODES)) == [Place(1, (1,), 0), Place(2, (2, 3), 1)]
    assert cold_places(4, Topology(TWO_NODES), spare=0) == [Place(2, (0, 1), 0), Place(2, (2, 3), 1)]
    assert cold_places(1, Topology((Core((0, 2), 0), Core((1, 3), 0)))) == [Place(1, (1,), None)]


@pytest.mark.parametrize(("threads", "problem"), [(1, "0 of 1 threads fall to node 0"), (4, "2 of 4 .* has 1 cores")])
def test_cold_threads_that_have_no_cores_are_refused(threads: int, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        cold_places(threads, Topology(TWO_NODES))


def test_the_processor_stands_behind_a_name_with_brackets(tmp_path: Path) -> None:
    fields = " ".join(str(i) for i in range(4, 53))  # field 39 holds 39
    assert cores.current_cpu(write(tmp_path, {"proc/self/stat": f"12 (a) b)) R {fields}"})) == 39
    assert cores.current_cpu(tmp_path / "nothing") is None


@pytest.mark.skipif(not Path("/sys/devices/system/cpu/online").exists(), reason="not Linux")
def test_this_machine_has_cores_within_its_affinity() -> None:
    topology = read_topology()
    assert topology is not None
    cpus = [cpu for core in topology.cores for cpu in core.cpus]
    assert sorted(cpus) == sorted(os.sched_getaffinity(0))
    assert 1 <= topology.threads <= len(topology.cores)
    assert cores.current_cpu() in cpus


# In a process of its own: a memory policy stays with the process that sets it.
PINNED = """
import ctypes, os
import torch
from pinfer.engine import cores
from pinfer.kernels.cpp import load_core

def masks():
    return sorted(tuple(sorted(os.sched_getaffinity(int(task)))) for task in os.listdir("/proc/self/task"))

allowed = os.sched_getaffinity(0)
torch.set_num_threads(2)
topology = cores.read_topology()
threads, remarks = cores.place_threads("distribute", 2)
assert (threads, remarks) == (2, ()), remarks
placement = cores.plan("distribute", 2, topology, 0)
torch.set_num_threads(threads)
if len(allowed) > 1:
    assert (placement.cpus[1],) in masks(), masks()
assert os.sched_getaffinity(0) == allowed  # the caller is let go
load_core().pinfer_run(None, 0, 2)
assert os.sched_getaffinity(0) == allowed
assert cores.place_threads("none", 2) == (2, ())
assert set(masks()) == {tuple(sorted(allowed))}, masks()

one = (ctypes.c_int32 * 1)(0)
libc, mode = ctypes.CDLL(None, use_errno=True), ctypes.c_int(-1)
if load_core().pinfer_memory(3, one, 1, 2) == 2:  # a kernel without NUMA refuses it
    libc.syscall({"x86_64": 239, "aarch64": 236}[os.uname().machine], ctypes.byref(mode), None, 0, None, 0)
    assert mode.value == 3, mode
    assert load_core().pinfer_memory(0, None, 0, 2) == 2
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pinning is for Linux")
def test_threads_are_pinned_and_the_caller_is_let_go() -> None:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    result = subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("policy", ["distribute", "isolate"])
def test_an_engine_under_a_policy_computes_the_same(policy: cores.Numa, shipped_model: Path) -> None:
    before = torch.get_num_threads()
    tokens = torch.tensor([1, 5, 9])
    try:
        logits = []
        for numa in ("none", policy):
            engine = load_engine(RunConfig(model=str(shipped_model), numa=numa, threads=1, context=16))
            with engine.computing():
                logits.append(engine.model(tokens, engine.model.new_cache()))
        assert torch.equal(*logits)
        assert not any("--numa" in remark for remark in engine.notes) or core_problem()
    finally:
        cores.place_threads("none", 1)
        torch.set_num_threads(before)


def test_numa_is_a_choice() -> None:
    with pytest.raises(ValueError, match="numa 'everywhere' is none of none, distribute, isolate"):
        RunConfig(numa="everywhere")  # type: ignore[arg-type]
