"""pinfer train and pinfer solve: from a text to a directory that runs, whatever interrupts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.cli import train as cli_train
from pinfer.cli.main import BAD_INPUT, INTERRUPTED, OK
from pinfer.cli.main import run as cli
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.engine.fitting import CALIBRATE, STAGE
from pinfer.engine.manifest import MANIFEST
from pinfer.engine.solved import ACTIVATIONS, CALIBRATION, PLAN, PREDICTOR, Solved
from pinfer.formats.gguf import GGUFFile
from pinfer.placement import Plan
from pinfer.solve import calibration as calibration_stage
from pinfer.sparsify import density
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

QUICK = ["--tokens", "4200", "--steps", "30", "--predictor-rank", "32"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "a",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "hold",
        "five",
        "boxing",
        "matches",
    ]
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(0, len(words), (3000,), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[number] for number in chosen))
    return str(path)


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def content(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir() if path.is_file()}


def test_a_relu_model_is_trained_and_keeps_its_quality(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = str(write_tiny_llama(tmp_path / "m.gguf")), str(tmp_path / "solved")
    arguments = ["solve", "-m", model, "-o", directory, "--text", text, "--quality", "0.9", "--json", *QUICK]
    assert cli(arguments) == OK
    found = last_json(capsys)
    assert found["method"] == "low_rank"
    assert found["rank"] == [32, 32]
    calibration = found["calibration"]
    assert calibration["target"] == {"quality": 0.9}
    assert calibration["bound"] <= calibration["allowed"]
    solved = Solved.open(directory)
    assert set(solved.stages) == {"profile", STAGE, CALIBRATE}
    assert all(solved.has(name) for name in (ACTIVATIONS, PREDICTOR, CALIBRATION))
    before = content(directory)
    assert cli(arguments) == OK  # nothing is left to do
    assert content(directory) == before
    assert "calibrated for this already" in capsys.readouterr().err
    engine = load_engine(RunConfig(model=model, predictor_path=directory))
    with engine.computing():
        engine.model(torch.arange(4, 200), engine.model.new_cache())
    assert density(engine.model) == pytest.approx(calibration["density"], abs=0.25)


@pytest.mark.parametrize(("method", "asked"), [("auto", 0.5), ("gate_threshold", 0.7)])
def test_other_models_are_fitted_to_a_density(
    tmp_path: Path, text: str, method: str, asked: float, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = str(write_tiny_gemma3(tmp_path / "m.gguf", n_layers=3)), str(tmp_path / "solved")
    arguments = ["solve", "-m", model, "-o", directory, "--text", text, "--method", method, "--density", str(asked)]
    assert cli([*arguments, "--tokens", "4200", "--json"]) == OK
    found = last_json(capsys)
    assert found["method"] == ("shift_threshold" if method == "auto" else method)
    densities = Solved.open(directory).read_json(CALIBRATION)["densities"]
    assert sum(densities) / len(densities) == pytest.approx(asked, abs=1e-3)
    assert (
        cli(
            [
                "eval",
                "-m",
                model,
                "-f",
                text,
                "--predictor-path",
                directory,
                "--window",
                "64",
                "--windows",
                "4",
                "--json",
            ]
        )
        == OK
    )
    assert last_json(capsys)["density"] == pytest.approx(asked, abs=0.15)


def test_train_alone_and_then_solve_takes_its_predictors(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = str(write_tiny_llama(tmp_path / "m.gguf")), str(tmp_path / "solved")
    given = ["-m", model, "-o", directory, "--text", text, *QUICK]
    assert cli(["train", *given]) == OK
    out = capsys.readouterr().out
    assert "of the FFN's bytes" in out
    assert f"--predictor-path {directory}" in out
    trained = (Path(directory) / PREDICTOR).read_bytes()
    assert cli(["generate", "-m", model, "-p", "the", "-n", "4", "--predictor-path", directory]) == OK
    assert cli(["solve", *given, "--density", "0.5"]) == OK
    assert "holds these predictors already" in capsys.readouterr().err
    assert (Path(directory) / PREDICTOR).read_bytes() == trained
    assert not [path for path in Path(directory).iterdir() if path.is_dir()], "checkpoints are gone"


def test_sign_bits_are_fitted_to_a_recall(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, directory = str(write_tiny_llama(tmp_path / "m.gguf")), str(tmp_path / "solved")
    given = ["-m", model, "-o", directory, "--text", text, "--tokens", "4200", "--method", "sign_bits"]
    assert cli(["train", *given, "--recall", "0.9", "--json"]) == OK
    found = last_json(capsys)
    assert [one["recall"] for one in found["quality"]] == pytest.approx([0.9, 0.9], abs=0.08)


@pytest.mark.parametrize("method", ["sign_bits", "low_rank"])
def test_the_table_says_what_its_titles_say_of_a_layer_where_nothing_fires_too(
    tmp_path: Path, text: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf")
    gate = GGUFFile.open(model).tensor("blk.1.ffn_gate.weight").blocks
    model.write_bytes(model.read_bytes().replace(gate.numpy().tobytes(), bytes(gate.numel() * gate.element_size())))
    given = ["-m", str(model), "-o", str(tmp_path / "solved"), "--text", text, "--method", method]
    given += QUICK if method == "low_rank" else QUICK[:2]
    assert cli(["train", *given]) == OK
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.split()[:1] == ["layer"])
    titles = lines[at].replace("at ", "").split()  # on one line of 80 columns
    assert cli(["train", *given, "--json"]) == OK
    qualities = last_json(capsys)["quality"]
    assert qualities[1]["active"] == 0 < qualities[0]["active"]
    assert qualities[1]["recall"] == 1  # as PredictorQuality has it
    for layer, quality in enumerate(qualities):
        cells = dict(zip(titles, lines[at + 2 + layer].split(), strict=True))
        for title, name in (("active", "active"), ("named", "density"), ("recall", "recall")):
            assert float(cells[title]) == pytest.approx(100 * quality[name], abs=0.051)


def test_an_interrupted_calibration_goes_on_to_the_same_end(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny_gemma3(tmp_path / "m.gguf", n_layers=3))

    def arguments(directory: str) -> list[str]:
        return [
            "solve",
            "-m",
            model,
            "-o",
            str(tmp_path / directory),
            "--text",
            text,
            "--tokens",
            "4200",
            "--density",
            "0.5",
        ]

    assert cli(arguments("whole")) == OK
    whole = capsys.readouterr().err.count("calibrating:")
    keep, kept = calibration_stage._Measured.keep, []

    def stops(self: Any, *given: Any) -> None:
        keep(self, *given)
        kept.append(given[0])
        if len(kept) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(calibration_stage._Measured, "keep", stops)
        assert cli(arguments("cut")) == INTERRUPTED
    assert "keeps what is measured" in capsys.readouterr().err
    assert cli(arguments("cut")) == OK
    assert capsys.readouterr().err.count("calibrating:") == whole - 20
    one, other = content(str(tmp_path / "whole")), content(str(tmp_path / "cut"))
    assert one[CALIBRATION] == other[CALIBRATION]
    assert one[MANIFEST] == other[MANIFEST]


def test_measurements_that_are_damaged_are_made_again(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = str(write_tiny_llama(tmp_path / "m.gguf")), tmp_path / "solved"
    given = ["solve", "-m", model, "-o", str(directory), "--text", text, "--tokens", "4200"]
    given += ["--method", "gate_threshold", "--density"]
    assert cli([*given, "0.5"]) == OK
    whole = (directory / calibration_stage.MEASURED).read_bytes()
    figures = Solved.open(directory).stages[CALIBRATE].figures
    capsys.readouterr()
    for damage in ("a digit", "its half", "no object"):
        changed = json.loads(whole)
        name = next(name for name in changed["measured"] if name.startswith("layer 0"))
        changed["measured"][name] = 7.0
        contents = {"a digit": json.dumps(changed).encode(), "its half": whole[: len(whole) // 2], "no object": b"[]"}
        assert cli([*given, "0.4"]) == OK  # another target, so that it is calibrated again
        (directory / calibration_stage.MEASURED).write_bytes(contents[damage])
        capsys.readouterr()
        assert cli([*given, "0.5"]) == OK
        assert "measured anew" in capsys.readouterr().err, damage
        assert Solved.open(directory).stages[CALIBRATE].figures == figures


def test_predictors_that_another_process_replaced_are_not_calibrated(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = str(write_tiny_llama(tmp_path / "m.gguf")), str(tmp_path / "solved")
    given = ["-m", model, "-o", directory, "--text", text, "--tokens", "4200", "--method"]
    made = cli_train.make_predictors

    def then_another(*arguments: Any) -> Any:
        found = made(*arguments)
        monkeypatch.setattr(cli_train, "make_predictors", made)
        assert cli(["train", *given, "sign_bits"]) == OK
        return found

    monkeypatch.setattr(cli_train, "make_predictors", then_another)
    assert cli(["solve", *given, "gate_threshold", "--density", "0.5"]) == BAD_INPUT
    assert "replaced its predictors" in capsys.readouterr().err
    assert CALIBRATE not in Solved.open(directory).stages


@pytest.mark.parametrize("method", ["gate_threshold", "weighted_threshold", "sign_bits", "low_rank"])
def test_damaged_weights_are_named_by_their_layer(
    tmp_path: Path, text: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf")
    gate = GGUFFile.open(model).tensor("blk.1.ffn_gate.weight").blocks.numpy().tobytes()
    nan = torch.full((1,), float("nan")).numpy().tobytes()
    model.write_bytes(model.read_bytes().replace(gate, nan + gate[len(nan) :]))
    given = ["-m", str(model), "-o", str(tmp_path / "solved"), "--text", text, "--tokens", "4200", "--method", method]
    assert cli(["train", *given]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert "layer 1" in line
    assert "finite" in line or "damaged" in line


def test_predictors_of_another_activation_do_not_run(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = str(write_tiny_llama(tmp_path / "m.gguf")), str(tmp_path / "solved")
    given = ["-m", model, "--activation", "silu"]
    assert cli(["train", *given, "-o", directory, "--text", text, "--tokens", "4200"]) == OK
    run = ["-p", "the", "-n", "2", "--predictor-path", directory, "--sparsity", "0.5"]
    assert cli(["generate", *given, *run]) == OK
    for command in (["generate", *run], ["bench", "-p", "8", *run[4:]], ["eval", "-f", text, *run[4:]]):
        capsys.readouterr()
        assert cli([*command, "-m", model]) == BAD_INPUT
        assert "for activation silu, and the model runs with relu" in capsys.readouterr().err


def test_a_run_tells_of_the_recall_that_its_predictors_were_fitted_to(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny_llama(tmp_path / "m.gguf"))
    asked = (("sign_bits", ["--recall", "0.9"], "(asked 90 %, worst"), ("low_rank", QUICK[2:], "(worst layer"))
    for method, more, said in asked:
        directory = str(tmp_path / method)
        given = ["-m", model, "-o", directory, "--text", text, "--tokens", "4200", "--method", method]
        assert cli(["train", *given, *more]) == OK
        assert any(said in note for note in load_engine(RunConfig(model=model, predictor_path=directory)).notes)


def test_a_dry_run_says_what_each_stage_takes_and_writes_nothing(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for write, extra in ((write_tiny_llama, QUICK), (write_tiny_gemma3, ["--tokens", "4200"])):
        model = str(write(tmp_path / f"{write.__name__}.gguf", n_layers=2))
        arguments = ["solve", "-m", model, "-o", str(tmp_path / "none"), "--text", text, "--dry-run", "--json", *extra]
        assert cli(arguments) == OK
        found = last_json(capsys)
        assert [stage["stage"] for stage in found["stages"]] == ["profile", "predictors", "calibration"]
        assert all(stage["total_s"] > 0 and stage["peak_rss_bytes"] > 1e6 for stage in found["stages"])
        assert found["total_s"] == pytest.approx(sum(stage["total_s"] for stage in found["stages"]))
        assert not (tmp_path / "none").exists()
    assert cli([one for one in arguments if one != "--json"]) == OK
    assert "Nothing was written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--density 0.3 --quality 0.9", "one of them"),
        ("--density 0", "density must lie in"),
        ("--quality 1", "quality must lie in (0, 1)"),
        ("--method exact", "method exact has no predictors"),
        ("--method dense", "method dense has no predictors"),
        ("--method sign_bits --activation silu", "sign_bits needs a ReLU model"),
        ("--activation silu --method low_rank", "training needs a sparsity"),
        ("--activation drelu --method shift_threshold", "no meaning for drelu"),
        ("--method gate_threshold --sparsity 0.5", "sparsity 0.5 has no meaning for gate_threshold"),
        ("--method gate_threshold --predictor-rank 32", "rank 32 has no meaning for gate_threshold"),
        ("--predictor-rank 33", "multiple of 32"),
        ("--predictor-share 0", "ffn_share must be above 0"),
        ("--predictor-share 5", "at most 1"),
        ("--steps 0", "steps must be at least 1"),
        ("--disk-gb 0", "--disk-gb must be above 0"),
        ("--disk-gb 1e-9", "disk"),
        ("--tokens 20", "tokens must be at least 64"),
        ("--text nothing.txt", "nothing.txt"),
        ("--target-gpu-layers -5", "--target-gpu-layers must be at least -1 (all), not -5"),
        ("--gpu-memory-gb 1e300", "--gpu-memory-gb must lie in [0, 1e+06], not 1e+300"),
        # Known before predictors are made, which can take an hour.
        ("--target-gpu-layers 2 --gpu-memory-gb 0.001", "2 layers wholly on the GPU take"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(
    tmp_path: Path, flags: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_tiny_llama(tmp_path / "m.gguf"))
    assert cli(["solve", "-m", model, "-o", str(tmp_path / "solved"), *flags.split()]) == BAD_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert named in line
    assert not (tmp_path / "solved").exists()


def test_neurons_are_placed_and_run_where_they_are(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, directory = str(write_tiny_llama(tmp_path / "m.gguf", n_layers=3)), str(tmp_path / "solved")
    arguments = ["solve", "-m", model, "-o", directory, "--text", text, "--density", "0.6", "--json", *QUICK]
    assert cli(arguments) == OK
    assert "4 of 4, placement, is left out" in capsys.readouterr().err
    assert not Solved.open(directory).has(PLAN)
    device = ["--device", "emulated", "--gpu-memory-gb", "0.01", "--target-gpu-layers", "1"]
    hardware = ["--gpu-bandwidth", "500", "--ram-bandwidth", "40"]
    assert cli([*arguments, *device, *hardware]) == OK
    found = last_json(capsys)["placement"]
    assert 0 < found["gpu_bytes"] <= 0.01e9
    before = content(directory)
    assert cli([*arguments, *device, *hardware]) == OK  # nothing is left to do
    assert content(directory) == before
    plan = Plan.from_plain(Solved.open(directory).read_json(PLAN))
    assert [layer.attention for layer in plan.layers][-1] == "gpu"
    run = ["generate", "-m", model, "--predictor-path", directory, "-p", "hello", "-n", "8", "--temp", "0", "--json"]
    assert cli(run) == OK
    capsys.readouterr()
    texts = []
    for more in ([], ["--device", "emulated"], ["--device", "emulated", "--gpu-memory-gb", "0.01"]):
        assert cli([*run, *more]) == OK
        texts.append(last_json(capsys))
    assert texts[0]["ids"] == texts[1]["ids"] == texts[2]["ids"]
    assert texts[0]["placement"] is None
    assert texts[1]["placement"]["source"] == f"plan of {directory}"
    assert texts[1]["vram_bytes"] <= found["gpu_bytes"]
    assert cli(["0.5" if one == "0.6" else one for one in arguments]) == OK  # a calibration made anew
    assert not Solved.open(directory).has(PLAN)


def test_the_guides_flags_are_taken(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_tiny_llama(tmp_path / "m.gguf"))
    directory = str(tmp_path / "predictors" / "m")
    arguments = ["--model", model, "--output", directory, "--target-gpu-layers", "20", "--gpu-memory-gb", "16"]
    assert cli(["solve", *arguments, "--text", text, *QUICK, "--density", "0.5"]) == OK
    err = capsys.readouterr().err
    assert "4 of 4, placement" in err
    if not torch.cuda.is_available():
        assert "speeds of an RTX 4090" in err
    assert Solved.open(directory).has(PLAN)
    assert sorted(path.name for path in Path(directory).iterdir() if path.suffix != ".lock")[:2]
