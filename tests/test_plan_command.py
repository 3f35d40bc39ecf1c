"""`pinfer plan` as a user meets it: the published 70B model, files, the guide's tables, and every bad value."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pinfer.cli.main import BAD_INPUT, OK, run
from pinfer.cli.plan_draw import share_out
from pinfer.engine import SHIPPED_MODEL
from pinfer.engine.hardware import Machine
from pinfer.engine.rates import Rates, keep_rates
from pinfer.placement.statistics import QUANTILES, LayerStatistics, to_tensors
from tests.gguf_files import write_tiny_gemma3
from tests.test_hardware import MEASURED, PLAIN, WITH_GPU

HEADLINE = [
    "plan", "--shape", "llama-2-70b", "--type", "q4_k_m", "--skew", "relu-llama-70b", "--density", "0.1",
    "--gpu", "rtx4090", "--gpu-memory-gb", "24", "--ram-bandwidth", "80",
]  # fmt: skip
QUICK = ["plan", "--shape", "llama-2-70b", "--gpu", "a100-40", "--vram", "20", "--ram-bandwidth", "50", "--no-compare"]


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, and nothing measured."""
    use(monkeypatch, PLAIN)
    monkeypatch.setenv("PINFER_CACHE", str(tmp_path / "cache"))


def use(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr("pinfer.cli.plan_inputs.read_machine", lambda: machine)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run([*arguments, "--json"]) == OK, capsys.readouterr().err
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_70b_model_on_a_card_of_24_gb(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *HEADLINE)
    assert found["tokens_per_s"] > 5 * found["dense_split_tokens_per_s"] > 0
    assert found["speedup"] == pytest.approx(found["tokens_per_s"] / found["dense_split_tokens_per_s"])
    assert 0 <= found["gap"] <= 1e-3
    assert found["solve_seconds"] > 0
    assert found["gpu_bytes"] == sum(found["memory"]["gpu"].values()) <= found["budget_bytes"] == 24 * 10**9
    assert found["cpu_bytes"] == sum(found["memory"]["cpu"].values())
    assert found["density"] == pytest.approx(0.13)
    layers = found["layers"]
    assert len(layers) == 80
    assert found["timeline"][-1]["end_s"] == pytest.approx(found["token_s"])
    hot = sum(layer["hot"] for layer in layers) / sum(layer["neurons"] for layer in layers)
    assert 0.2 < hot < 0.5
    speeds = list(found["tokens_per_s_by_depth"].values())
    assert speeds == sorted(speeds, reverse=True)
    assert found["tokens_per_s_with_down_as_in_file"] > found["tokens_per_s"]
    assert set(found["baselines"]) == {"powerinfer", "uniform", "sparse_layers", "dense_layers"}
    assert all(one["tokens_per_s"] <= found["tokens_per_s"] * (1 + 1e-9) for one in found["baselines"].values())
    assert all(one["gpu_bytes"] <= 24 * 10**9 for one in found["baselines"].values())


def test_the_text_has_the_same_figures_and_a_drawing(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, *HEADLINE)
    assert run(HEADLINE) == OK
    out = capsys.readouterr().out
    assert f"{found['tokens_per_s']:.2f} tokens/s" in out
    assert f"dense layer split {found['dense_split_tokens_per_s']:.2f} tokens/s" in out
    for count in (*found["memory"]["gpu"].values(), found["gpu_bytes"], found["cpu_bytes"]):
        assert f"{count:,}" in out
    assert out.count("░") > 80
    assert "PowerInfer's sort" in out
    assert "  76-79 A" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--shape llama-2-71b", "--shape llama-2-71b is none of llama-2-7b,"),
        ("--shape llama-2-7b --type q9_k", "type 'q9_k' is none of f32,"),
        ("--shape llama-2-7b --gpu rtx4080", "unknown GPU 'rtx4080'; known are RTX 2080 Ti,"),
        ("--shape llama-2-7b --skew foo", "skew 'foo' is none of relu-llama-70b"),
        ("--shape llama-2-7b --skew 0.9", "must lie in (0, 0.8], not 0.9"),
        ("--shape llama-2-7b --skew nan", "must lie in (0, 0.8], not nan"),
        ("--shape llama-2-7b --density 0", "--density must lie in (0, 1], not 0"),
        ("--shape llama-2-7b --density nan", "--density must lie in (0, 1], not nan"),
        ("--shape llama-2-7b --density 1.5", "--density must lie in (0, 1], not 1.5"),
        ("--shape llama-2-7b --over-prediction 0.5", "--over-prediction must be at least 1, not 0.5"),
        ("--shape llama-2-7b --predictor-gb -1", "--predictor-gb must lie in [0, 1e+06], not -1"),
        ("--shape llama-2-7b --predictor-rank 33", "--predictor-rank must be a multiple of 32 in [32, 8192], not 33"),
        ("--shape llama-2-7b --predictor-rank 320000", "multiple of 32 in [32, 8192], not 320000"),
        ("--shape llama-2-7b --predictor-gb 1e300", "--predictor-gb must lie in [0, 1e+06], not 1e+300"),
        (
            "--shape llama-2-7b --predictor-rank 64 --predictor-gb 1",
            "--predictor-gb 1 or --predictor-rank 64, not both",
        ),
        ("--shape llama-2-7b --vram -3", "--gpu-memory-gb must lie in [0, 1e+06], not -3"),
        ("--shape llama-2-7b --vram inf", "--gpu-memory-gb must lie in [0, 1e+06], not inf"),
        ("--shape llama-2-7b --vram 1e300", "--gpu-memory-gb must lie in [0, 1e+06], not 1e+300"),
        ("--shape llama-2-7b --vram 25.8", "--gpu-memory-gb 25.8 is more than the 25.77 of RTX 4090"),
        ("--shape llama-2-7b --ram-bandwidth nan", "--ram-bandwidth must lie in [0.001, 1e+06], not nan"),
        ("--shape llama-2-7b --gpu-bandwidth 0", "--gpu-bandwidth must lie in [0.001, 1e+06], not 0"),
        ("--shape llama-2-7b --ram-bandwidth 1e-300", "--ram-bandwidth must lie in [0.001, 1e+06], not 1e-300"),
        ("--shape llama-2-7b --sync-us -1", "--sync-us must lie in [0, 1e+06], not -1"),
        ("--shape llama-2-7b --ram ddr5-5600", "give --ram ddr5-5600 or --ram-bandwidth 80, not both"),
        ("--shape llama-2-7b --cpu-efficiency 1.5", "--cpu-efficiency must lie in [0.01, 1], not 1.5"),
        ("--shape llama-2-7b -c -1", "--ctx-size must lie in [0, 4096], the model's limit, not -1"),
        ("--shape llama-2-7b -c 4097", "--ctx-size must lie in [0, 4096], the model's limit, not 4097"),
        ("-c 513", "--ctx-size must lie in [0, 512], the model's limit, not 513"),
        ("--shape llama-2-7b -c 512 --depth 513", "--depth must lie in [0, 512], the context, not 513"),
        ("--shape llama-2-7b -ngl -2", "--gpu-layers must be at least -1 (all), not -2"),
        ("--shape llama-2-7b -ngl 20 --vram 1", "GB"),
        ("--shape llama-2-7b -m x.gguf", "--model x.gguf has no meaning with --shape llama-2-7b"),
        ("--type q8_0", "--type q8_0 has no meaning without --shape"),
        ("--shape llama-2-7b --from-run x --skew uniform", "give --from-run x or --skew uniform, not both"),
        ("--shape llama-2-7b --from-run nowhere.safetensors", "nowhere.safetensors: No such file"),
        ("-m nowhere.gguf", "nowhere.gguf: No such file"),
        ("--guide", "--gpu rtx4090 has no meaning with --guide"),
    ],
)
def test_bad_values_end_in_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments.split()
    gpu = [] if "--gpu" in given else ["--gpu", "rtx4090"]
    ram = [] if "--ram-bandwidth" in given else ["--ram-bandwidth", "80"]
    assert run(["plan", *gpu, *ram, *given]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err


def test_what_is_missing_without_a_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["plan", "--shape", "llama-2-7b"]
    for arguments, said in (
        (shape, "name a GPU with --gpu, or its memory with --gpu-memory-gb: there is no NVIDIA GPU"),
        ([*shape, "--vram", "8"], "name a GPU with --gpu, or its bandwidth with --gpu-bandwidth: there is no NVIDIA"),
        ([*shape, "--gpu", "l4"], "with --ram-bandwidth, or its kind with --ram: pinfer doctor --measure has not"),
    ):
        assert run(arguments) == BAD_INPUT
        assert said in capsys.readouterr().err


def test_this_machine_as_measured(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, WITH_GPU)
    keep_rates(WITH_GPU, MEASURED)
    hardware = planned(capsys, "plan", "--shape", "llama-2-7b", "--no-compare")["hardware"]
    assert hardware["name"] == "NVIDIA GeForce RTX 4090 and this machine's memory"
    assert hardware["gpu_bytes"] == 24564 << 20
    assert (hardware["gpu_bandwidth"], hardware["cpu_bandwidth"]) == (900e9, 40e9)
    assert (hardware["to_gpu_bandwidth"], hardware["to_cpu_bandwidth"]) == (25e9, 24e9)
    assert (hardware["sync_s"], hardware["kernel_s"]) == (2e-5, 2e-6)
    named = planned(capsys, "plan", "--shape", "llama-2-7b", "--no-compare", "--gpu", "l4", "--ideal")["hardware"]
    assert (named["gpu_bandwidth"], named["cpu_bandwidth"]) == (300e9, 40e9)
    assert (named["sync_s"], named["kernel_s"], named["gpu_efficiency"]) == (30e-6, 0.0, 1.0)


def test_measured_memory_beside_a_named_card(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_rates(PLAIN, Rates({2: 33e9}))
    found = planned(capsys, "plan", "--shape", "llama-2-7b", "--gpu", "l4", "--no-compare")
    assert found["hardware"]["cpu_bandwidth"] == 33e9
    ram = planned(capsys, "plan", "--shape", "llama-2-7b", "--gpu", "l4", "--no-compare", "--ram", "epyc12")
    assert ram["hardware"]["cpu_bandwidth"] == 460.8e9


def test_flags_change_what_they_should(capsys: pytest.CaptureFixture[str]) -> None:
    base = planned(capsys, *QUICK)
    ideal = planned(capsys, *QUICK, "--ideal")
    assert ideal["tokens_per_s"] > base["tokens_per_s"]
    assert ideal["density"] == pytest.approx(0.1)
    deep = planned(capsys, *QUICK, "--depth", "4096")
    assert deep["depth"] == 4096
    assert deep["tokens_per_s"] < base["tokens_per_s"]
    large = planned(capsys, *QUICK, "--predictor-gb", "1")
    taken = large["memory"]["gpu"]["predictor"] + large["memory"]["cpu"]["predictor"]
    assert taken == pytest.approx(1e9, rel=0.01)
    pinned = planned(capsys, *QUICK, "-ngl", "4")["layers"]
    assert all(layer["hot"] == layer["neurons"] and layer["attention"] == "gpu" for layer in pinned[-4:])
    even = planned(capsys, *QUICK, "--skew", "uniform")
    assert even["tokens_per_s"] < base["tokens_per_s"]
    none = planned(capsys, *QUICK, "--vram", "0")
    assert none["gpu_bytes"] == 0
    assert none["gpu_busy"] == 0


def test_a_budget_is_rounded_as_a_run_rounds_it(capsys: pytest.CaptureFixture[str]) -> None:
    """8.2 * 1e9 is 8199999999.999999: a byte less, and a run of 8.2 GB would not take the plan for its own."""
    shape = ["plan", "--shape", "llama-2-7b", "--gpu", "rtx4090", "--ram-bandwidth", "20", "--no-compare"]
    assert planned(capsys, *shape, "--vram", "8.2")["budget_bytes"] == 8_200_000_000


def test_a_budget_that_only_the_context_would_fill_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["plan", "--shape", "llama-2-7b", "--gpu", "rtx4090", "--ram-bandwidth", "20"]
    assert run([*shape, "--vram", "0.5", "--no-compare"]) == OK
    told = "the GPU stays unused: its context, graph and activations take"
    assert told in capsys.readouterr().out
    assert run([*shape, "--vram", "2", "--explain"]) == OK
    out = capsys.readouterr().out
    assert told not in out
    assert out.count("PowerInfer's sort") == 1
    assert "Limit: CPU bandwidth." in out


def test_the_context_is_the_models_where_none_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["--gpu", "rtx4090", "--ram-bandwidth", "20", "--no-compare"]
    assert planned(capsys, "plan", *machine)["context"] == 512
    assert planned(capsys, "plan", "-c", "0", *machine)["context"] == 512
    assert planned(capsys, "plan", "--shape", "opt-6.7b", *machine)["context"] == 2048
    assert planned(capsys, "plan", "--shape", "mistral-7b", *machine)["context"] == 4096
    assert planned(capsys, "plan", "--shape", "mistral-7b", "-c", "0", *machine)["context"] == 32768


@pytest.mark.parametrize("given", ["--shape llama-2-7b", "-c 512", "-o plan.json", "--vram 8", "--method exact"])
def test_the_guide_takes_no_options_that_it_would_leave_out(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--guide", *given.split()]) == BAD_INPUT
    assert "has no meaning with --guide" in capsys.readouterr().err


def test_the_guides_tables_are_for_the_memory_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    tables = [row["table"] for row in planned(capsys, "plan", "--guide", "--ram", "epyc12")["guide"]]
    assert tables[-1] == "70B by card, memory of 460.8 GB/s"


def test_the_shipped_model_by_its_own_statistics(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "plan", "--gpu", "rtx4090", "--ram-bandwidth", "20")
    assert len(found["layers"]) == 6
    assert "profiled in" in found["rates"]
    assert 0 < found["density"] < 0.2
    assert "pinfer-tiny.pinfer" in found["rates"]
    exact = planned(
        capsys, "plan", "-m", str(SHIPPED_MODEL), "--method", "exact", "--skew", "0.3", "--density", "0.07",
        "--gpu", "rtx4090", "--ram-bandwidth", "20", "--no-compare",
    )  # fmt: skip
    assert exact["density"] == pytest.approx(0.07)


def test_a_file_without_statistics_wants_them(capsys: pytest.CaptureFixture[str]) -> None:
    machine = ["--gpu", "rtx4090", "--ram-bandwidth", "20"]
    assert run(["plan", "-m", str(SHIPPED_MODEL), "--method", "exact", *machine]) == BAD_INPUT
    assert "name --predictor-path (of pinfer solve or profile), --from-run or --skew" in capsys.readouterr().err


def test_a_model_without_relu_is_placed_at_a_density(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gemma, machine = str(write_tiny_gemma3(tmp_path / "m.gguf")), ["--gpu", "rtx4090", "--ram-bandwidth", "20"]
    assert run(["plan", "-m", gemma, "--skew", "uniform", *machine]) == BAD_INPUT
    assert "method dense names no neurons to place: give --density" in capsys.readouterr().err
    found = planned(capsys, "plan", "-m", gemma, "--skew", "uniform", "--density", "0.4", "--no-compare", *machine)
    assert found["density"] == pytest.approx(0.4)
    assert sum(found["memory"][place]["compensation"] for place in ("gpu", "cpu")) > 0


def test_a_directory_of_a_profile_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    solved = str(tmp_path / "profiled")
    assert run(["profile", "-o", solved, "--tokens", "64"]) == OK
    capsys.readouterr()
    arguments = ["--gpu", "rtx4090", "--ram-bandwidth", "20", "--no-compare", "--predictor-path", solved]
    found = planned(capsys, "plan", "-m", str(SHIPPED_MODEL), *arguments)
    assert 0 < found["density"] < 0.2
    assert solved in found["rates"]


def gathered(path: Path, layers: int, neurons: int, tokens: int = 50) -> Path:
    """Statistics of a run in which the first neurons fired on 50 tokens and the others on none."""
    fired = torch.where(torch.arange(neurons) < neurons // 10, 50, 0)
    one = LayerStatistics(
        tokens=torch.tensor([tokens]), fired=fired, mass=fired.double(), first_half_mass=fired.double() / 2,
        up_mean=torch.ones(2, neurons), center=torch.zeros(neurons),
        input_quantiles=torch.zeros(QUANTILES), hidden_quantiles=torch.zeros(QUANTILES),
    )  # fmt: skip
    save_file({name: tensor.clone() for name, tensor in to_tensors((one,) * layers).items()}, path)
    return path


def test_statistics_gathered_while_serving(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = gathered(tmp_path / "run.safetensors", 80, 28672)
    found = planned(capsys, *QUICK, "--from-run", str(path), "--over-prediction", "1")
    assert found["density"] == pytest.approx(2867 / 28672)
    assert str(path) in found["rates"]
    assert all(layer["hot"] > 0.9 * 2867 for layer in found["layers"])
    wrong = gathered(tmp_path / "wrong.safetensors", 31, 28672)
    assert run([*QUICK, "--from-run", str(wrong)]) == BAD_INPUT
    assert "31 layers" in capsys.readouterr().err
    for tokens in (0, 49):
        damaged = gathered(tmp_path / "damaged.safetensors", 80, 28672, tokens)
        assert run([*QUICK, "--from-run", str(damaged)]) == BAD_INPUT
        assert f"layer 0: neurons fired on 0 to 50 of {tokens} tokens" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert run([*QUICK, "--from-run", str(tmp_path / "other.safetensors")]) == BAD_INPUT
    assert "no activation statistics in it" in capsys.readouterr().err


def test_what_generate_saves_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "run.safetensors")
    assert run(["generate", "-p", "Once", "-n", "4", "--temp", "0", "--save-stats", path]) == OK
    capsys.readouterr()
    found = planned(capsys, "plan", "--gpu", "rtx4090", "--ram-bandwidth", "20", "--no-compare", "--from-run", path)
    assert found["rates"].startswith(f"gathered in {path}")
    assert 0 < found["density"] < 0.2


def test_a_plan_is_written_and_drawn(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan, png = tmp_path / "plan.json", tmp_path / "plan.png"
    found = planned(capsys, *QUICK, "-o", str(plan), "--plot", str(png))
    content = json.loads(plan.read_text())
    assert [layer["n_hot"] for layer in content["layers"]] == [layer["hot"] for layer in found["layers"]]
    assert (content["context"], content["budget_bytes"]) == (4096, 20 * 10**9)
    assert content["figures"]["tokens_per_s"] == found["tokens_per_s"]
    pytest.importorskip("matplotlib")
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path, why in ((tmp_path / "folder", "Is a directory"), (tmp_path / "file" / "plan.json", "")):
        assert run([*QUICK, "-o", str(path)]) == BAD_INPUT
        assert f"error: {path}: {why}" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_without_matplotlib_the_plan_is_there_all_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run([*QUICK, "--plot", str(tmp_path / "plan.png")]) == OK
    assert "no plot: matplotlib is not installed" in capsys.readouterr().err
    assert not (tmp_path / "plan.png").exists()


def test_the_guide_and_what_is_impossible_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    rows = planned(capsys, "plan", "--guide")["guide"]
    by_item = {(row["table"], row["item"]): row for row in rows}
    assert len(rows) == 4 + 3 + 16 + 3 + 4
    thumb = by_item["a layer's bytes", "70B"]
    assert thumb["ours"] == pytest.approx(0.513, rel=0.01)
    assert thumb["verdict"] == "impossible"
    assert "2.2" in thumb["why"]
    layers = by_item["layers by VRAM", "70B on 24 GB"]
    assert (layers["guide"], layers["verdict"]) == ("20 layers", "room left")
    assert 38 <= layers["ours"] <= 46
    split = by_item["70B on an RTX 3090", "llama.cpp, 20 of 80 layers"]
    assert split["verdict"] == "impossible"
    assert split["ours"] == pytest.approx(41.26 / 31.0, rel=0.01)
    full = next(row for row in rows if "full precision" in row["item"])
    assert full["verdict"] == "impossible"
    assert full["ours"] == pytest.approx(2039 / 137.5, rel=0.01)
    assert run(["plan", "--guide"]) == OK
    out = capsys.readouterr().out
    for title in ("least VRAM", "a layer's bytes", "layers by VRAM", "70B on an RTX 3090", "70B by card"):
        assert title in out


def test_cells_are_shared_out_to_the_last() -> None:
    assert share_out([1, 1, 1], 10) == [4, 3, 3]
    assert share_out([0, 5, 0], 7) == [0, 7, 0]
    assert share_out([0, 0], 7) == [0, 0]
    assert sum(share_out([123, 4567, 89, 1], 60)) == 60
