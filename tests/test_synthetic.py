"""Synthetic models: what is planted is what pinfer computes, and the files are ordinary ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from experiments.synthetic.__main__ import main
from experiments.synthetic.build import FITTED, FRESH, LENGTH
from experiments.synthetic.planting import fitting_offsets, power_law, power_law_exponent, share_holding
from experiments.synthetic.recipe import CONSTANT, SHAPES, Recipe, default_vocab
from pinfer import sparsify
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.tokenizer import load_tokenizer
from pinfer.formats.type_mix import TYPES
from pinfer.kernels.ops import dequantize, quant_matmul
from pinfer.models import KVCache
from pinfer.quant import BY_NAME, F32, Q4_K, Q5_K, Q6_K

CASES = [(density, skew) for density in (0.1, 0.3) for skew in ("powerlaw", "uniform")]
TEXT = "Once upon a time, a small fox said hello.\n  Two spaces, 中 and 🦊."


def make(path: Path, *flags: str, density: float = 0.1, type: str = "q4_0") -> Path:
    arguments = ["--shape", "tiny", "--type", type, "--density", str(density), "-o", str(path), *flags]
    assert main(arguments) == 0
    return path


def recipe(type_name: str, shape: str = "tiny", layers: int = 2) -> Recipe:
    return Recipe(shape, layers, type_name, 0.1, "powerlaw", "relu", 512, 64, 0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[float, str], Path]:
    folder = tmp_path_factory.mktemp("synthetic")
    return {
        (density, skew): make(folder / f"{skew}-{density}.gguf", "--skew", skew, density=density)
        for density, skew in CASES
    }


@pytest.fixture
def model(models: dict[tuple[float, str], Path]) -> Path:
    return models[0.1, "powerlaw"]


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(3, 512, (count,), generator=torch.Generator().manual_seed(4))


def firing_counts(path: Path, ids: torch.Tensor) -> list[torch.Tensor]:
    """How often each neuron fired in pinfer's dense model, one [N] a layer."""
    engine = load_engine(RunConfig(model=str(path), method="dense"))
    counts: list[torch.Tensor] = []
    for ffn in engine.model.ffns():
        ffn.register_forward_pre_hook(lambda ffn, inputs: counts.append((quant_matmul(inputs[0], ffn.gate) > 0).sum(0)))
    with engine.computing():
        engine.model(ids, KVCache(engine.config, len(ids)), last_only=True)
    return counts


@pytest.mark.parametrize(("density", "skew"), CASES)
def test_pinfer_reaches_the_density_asked_for(models: dict[Any, Path], density: float, skew: str) -> None:
    engine = load_engine(RunConfig(model=str(models[density, skew]), method="exact"))
    with engine.computing():
        engine.model(random_ids(200), KVCache(engine.config, 200), last_only=True)
    for layer in sparsify.layer_densities(engine.model):
        assert layer.density == pytest.approx(density, rel=0.25)


@pytest.mark.parametrize(("density", "skew"), CASES)
def test_frequencies_are_skewed_or_flat_as_asked(models: dict[Any, Path], density: float, skew: str) -> None:
    for counts in firing_counts(models[density, skew], random_ids(400)):
        share = share_holding(counts)
        assert 0.2 < share < 0.32 if skew == "powerlaw" else 0.65 < share < 0.8
        order = counts.argsort(descending=True)
        assert (order[:100] > 512).any(), "frequent neurons must lie anywhere"
        assert (order[:100] < 512).any(), "frequent neurons must lie anywhere"


def test_sparse_equals_dense(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", type="f16")  # a type whose transposed down is exact
    logits = []
    for method in ("dense", "exact"):
        engine = load_engine(RunConfig(model=str(path), method=method))
        ids = torch.tensor(engine.tokenizer.encode(TEXT))
        with engine.computing():
            logits.append(engine.model(ids, KVCache(engine.config, 128)))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)


def test_the_reported_density_is_what_pinfer_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The builder's own forward pass against pinfer's, over the same fresh tokens."""
    path = make(tmp_path / "m.gguf", "--seed", "7", "--json", type="q6_k")
    figures = json.loads(capsys.readouterr().out)
    sequences = torch.randint(512, (FITTED + FRESH, LENGTH), generator=torch.Generator().manual_seed(7))
    counts = [firing_counts(path, ids) for ids in sequences[FITTED:]]
    for layer in range(2):
        fired = torch.stack([sequence[layer] for sequence in counts]).sum(0)
        density = float(fired.sum()) / (FRESH * LENGTH * len(fired))
        assert figures["density_by_layer"][layer] == pytest.approx(density, abs=5e-4)
    assert figures["density"] == pytest.approx(0.1, rel=0.1)
    assert figures["share_for_80"] == pytest.approx(0.26, abs=0.04)
    assert figures["seed"] == 7
    assert figures["bytes"] == path.stat().st_size
    assert figures["path"] == str(path)


@pytest.mark.parametrize("type_name", TYPES)
def test_every_type_makes_a_whole_model(type_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "m.gguf", "--layers", "1", "--json", type=type_name)
    file = GGUFFile.open(path)
    config = model_config(file)
    check_tensors(file, config)
    assert config.activation == "relu"
    assert file.has("output.weight")
    for name, spec in recipe(type_name, layers=1).tensors().items():
        assert file.info(name).type is spec.type, name
    tokenizer = load_tokenizer(file.metadata)
    assert tokenizer.vocab_size == config.vocab_size == 512
    assert tokenizer.decode(tokenizer.encode(TEXT, add_bos=False)) == TEXT
    assert json.loads(capsys.readouterr().out)["density"] == pytest.approx(0.1, rel=0.15)


def test_the_constant_direction_is_never_written_to(model: Path) -> None:
    engine = load_engine(RunConfig(model=str(model), method="dense"))
    embedding = dequantize(engine.model.embedding)
    assert torch.equal(embedding[:, :CONSTANT], torch.full((512, CONSTANT), 2.0))
    assert embedding[:, CONSTANT:].std() == pytest.approx(1, abs=0.02)
    for block in engine.model.blocks:
        for weight in (block.attention.weights.output, block.ffn.down):
            values = dequantize(weight)
            assert not values[:CONSTANT].any()
            assert values[CONSTANT:].any(dim=1).all()
        gate = dequantize(block.ffn.gate)
        assert torch.equal(gate[:, :CONSTANT], gate[:, :1].expand(-1, CONSTANT))


def test_the_residual_is_truly_changed_but_the_constant_stays(model: Path) -> None:
    engine = load_engine(RunConfig(model=str(model), method="dense"))
    inputs: list[torch.Tensor] = []
    for block in engine.model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    engine.model.norm.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with engine.computing():
        engine.model(random_ids(64), KVCache(engine.config, 64))
    before, after = inputs[0], inputs[-1]
    assert torch.equal(before[:, :CONSTANT], after[:, :CONSTANT])
    energy = after[:, CONSTANT:].square().sum() / before[:, CONSTANT:].square().sum()
    assert 1.25 < energy < 1.6


def test_gates_have_the_rank_asked_for(tmp_path: Path) -> None:
    path = make(tmp_path / "m.gguf", "--gate-rank", "5", "--layers", "1", type="f32")
    engine = load_engine(RunConfig(model=str(path), method="dense"))
    assert int(torch.linalg.matrix_rank(dequantize(engine.model.ffns()[0].gate)[:, CONSTANT:])) == 5


def test_silu_neurons_that_do_not_fire_are_negligible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "m.gguf", "--activation", "silu", "--skew", "uniform", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert 0 < figures["silent_share"] < 0.01
    assert figures["density"] == pytest.approx(0.1, rel=0.1)
    assert model_config(GGUFFile.open(path)).activation == "silu"


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = (make(tmp_path / name).read_bytes() for name in ("first.gguf", "again.gguf"))
    assert first == again
    assert make(tmp_path / "other.gguf", "--seed", "1").read_bytes() != first


def test_mixes_give_the_important_tensors_more_bits() -> None:
    """The layers that llama.cpp chooses of 32; `output.weight` in Q6_K, everything else in the base type."""
    chosen = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    for name, base in (("q4_k_m", Q4_K), ("q5_k_m", Q5_K)):
        for spec in recipe(name, "llama-2-7b", 32).tensors().values():
            parts = spec.name.split(".")
            important = parts[0] == "blk" and parts[2] in ("attn_v", "ffn_down") and int(parts[1]) in chosen
            expected = F32 if spec.rows == 0 else Q6_K if important or spec.name == "output.weight" else base
            assert spec.type is expected, spec.name
    assert all(spec.type in (F32, BY_NAME["Q5_0"]) for spec in recipe("q5_0").tensors().values())


def test_the_head_keeps_its_share_in_a_cut_model() -> None:
    assert default_vocab(SHAPES["llama-2-7b"], 32) == 32000
    assert default_vocab(SHAPES["llama-2-7b"], 4) == 4000
    assert default_vocab(SHAPES["llama-3-8b"], 4) == 16032
    assert default_vocab(SHAPES["llama-2-70b"], 1) == 512


def test_the_default_name_and_the_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--shape", "tiny", "--layers", "1", "--type", "Q4_0", "--vocab", "600"]) == 0
    path = tmp_path / "tiny-1l-q4_0-relu.gguf"
    assert [path] == list(tmp_path.iterdir())
    assert model_config(GGUFFile.open(path)).vocab_size == 600
    output = capsys.readouterr()
    assert "density on fresh tokens" in output.out
    assert "layer 1 of 1" in output.err


@pytest.mark.parametrize(
    "flags",
    [
        ["--shape", "llama-9"],
        ["--type", "q9_9"],
        ["--density", "0"],
        ["--density", "nan"],
        ["--density", "much"],
        ["--skew", "odd"],
        ["--activation", "gelu"],
        ["--layers", "0"],
        ["--vocab", "100"],
        ["--gate-rank", "225"],
        ["--seed", "-1"],
        ["-o", "nowhere/m.gguf"],
        ["-o", "."],
        ["--what"],
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_2_with_one_line(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--shape", "tiny", "--type", "q4_0", *flags])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)])
@pytest.mark.parametrize("calls", [0, 5])
def test_a_stopped_run_leaves_nothing_behind(
    error: BaseException,
    code: int,
    calls: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = [calls]
    write = gguf.GGUFWriter.write_tensor_data

    def fail(writer: gguf.GGUFWriter, *arguments: Any) -> None:
        if not left[0]:
            raise error
        left[0] -= 1
        write(writer, *arguments)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    assert main(["--shape", "tiny", "--type", "q4_0", "--layers", "1", "-o", str(tmp_path / "m.gguf")]) == code
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in capsys.readouterr().err


def test_a_disk_without_room_is_found_out_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.synthetic.sink.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert main(["--shape", "tiny", "--type", "q4_0", "-o", str(tmp_path / "m.gguf")]) == 1
    assert "free" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3])
def test_a_power_law_puts_80_percent_of_firings_on_26_percent_of_neurons(density: float) -> None:
    frequencies = power_law(5000, density, power_law_exponent(5000, density))
    assert float(frequencies.mean()) == pytest.approx(density, rel=1e-6)
    assert float(frequencies.max()) <= 0.98
    assert share_holding(frequencies) == pytest.approx(0.26, abs=0.005)


def test_denser_models_cannot_be_that_skewed() -> None:
    frequencies = power_law(5000, 0.9, power_law_exponent(5000, 0.9))
    assert float(frequencies.mean()) == pytest.approx(0.9, rel=1e-6)
    assert float(frequencies.max()) <= 0.98


def test_offsets_make_neurons_fire_as_often_as_wanted(generator: torch.Generator) -> None:
    wanted = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.98], dtype=torch.float64)
    rest = 3 * torch.randn(999, 5, generator=generator) + 1
    constant = 60 + torch.rand(999, generator=generator)
    offsets = fitting_offsets(rest, constant, wanted)
    fired = ((rest + constant[:, None] * offsets) > 0).double().mean(0)
    torch.testing.assert_close(fired, wanted, atol=2e-3, rtol=0)


def test_share_holding_of_nothing_and_of_all_alike() -> None:
    assert share_holding(torch.zeros(10)) == 0
    assert share_holding(torch.ones(10)) == 0.8
    assert share_holding(torch.tensor([1, 97, 1, 1])) == 0.25
