"""PowerInfer's files: their predictors and neuron-major rows run as ours, and what contradicts itself is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.cli.main import BAD_INPUT, OK, run
from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import Engine, Generation, load_engine
from pinfer.ffn import SparseFFN
from pinfer.formats import open_model
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.powerinfer import read_gpu_index
from pinfer.kernels.transpose import transpose_weights
from pinfer.models import build_model
from pinfer.neuron_major_ffn import NeuronMajorFFN
from pinfer.predictors import MLP
from pinfer.quant import F16, F32, Q4_0, QuantTensor, QuantType
from pinfer.sparsify import density, fit_gate_threshold_predictors, predictor_bytes
from tests.powerinfer_files import ARCHITECTURES, LAYERS, NEURONS, Tensors, write_gpu_index, write_powerinfer

PROMPT = "hello world, the hello hell"
every_file = pytest.mark.parametrize(
    ("architecture", "kind"), [(one, kind) for one in ARCHITECTURES for kind in (F16, Q4_0)], ids=str
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, QuantType], Path]:
    folder, made = tmp_path_factory.mktemp("powerinfer"), {}

    def path_of(architecture: str, kind: QuantType) -> Path:
        key = f"{architecture}-{kind}"
        if key not in made:
            made[key] = write_powerinfer(folder / f"{key}.gguf", architecture, kind)
        return made[key]

    return path_of


def engine_of(path: Path, **settings: Any) -> Engine:
    return load_engine(RunConfig(model=str(path), sampling=SamplingConfig(temperature=0), **settings))


def logits_of(path: Path, **settings: Any) -> torch.Tensor:
    engine = engine_of(path, precision="float32", **settings)
    tokens = torch.tensor(engine.tokenizer.encode(PROMPT))
    with engine.computing():
        return engine.model(tokens, engine.model.new_cache())


def generated(engine: Engine) -> Generation:
    tokens = engine.tokenizer.encode(PROMPT)
    generation = Generation(engine, tokens, max_tokens=24, sampling=engine.run.sampling, ignore_eos=True)
    list(generation)
    return generation


def text_of(engine: Engine) -> str:
    return generated(engine).text


@every_file
def test_its_predictors_are_used_and_change_nothing(
    files: Callable[[str, QuantType], Path], architecture: str, kind: QuantType, tmp_path: Path
) -> None:
    """Text is that of every neuron computed: on the same rows, and with floats on the rows turned round as well."""
    path = files(architecture, kind)
    sparse, every = (
        engine_of(path),
        engine_of(write_powerinfer(tmp_path / "all.gguf", architecture, kind, threshold=-1e9)),
    )
    assert sparse.method == "mlp"
    assert text_of(sparse) == text_of(every)
    assert 0.02 < density(sparse.model) < 0.25
    assert density(every.model) == 1
    if kind is F16:
        assert text_of(sparse) == text_of(engine_of(path, method="dense"))
    torch.testing.assert_close(logits_of(path), logits_of(path, method="exact"), rtol=0, atol=1e-4)


@every_file
def test_the_dense_path_turns_the_rows_round(
    files: Callable[[str, QuantType], Path], architecture: str, kind: QuantType
) -> None:
    path = files(architecture, kind)
    expected, found = logits_of(path), logits_of(path, method="dense")
    error = float((found - expected).norm() / expected.norm())
    assert error < (1e-5 if kind is F16 else 0.05)  # Q4_0 columns become Q8_0
    told = [note for note in engine_of(path, method="dense").notes if "requantised to Q8_0 for the dense path" in note]
    assert bool(told) == (kind is Q4_0)


def test_the_sparse_path_computes_on_the_files_own_rows(files: Callable[[str, QuantType], Path]) -> None:
    engine = engine_of(files("llama", Q4_0))
    whole = engine.file.parts[0].data
    for ffn in engine.model.ffns():
        assert isinstance(ffn, SparseFFN)
        assert whole.data_ptr() <= ffn.weights.down.blocks.data_ptr() < whole.data_ptr() + whole.numel()
        assert isinstance(ffn.predictor, MLP)
    assert not list(engine.path.parent.glob("*.pinfer-down*"))


def test_its_steps_are_recorded_and_its_bytes_counted(files: Callable[[str, QuantType], Path]) -> None:
    engine = engine_of(files("llama", F16))
    assert generated(engine).stats.unrecorded is None
    ranks = [128 + 32 * layer for layer in range(LAYERS)]
    assert predictor_bytes(engine.model) == sum(2 * rank * (64 + NEURONS) for rank in ranks)


def test_canonical_names(files: Callable[[str, QuantType], Path]) -> None:
    file = open_model(files("opt", F16))
    assert file.format == "PowerInfer GGUF v3"
    assert not file.has("blk.0.ffn_down.weight")
    for name in ("attn_q.weight", "attn_v.bias", "ffn_down_t.weight", "ffn_down.bias", "fc1.weight"):
        assert file.has(f"blk.1.{name}")
    assert file.info("blk.0.ffn_down_t.weight").shape == (NEURONS, 64)
    assert model_config(file).activation == "relu"
    assert model_config(open_model(files("bamboo", F16))).activation == "drelu"


@pytest.mark.parametrize("cold_fraction", [0.4, 1.0])
def test_a_split_model_asks_a_part_of_the_predictor_each(
    files: Callable[[str, QuantType], Path], cold_fraction: float
) -> None:
    path = files("llama", F16)
    torch.testing.assert_close(logits_of(path, cold_fraction=cold_fraction), logits_of(path), rtol=0, atol=1e-4)


def test_later_files_have_the_magic_of_gguf(tmp_path: Path, files: Callable[[str, QuantType], Path]) -> None:
    path = write_powerinfer(tmp_path / "m.gguf", magic=b"GGUF")
    assert torch.equal(logits_of(path), logits_of(files("llama", F16)))


def test_the_threshold_is_reached_by_what_equals_it() -> None:
    first = QuantTensor.from_dense(torch.eye(4))
    second = QuantTensor.from_dense(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    residual = torch.tensor([[0.5, 0.25, 0.75, -3.0]])
    for at_least, expected in ((0.5, [0, 2]), (0.0, [0, 1, 2, 3]), (1e-30, [0, 1, 2])):
        active = MLP(first, second, at_least)(torch.full((1, 4), math.nan), residual).active
        assert active.indices[: int(active.count)].sort().values.tolist() == expected


def test_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[R, D\] and \[N, R\]"):
        MLP(QuantTensor.from_dense(torch.zeros(8, 4)), QuantTensor.from_dense(torch.zeros(6, 4)))


def without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def shaped(name: str, *shape: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = torch.zeros(*shape)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("blk.1.fc1.weight"), "tensor 'blk.1.fc1.weight' is missing"),
        (without("blk.0.fc1.weight"), "tensor 'blk.0.fc1.weight' is missing"),
        (without("blk.1.fc2.weight"), "tensor 'blk.1.fc2.weight' is missing"),
        (without("blk.0.ffn_down_t.weight"), "tensor 'blk.0.ffn_down_t.weight' is missing"),
        (without("blk.1.ffn_down_t.weight"), "tensor 'blk.1.ffn_down_t.weight' is missing"),
        (without("blk.1.ffn_gate.weight"), "tensor 'blk.1.ffn_gate.weight' is missing"),
        (shaped("blk.1.fc1.weight", 160, 32), "tensor 'blk.1.fc1.weight' has shape [160, 32], not [160, 64]"),
        (shaped("blk.1.fc2.weight", NEURONS, 128), "tensor 'blk.1.fc2.weight' has shape [160, 128], not [160, 160]"),
        (shaped("blk.0.ffn_down_t.weight", 64, NEURONS), "tensor 'blk.0.ffn_down_t.weight' has shape [64, 160]"),
        (shaped("blk.0.ffn_down.weight", 64, NEURONS), "tensor 'blk.0.ffn_down.weight' is not supported yet"),
    ],
)
def test_tensors_that_are_missing_or_misshapen_are_named(
    tmp_path: Path, change: Callable[[Tensors], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_powerinfer(tmp_path / "m.gguf", change=change)
    assert run(["generate", "-m", str(path), "-p", "a", "-n", "1"]) == BAD_INPUT
    assert said in capsys.readouterr().err


def test_a_file_without_predictors_is_run_by_its_gate(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".fc" in name]:
            del tensors[name]

    path = write_powerinfer(tmp_path / "m.gguf", change=change)
    assert engine_of(path).method == "exact"
    with pytest.raises(ValueError, match="method mlp needs a file with predictors"):
        engine_of(path, method="mlp")


def test_thresholds_and_sparsities_without_meaning_are_refused(
    tmp_path: Path, files: Callable[[str, QuantType], Path]
) -> None:
    with pytest.raises(ValueError, match=r"sparsity 0\.5 has no meaning for method mlp"):
        engine_of(files("llama", F16), method="mlp", sparsity=0.5)
    with pytest.raises(ValueError, match="sparse_threshold' must be finite"):
        engine_of(write_powerinfer(tmp_path / "m.gguf", threshold=math.nan))


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path, files: Callable[[str, QuantType], Path]) -> None:
    content = files("llama", F16).read_bytes()
    for length in (3, 20, 500, len(content) // 2):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            check_tensors(file := open_model(tmp_path / "cut.gguf"), model_config(file))


# The split.


def hot_neurons() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.rand(NEURONS, generator=draw) < share for share in (0.3, 0.7)]


def test_a_split_is_read_as_a_plan(tmp_path: Path, files: Callable[[str, QuantType], Path]) -> None:
    hot = hot_neurons()
    index = write_gpu_index(tmp_path / "m.gguf.generated.gpuidx", hot)
    assert all(torch.equal(one, two) for one, two in zip(read_gpu_index(index), hot, strict=True))
    path = files("llama", F16)
    engine = engine_of(path, device="emulated", plan=str(index), threads=2)
    assert engine.placement is not None
    assert [layer.n_hot for layer in engine.placement.plan.layers] == [int(one.sum()) for one in hot]
    assert text_of(engine) == text_of(engine_of(path, method="dense"))


def test_a_layer_without_neurons_on_the_gpu(tmp_path: Path) -> None:
    none = torch.zeros(NEURONS, dtype=torch.bool)
    for bucket in (torch.zeros(1), torch.tensor([-1])):
        index = write_gpu_index(tmp_path / "x.gpuidx", [none], buckets=[bucket])
        assert not read_gpu_index(index, [NEURONS])[0].any()


@pytest.mark.parametrize(
    ("settings", "neurons", "said"),
    [
        ({}, [96, 96], "blk.0.gpu_idx has 160 neurons, the model 96"),
        ({}, [NEURONS] * 3, "a split of 2 layers, for a model of 3"),
        ({"buckets": [torch.tensor([5, 3])] * 2}, None, "blk.0.gpu_bucket is not in ascending order"),
        ({"buckets": [torch.arange(7)] * 2}, None, "blk.0.gpu_bucket names 7 neurons that are not the"),
        ({"kind": F32}, None, "is type 0 [160], expected a vector of type 18"),
        ({"keys": {"general.architecture": "llama"}}, None, "no split over two devices"),
        ({"keys": {"generic.gpu_index.block_count": 3}}, None, "tensor 'blk.2.gpu_idx' is missing"),
    ],
)
def test_splits_that_contradict_themselves_or_the_model_are_refused(
    tmp_path: Path, settings: dict[str, Any], neurons: list[int] | None, said: str
) -> None:
    index = write_gpu_index(tmp_path / "x.gpuidx", hot_neurons(), **settings)
    with pytest.raises(ValueError, match=r"x\.gpuidx") as problem:
        read_gpu_index(index, neurons)
    assert said in str(problem.value)


def test_values_beside_0_and_1_and_files_cut_short_are_refused(tmp_path: Path) -> None:
    index = write_gpu_index(tmp_path / "x.gpuidx", [torch.full((NEURONS,), 2)], buckets=[torch.arange(NEURONS)])
    with pytest.raises(ValueError, match="gpu_idx holds other values than 0 and 1"):
        read_gpu_index(index)
    content = write_gpu_index(tmp_path / "y.gpuidx", hot_neurons()).read_bytes()
    for length in (10, 200, len(content) - 600):
        index.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"x\.gpuidx"):
            read_gpu_index(index)


def test_inspecting_one(files: Callable[[str, QuantType], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(files("falcon", Q4_0))]) == OK
    assert "PowerInfer GGUF v3" in capsys.readouterr().out


def test_a_fit_keeps_one_turned_matrix_at_a_time(
    files: Callable[[str, QuantType], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model computes densely after it as before."""
    file = open_model(files("llama", Q4_0))
    model = build_model(file, model_config(file), 32)
    ffns = [ffn for ffn in model.ffns() if isinstance(ffn, NeuronMajorFFN)]
    held: list[int] = []

    def turning(rows: QuantTensor) -> tuple[QuantTensor, float]:
        held.append(sum(ffn._turned is not None for ffn in ffns))
        return transpose_weights(rows)

    monkeypatch.setattr("pinfer.neuron_major_ffn.transpose_weights", turning)
    tokens = torch.arange(5, 25)
    with torch.inference_mode():
        fit_gate_threshold_predictors(model, [tokens, tokens + 3])
        assert held == LAYERS * [0]
        again = model(tokens, model.new_cache())
        assert torch.equal(again, model(tokens, model.new_cache()))
    assert len(held) == 2 * LAYERS
    assert torch.equal(again, logits_of_ids(files("llama", Q4_0), tokens))


def logits_of_ids(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Those of a dense model that nothing was fitted on."""
    file = open_model(path)
    model = build_model(file, model_config(file), 32)
    with torch.inference_mode():
        return model(tokens, model.new_cache())


def test_the_dense_ffn_is_the_usual_one(files: Callable[[str, QuantType], Path]) -> None:
    """And its rows are not turned before anybody asks."""
    engine = engine_of(files("llama", F16))
    file = engine.file
    rows, gate, up = (file.tensor(f"blk.0.ffn_{name}.weight") for name in ("down_t", "gate", "up"))
    ffn = NeuronMajorFFN(gate, up, rows, "relu")
    assert ffn._turned is None
    assert ffn.down.shape == (64, NEURONS)
