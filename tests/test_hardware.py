"""What `pinfer doctor` reads, measures, keeps and advises: fake /sys trees, fake devices, no GPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.cli.main import FAILED, OK, run
from pinfer.engine import hardware, rates
from pinfer.engine.advice import advice
from pinfer.engine.cores import Core, Topology, memory_limit
from pinfer.engine.gpu_rates import LAUNCHES, CudaDevice, measure_gpu
from pinfer.engine.hardware import Gpu, Machine, Node, gpu_problem, parse_gpus, read_machine
from pinfer.engine.rates import (
    GpuRates,
    Rates,
    keep_rates,
    kept_rates,
    measure_cpu,
    measure_products,
    prefill_costs,
    rates_path,
)
from pinfer.kernels.cpp import core_problem
from pinfer.overlap import PrefillCosts
from tests.test_cores import write

SMI = """GPU-1, NVIDIA GeForce RTX 4090, 550.54.14, 24564, 20000, 00000000:3B:00.0
GPU-2, NVIDIA GeForce RTX 4090, 550.54.14, 24564, 24210, 00000000:AF:00.0
something else, that is, no, GPU
GPU-3, NVIDIA GB10, 580.1, [N/A], [N/A], 0000000F:01:00.0
"""
GPU = Gpu("NVIDIA GeForce RTX 4090", "GPU-1", "550.54.14", 24564 << 20, 20000 << 20, 1)
PLAIN = Machine(
    cpu="EPYC", instruction_set="avx2", core_problem=None,
    topology=Topology(tuple(Core((i,), 0) for i in range(6))),
    nodes=(Node(0, "0-5", 64 * 10**9, 60 * 10**9),),
    memory_bytes=64 * 10**9, available_bytes=60 * 10**9, memory_limit=None,
    gpus=(), gpu_problem="there is no NVIDIA GPU, or no driver for it",
    triton="3.6.0", compiler="g++", huge_pages="madvise", waiting="active",
)  # fmt: skip
WITH_GPU = dataclasses.replace(PLAIN, gpus=(GPU,), gpu_problem=None)
MEASURED = Rates({1: 10e9, 2: 20e9, 6: 40e9}, GpuRates(900e9, 25e9, 24e9, 2e-5, 4e-6, 2e-6))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PINFER_CACHE", str(tmp_path / "cache"))


def test_gpus_as_nvidia_smi_lists_them(tmp_path: Path) -> None:
    root = write(tmp_path, {
        "sys/bus/pci/devices/0000:3b:00.0/numa_node": "1",
        "sys/bus/pci/devices/0000:af:00.0/numa_node": "-1",
    })  # fmt: skip
    first, second = parse_gpus(SMI, root)
    assert first == GPU
    assert (second.uuid, second.free_bytes, second.node) == ("GPU-2", 24210 << 20, None)


def test_why_a_gpu_cannot_be_used() -> None:
    assert gpu_problem((GPU,), True, "12.4") is None
    assert "no NVIDIA GPU" in (gpu_problem((), False, "12.4") or "")
    assert "without CUDA" in (gpu_problem((GPU,), False, None) or "")
    assert "550.54.14" in (gpu_problem((GPU,), False, "13.0") or "")


def test_nothing_of_sys_is_needed(tmp_path: Path) -> None:
    machine = read_machine(tmp_path)
    assert (machine.topology, machine.nodes, machine.memory_bytes, machine.huge_pages) == (None, (), 0, None)
    assert machine.cpu
    assert any("name the number of physical ones with -t" in line for line in advice(machine, None))


def test_memory_nodes_and_pages(tmp_path: Path) -> None:
    root = write(tmp_path, {
        "proc/cpuinfo": "processor : 0\nmodel name\t: AMD EPYC 9354\nflags : avx2",
        "proc/meminfo": "MemTotal:       1000 kB\nMemFree:         300 kB\nMemAvailable:    500 kB",
        "sys/devices/system/node/node0/meminfo": "Node 0 MemTotal:       600 kB\nNode 0 MemFree:        100 kB",
        "sys/devices/system/node/node0/cpulist": "0-3",
        "sys/devices/system/node/node10/cpulist": "",
        "sys/devices/system/node/node2/cpulist": "4-7",
        "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]",
        "proc/self/cgroup": "4:memory:/job\n0::/job",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "400000",
    })  # fmt: skip
    machine = read_machine(root)
    assert machine.cpu == "AMD EPYC 9354"
    assert (machine.memory_bytes, machine.available_bytes) == (1000 << 10, 500 << 10)
    assert machine.nodes == (Node(0, "0-3", 600 << 10, 100 << 10), Node(2, "4-7", 0, 0), Node(10, "", 0, 0))
    assert machine.huge_pages == "never"
    assert machine.memory_limit == machine.usable_bytes == 400000


def test_memory_limit_of_version_2_and_none(tmp_path: Path) -> None:
    assert memory_limit(tmp_path) is None
    write(tmp_path, {"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/memory.max": "max"})
    assert memory_limit(tmp_path) is None
    write(tmp_path, {"sys/fs/cgroup/memory.max": "123456"})
    assert memory_limit(tmp_path) == 123456


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topology": Topology(tuple(Core((i, i + 6), 0) for i in range(6)))}, "one thread a core; all 12"),
        ({"topology": Topology(PLAIN.topology.cores, 2.5)}, "grants 2.5 processors' worth of time on 6 cores"),
        ({"nodes": (Node(0, "0-2", 32 * 10**9, 0), Node(1, "3-5", 30 * 10**9, 0))}, "models below 30 GB"),
        ({"nodes": PLAIN.nodes * 2, "gpus": (GPU,), "gpu_problem": None}, "numactl --cpunodebind=1 --membind=1"),
        ({"memory_limit": 8 * 10**9}, "8.0 GB of the machine's 64.0 GB"),
        ({"huge_pages": "never"}, "huge pages are off"),
        ({"waiting": "passive"}, "OMP_WAIT_POLICY=active"),
        ({"gpus": (GPU,), "gpu_problem": "too old"}, "RTX 4090: too old"),
        ({"gpus": (GPU,), "gpu_problem": None}, "--gpu-memory-gb 21.0 is what is left"),
        ({"gpus": (GPU,), "gpu_problem": None, "triton": None}, "pip install triton"),
        ({"core_problem": "no C++ compiler found"}, "no C++ compiler found"),
    ],
)
def test_advice(change: dict[str, Any], said: str) -> None:
    assert advice(PLAIN, MEASURED) == ()
    assert any(said in line for line in advice(dataclasses.replace(PLAIN, **change), MEASURED))


def test_advice_of_what_was_measured() -> None:
    assert advice(PLAIN, None) == ("pinfer doctor --measure measures bandwidths, and pinfer plan uses them",)
    slow = Rates({1: 10e9, 2: 40e9, 6: 30e9})
    assert advice(PLAIN, slow) == ("-t 2: memory is read at 40.0 GB/s then, at 30.0 with the default of 6",)


def test_cpu_is_measured_by_number_of_threads() -> None:
    seen: list[tuple[int, int]] = []

    def read(threads: int, n_bytes: int) -> float:
        seen.append((threads, n_bytes))
        return 1e9 * threads

    small = dataclasses.replace(PLAIN, available_bytes=4000)
    assert measure_cpu(small, lambda _: None, read) == {1: 1e9, 2: 2e9, 4: 4e9, 6: 6e9}
    assert seen == [(1, 1000), (2, 1000), (4, 1000), (6, 1000)]
    measure_cpu(PLAIN, lambda _: None, read)
    assert seen[-1] == (6, rates.BUFFER_BYTES)


class FakeDevice:
    """A GPU of 500 GB/s behind 20 GB/s; every second operation is disturbed."""

    def __init__(self) -> None:
        self.disturbed = False

    def _after(self, seconds: float) -> float:
        self.disturbed = not self.disturbed
        return 3 * seconds if self.disturbed else seconds

    def free_bytes(self) -> int:
        return 10**9

    def read(self, size: int) -> float:
        assert size <= 10**9 // 4
        return self._after(size / 500e9)

    def copy(self, size: int, to_gpu: bool) -> float:
        assert size <= 10**9 // 4
        return self._after(size / (20e9 if to_gpu else 10e9))

    def hand_over(self) -> float:
        return 25e-6

    def launches(self, count: int, graph: bool) -> float:
        return count * (2e-6 if graph else 5e-6)


def test_gpu_figures_are_bytes_over_the_best_time_and_medians() -> None:
    told: list[str] = []
    found = measure_gpu(FakeDevice(), told.append)
    assert dataclasses.astuple(found) == pytest.approx((500e9, 20e9, 10e9, 25e-6, 5e-6, 2e-6))
    assert LAUNCHES > 1
    assert told[0] == "GPU memory: 500 GB/s"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_is_measured() -> None:
    found = measure_gpu(CudaDevice(), lambda _: None)
    assert found.read_bandwidth > found.to_gpu_bandwidth > 1e9
    assert found.kernel_s > 0


def test_figures_are_kept_for_this_very_machine() -> None:
    assert kept_rates(WITH_GPU) is None
    path = keep_rates(WITH_GPU, MEASURED)
    assert kept_rates(WITH_GPU) == MEASURED
    assert kept_rates(PLAIN) is None
    newer = dataclasses.replace(WITH_GPU, gpus=(dataclasses.replace(GPU, driver="560.1"),))
    assert kept_rates(newer) is None
    assert rates_path(newer) != path
    less_free = dataclasses.replace(WITH_GPU, gpus=(dataclasses.replace(GPU, free_bytes=5),), available_bytes=7)
    assert kept_rates(less_free) == MEASURED


def test_prompts_choose_by_what_was_measured() -> None:
    with_products = dataclasses.replace(MEASURED, cpu_flops=4e11)
    keep_rates(WITH_GPU, with_products)
    assert kept_rates(WITH_GPU) == with_products
    assert prefill_costs(None) is prefill_costs(Rates({1: 1e9}, None, 4e11)) is None
    costs = prefill_costs(with_products)
    assert costs == PrefillCosts(40e9, 25e9, 4e11)
    assert costs is not None and costs.streams(512, 10**9, 10**9) and not costs.streams(2, 10**9, 10**9)


def test_products_are_measured() -> None:
    told: list[str] = []
    assert measure_products(told.append) > 0
    assert "GFLOP/s" in told[0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"{",
        lambda content: b"[]",
        lambda content: json.dumps(content | {"format": 0}).encode(),
        lambda content: json.dumps(content | {"machine": {}}).encode(),
        lambda content: json.dumps(content | {"rates": {"cpu_read_bandwidth": {}, "gpu": None}}).encode(),
        lambda content: json.dumps(content | {"rates": {"cpu_read_bandwidth": {"1": -5}, "gpu": None}}).encode(),
        lambda content: json.dumps(content | {"rates": {"cpu_read_bandwidth": {"1": 5}, "gpu": {"x": 1}}}).encode(),
        lambda content: json.dumps(content | {"rates": content["rates"] | {"cpu_flops": 0}}).encode(),
    ],
)
def test_damaged_or_foreign_figures_are_ignored(damage: Any) -> None:
    path = keep_rates(PLAIN, Rates({1: 1e9}))
    path.write_bytes(damage(json.loads(path.read_bytes())))
    assert kept_rates(PLAIN) is None


def test_doctor_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pinfer.cli.doctor.read_machine", lambda: PLAIN)
    assert run(["doctor"]) == OK
    out = capsys.readouterr().out
    for part in ("none: there is no NVIDIA GPU", "EPYC", "avx2", "6 (6 hardware threads)", "64.0 GB", "nothing yet"):
        assert part in out


@pytest.mark.skipif(core_problem() is not None, reason="needs the C++ core")
def test_doctor_measures_keeps_and_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(PLAIN, available_bytes=4 << 20, topology=Topology((Core((0,), 0),)))
    monkeypatch.setattr("pinfer.cli.doctor.read_machine", lambda: small)
    assert run(["doctor", "--measure", "--json"]) == OK
    out, err = capsys.readouterr()
    figures = json.loads(out)
    assert figures["rates"]["cpu_read_bandwidth"]["1"] > 0
    assert figures["rates"]["gpu"] is figures["gpu"] is None
    assert Path(figures["rates_file"]).exists()
    assert "no GPU is measured: there is no NVIDIA GPU" in err
    assert run(["doctor"]) == OK
    assert "GB/s with 1 thread\n" in capsys.readouterr().out


@pytest.mark.parametrize("cores", [0.0, 1.5, None])
def test_doctor_says_when_others_were_busy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, cores: float | None
) -> None:
    small = dataclasses.replace(PLAIN, available_bytes=4 << 20, topology=Topology((Core((0,), 0),)))
    monkeypatch.setattr("pinfer.cli.doctor.read_machine", lambda: small)
    monkeypatch.setattr("pinfer.cli.doctor.OtherLoad.cores", lambda _: cores)
    assert run(["doctor", "--measure"]) == OK
    assert ("other programs kept 1.5 cores busy" in capsys.readouterr().err) == (cores == 1.5)


def test_doctor_with_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pinfer.cli.doctor.read_machine", lambda: WITH_GPU)
    keep_rates(WITH_GPU, MEASURED)
    assert run(["doctor"]) == OK
    out = capsys.readouterr().out
    assert "driver 550.54.14, NUMA node 1" in out
    assert "900 GB/s" in out
    assert run(["doctor", "--json"]) == OK
    assert json.loads(capsys.readouterr().out)["gpu"] == "NVIDIA GeForce RTX 4090"


def test_doctor_cannot_measure_without_the_core(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    coreless = dataclasses.replace(PLAIN, core_problem="no C++ compiler found")
    monkeypatch.setattr("pinfer.cli.doctor.read_machine", lambda: coreless)
    assert run(["doctor", "--measure"]) == FAILED
    assert capsys.readouterr().err == "pinfer: failed: CPU bandwidth cannot be measured: no C++ compiler found\n"


def test_no_nvidia_smi_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hardware.read_gpus(tmp_path) == ()
