"""What is kept beside a model: right, made once, never trusted when it should not be, and never in the way."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as gguf_package
import pytest
import torch

from pinfer.config import RunConfig
from pinfer.engine import Engine, fitting, load_engine, prepared
from pinfer.engine.mapped import fingerprint
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.pages import release_pages
from pinfer.kernels.transpose import transpose_weights
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama
from tests.hf_models import make_folder

DOWN = ".pinfer-down.gguf"


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quick_fits: None) -> None:
    """Small models are kept too, and the user's cache folder is a fresh one."""
    monkeypatch.setattr(prepared, "CACHE_FROM_BYTES", 0)
    monkeypatch.setattr(prepared, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.delenv("PINFER_NO_CACHE", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return write_tiny_llama(tmp_path / "models" / "m.gguf", weight_type="Q4_0")


@pytest.fixture
def transposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry for each layer that is transposed."""
    calls: list[int] = []

    def counting(weight: Any) -> Any:
        calls.append(1)
        return transpose_weights(weight)

    monkeypatch.setattr(prepared, "transpose_weights", counting)
    return calls


def load(model: Path, **run: Any) -> Engine:
    return load_engine(RunConfig(model=str(model), **run))


def logits(engine: Engine) -> torch.Tensor:
    with engine.computing():
        return engine.model(torch.arange(5, 30), engine.model.new_cache())


def in_memory(model: Path, monkeypatch: pytest.MonkeyPatch, **run: Any) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setenv("PINFER_NO_CACHE", "1")
        return logits(load(model, **run))


def beside(model: Path) -> list[str]:
    """Names of all files in the model's folder but the model."""
    return sorted(path.name for path in model.parent.iterdir() if path != model)


def kept_down(model: Path) -> Path:
    return model.with_name(model.name + DOWN)


def remade(engine: Engine) -> list[str]:
    return [note for note in engine.notes if "made again" in note]


# The transposed down.


@pytest.mark.parametrize(("weight_type", "exact"), [("Q4_0", False), ("F16", True), ("F32", True), ("Q8_0", False)])
def test_the_file_holds_each_layers_transpose(tmp_path: Path, weight_type: str, exact: bool) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", weight_type=weight_type)
    engine = load(model)
    with GGUFFile.open(kept_down(model)) as file, GGUFFile.open(model) as source:
        assert file.version == 3
        for layer, ffn in enumerate(engine.model.ffns()):
            expected, error = transpose_weights(source.tensor(f"blk.{layer}.ffn_down.weight"))
            found = file.tensor(f"blk.{layer}.ffn_down_t.weight")
            assert (found.type, found.shape) == (expected.type, expected.shape)
            assert torch.equal(found.blocks, expected.blocks)
            assert torch.equal(ffn.weights.down.blocks, expected.blocks)
            assert ffn.weights.down_error == pytest.approx(error, rel=1e-6)
            assert (error == 0) is exact


def test_what_was_transposed_is_let_go_of(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a model's `down` would stay in memory twice after its first start."""
    released: list[int] = []
    monkeypatch.setattr(prepared, "release_pages", lambda weight: released.append(weight.blocks.data_ptr()))
    engine = load(model)
    assert {engine.file.tensor(f"blk.{layer}.ffn_down.weight").blocks.data_ptr() for layer in range(2)} <= set(released)


def test_other_programs_can_read_the_file(model: Path) -> None:
    load(model)
    reader = gguf_package.GGUFReader(kept_down(model))
    assert [tensor.name for tensor in reader.tensors] == [f"blk.{layer}.ffn_down_t.weight" for layer in range(2)]
    assert reader.get_field("pinfer.fingerprint").contents() == fingerprint(GGUFFile.open(model))


def test_a_width_without_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", weight_type="F16", d_model=48)
    assert torch.equal(logits(load(model)), in_memory(model, monkeypatch))


def test_the_second_start_transposes_nothing(
    model: Path, transposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    first = load_engine(RunConfig(model=str(model)), told.append)
    assert told == ["transposing down, layer 1 of 2", "transposing down, layer 2 of 2"]
    assert len(transposed) == 2
    second = load(model)
    assert len(transposed) == 2
    assert beside(model) == [kept_down(model).name]
    assert not remade(first) + remade(second)
    assert torch.equal(logits(first), logits(second))
    assert torch.equal(logits(second), in_memory(model, monkeypatch))
    assert any("requantised" in note for note in second.notes), "the errors are kept too"


def test_gate_and_up_are_transposed_at_each_start(
    model: Path, transposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = {"method": "input_threshold", "sparsity": 0.4}
    first = logits(load(model, **run))
    assert len(transposed) == 3 * 2
    engine = load(model, **run)
    assert len(transposed) == 3 * 2 + 2 * 2, "down comes from its file"
    assert beside(model) == [model.name + DOWN]
    assert torch.equal(first, logits(engine))
    assert torch.equal(first, in_memory(model, monkeypatch, **run))
    for layer, ffn in enumerate(engine.model.ffns()):
        sources = [engine.file.tensor(f"blk.{layer}.ffn_{name}.weight") for name in ("gate", "up", "down")]
        expected = [transpose_weights(source) for source in sources]
        found = (ffn.weights.gate, ffn.weights.up, ffn.weights.down)
        assert all(torch.equal(one.blocks, turned.blocks) for one, (turned, _) in zip(found, expected, strict=True))
        assert ffn.weights.input_error == pytest.approx(max(error for _, error in expected[:2]))
        assert ffn.weights.down_error == pytest.approx(expected[2][1])
    assert sum("requantised" in note for note in engine.notes) == 2


def test_small_models_and_whoever_says_so_get_no_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "CACHE_FROM_BYTES", 64e6)
        told: list[str] = []
        load_engine(RunConfig(model=str(model)), told.append)
        assert told == []
    in_memory(model, monkeypatch)
    load(model, method="dense")
    assert beside(model) == []
    assert not prepared.cache_folder().exists()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "header alone": lambda path: path.write_bytes(path.read_bytes()[:600]),
    "one bit of a weight": lambda path: flip(path, -1000),
    "one bit of the fingerprint": lambda path: flip(path, path.read_bytes().index(b"pinfer.fingerprint") + 40),
    "one bit of the magic": lambda path: flip(path, 0),
    "one bit of a tensor's shape": lambda path: flip(path, path.read_bytes().index(b"ffn_down_t.weight") + 21),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "text": lambda path: path.write_text("not a cache at all"),
    "a folder": lambda path: (path.unlink(), path.mkdir(), path.rmdir(), path.write_bytes(bytes(64))),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_made_again(
    model: Path, damage: Callable[[Path], Any], transposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model)
    sound = kept_down(model).read_bytes()
    damage(kept_down(model))
    engine = load(model)
    assert len(remade(engine)) == 1
    assert kept_down(model).name in remade(engine)[0]
    assert len(transposed) == 4
    assert torch.equal(logits(engine), in_memory(model, monkeypatch))
    assert len(kept_down(model).read_bytes()) == len(sound)
    assert not remade(load(model))


def test_another_models_file_is_made_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model)
    write_tiny_llama(model, weight_type="Q4_0", seed=1)  # stale: the model changed under the same name
    engine = load(model)
    assert "another model" in remade(engine)[0]
    assert torch.equal(logits(engine), in_memory(model, monkeypatch))
    other = write_tiny_llama(model.with_name("other.gguf"), n_layers=3)
    shutil.copy(kept_down(model), kept_down(other))
    assert "another model" in remade(load(other))[0]


def test_a_file_of_another_version_is_made_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(model)
    monkeypatch.setattr(prepared, "FORMAT", 2)
    assert "format version is 1, expected 2" in remade(load(model))[0]
    assert not remade(load(model))


def test_a_sound_copy_is_taken_and_read_whole_once(
    model: Path, transposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model)
    os.utime(kept_down(model))
    sums: list[int] = []
    crc32 = prepared.zlib.crc32
    monkeypatch.setattr(prepared, "zlib", SimpleNamespace(crc32=lambda data: sums.append(1) or crc32(data)))
    for _ in range(2):
        assert not remade(load(model))
    assert len(sums) == 2
    assert len(transposed) == 2


# Where it cannot be written.


@pytest.fixture
def locked(model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model's folder cannot be written to (permissions alone do not stop a test that runs as root)."""
    create = prepared.tempfile.NamedTemporaryFile

    def refuse(*, dir: Path, **rest: Any) -> Any:
        if Path(dir) == model.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(dir))
        return create(dir=dir, **rest)

    monkeypatch.setattr(prepared.tempfile, "NamedTemporaryFile", refuse)
    return model


def test_a_locked_folder_sends_it_to_the_cache_folder(locked: Path, transposed: list[int]) -> None:
    first, second = load(locked), load(locked)
    assert len(transposed) == 2
    assert beside(locked) == []
    assert [path.name for path in prepared.cache_folder().iterdir()] == [fingerprint(GGUFFile.open(locked)) + DOWN]
    assert torch.equal(logits(first), logits(second))
    assert not remade(second)


def test_a_bad_file_in_a_locked_folder_is_passed_over(locked: Path, transposed: list[int]) -> None:
    kept_down(locked).write_text("not mine")
    assert len(remade(load(locked))) == 1
    assert not remade(load(locked)), "the one in the cache folder is good"
    assert len(transposed) == 2
    assert kept_down(locked).read_text() == "not mine"


def test_without_any_folder_it_stays_in_memory(locked: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepared, "cache_folder", lambda: tmp_path / "file" / "cache")
    engine = load(locked)
    assert any("stays in memory" in note and str(tmp_path / "file") in note for note in engine.notes)
    assert torch.equal(logits(engine), in_memory(locked, monkeypatch))


def test_a_full_disk_leaves_nothing_and_stops_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(prepared.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        engine = load(model)
    assert any("stays in memory" in note and "no room" in note for note in engine.notes)
    assert beside(model) == []
    assert torch.equal(logits(engine), in_memory(model, monkeypatch))


@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit that Linux enforces with an error")
def test_a_disk_that_fills_up_midway_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))  # one layer takes 6,528 bytes
    try:
        engine = load(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert any("stays in memory" in note for note in engine.notes)
    assert beside(model) == []
    assert torch.equal(logits(engine), in_memory(model, monkeypatch))


def test_an_interruption_leaves_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned: list[int] = []

    def interrupted(weight: Any) -> Any:
        turned.append(1)
        if len(turned) == 2:
            raise KeyboardInterrupt
        return transpose_weights(weight)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared, "transpose_weights", interrupted)
        load(model)
    assert beside(model) == []


def test_what_a_killed_process_left_goes(model: Path) -> None:
    """Under its temporary name it counts for nothing, and goes once it is surely nobody's."""
    old, young = (model.with_name(f".{kept_down(model).name}.{name}.tmp") for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"GGUF")
    os.utime(old, (time.time() - 7200,) * 2)
    assert not remade(load(model))
    assert beside(model) == sorted([young.name, kept_down(model).name])


SCRIPT = """
import sys, torch
from pinfer.config import RunConfig
from pinfer.engine import load_engine, prepared
prepared.CACHE_FROM_BYTES = 0
engine = load_engine(RunConfig(model=sys.argv[1], threads=1, backend="reference"))
with engine.computing():
    print(float(engine.model(torch.arange(5, 30), engine.model.new_cache()).double().sum()), engine.notes)
"""


def test_two_processes_at_once_both_end_right(model: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(model)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert outputs[0] == outputs[1]
    assert beside(model) == [kept_down(model).name]
    assert not remade(load(model))


# Pages and fingerprints.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_pages_that_are_used_count(tmp_path: Path) -> None:
    model = write_tiny_llama(tmp_path / "m.gguf", d_model=512, d_ffn=2048, n_layers=1, weight_type="F16")
    engine = load(model)

    def resident(path: Path) -> int:
        """Bytes of a mapped file that are in this process's memory."""
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            if "-" in line.split()[0]:
                inside = line.endswith(str(path))
            elif inside and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
        return total

    down_bytes = 2 * 512 * 2048
    assert resident(kept_down(model)) < 0.2 * down_bytes
    logits(engine)
    with GGUFFile.open(model) as file:
        down = file.tensor("blk.0.ffn_down.weight")
        before = down.blocks.clone()
        assert resident(model) > down_bytes
        release_pages(down)
        after = resident(model)
        assert torch.equal(down.blocks, before), "they are read again from the file"
        assert resident(model) - after > 0.9 * down_bytes


def test_the_fingerprint_changes_with_header_weights_and_time(tmp_path: Path) -> None:
    def of(changed_ns: int = 10**18, **options: Any) -> str:
        path = write_tiny_llama(tmp_path / "m.gguf", **options)
        os.utime(path, ns=(0, changed_ns))
        with GGUFFile.open(path) as file:
            return fingerprint(file)

    assert of() == of()
    assert of() != of(10**18 + 1), "what lies between the samples may have been edited in place"
    assert len({of(), of(seed=1), of(activation="silu"), of(weight_type="F16"), of(d_ffn=128)}) == 5


# Fitted predictors.

LOW_RANK = {"method": "low_rank", "predictor_rank": 32, "recall": 0.9}


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows by one entry for each fit of a whole model."""
    from pinfer.engine import load as module

    calls: list[int] = []
    fit = module.fit_predictors
    monkeypatch.setattr(module, "fit_predictors", lambda *given: calls.append(1) or fit(*given))
    return calls


def predictors_file(model: Path) -> Path:
    (path,) = model.parent.glob("*.safetensors")
    return path


def test_predictors_are_fitted_once(model: Path, fitted: list[int]) -> None:
    first, second = load(model, **LOW_RANK), load(model, **LOW_RANK)
    assert len(fitted) == 1
    assert predictors_file(model).name.startswith("m.gguf.pinfer-low-rank-")
    assert torch.equal(logits(first), logits(second))
    assert first.notes == second.notes
    for one, two in zip(first.model.ffns(), second.model.ffns(), strict=True):
        assert one.predictor.quality == two.predictor.quality


@pytest.mark.parametrize(
    "other", [{"recall": 0.8}, {"predictor_rank": 64}, {"sparsity": 0.9}, {"activation": "silu", "sparsity": 0.5}]
)
def test_other_settings_have_their_own_file(model: Path, fitted: list[int], other: dict[str, Any]) -> None:
    for _ in range(2):
        load(model, **LOW_RANK)
        load(model, **{**LOW_RANK, **other})
    assert len(fitted) == 2
    assert len(list(model.parent.glob("*.safetensors"))) == 2


def test_a_context_that_turns_positions_otherwise_has_its_own_file(tmp_path: Path, fitted: list[int]) -> None:
    """Phi-3's long factors, from the context on that the short ones were made for: 32."""
    model = make_folder("phi3-longrope", tmp_path / "phi")
    for context in (16, 32, 33, 64):
        load(model, method="gate_threshold", sparsity=0.5, context=context)
    assert len(fitted) == 2
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_predictors_fitted_by_another_rule_are_fitted_again(
    model: Path, fitted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(model, **LOW_RANK)
    monkeypatch.setattr(fitting, "FIT_VERSION", fitting.FIT_VERSION + 1)
    for _ in range(2):
        load(model, **LOW_RANK)
    assert len(fitted) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -50),
        lambda path: flip(path, path.read_bytes().index(b"by_magnitude") + 3),
        lambda path: flip(path, path.read_bytes().index(b"sha256") + 20),
        lambda path: path.write_bytes(path.read_bytes()[:-10]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\xff" * 500),
    ],
    ids=["weights", "metadata", "checksum", "cut short", "empty", "noise"],
)
def test_damaged_predictors_are_fitted_again(model: Path, fitted: list[int], damage: Callable[[Path], Any]) -> None:
    sound = logits(load(model, **LOW_RANK))
    damage(predictors_file(model))
    engine = load(model, **LOW_RANK)
    assert "safetensors" in remade(engine)[0]
    assert torch.equal(logits(engine), sound)
    assert len(fitted) == 2
    assert not remade(load(model, **LOW_RANK))


def test_predictors_of_another_model_are_fitted_again(model: Path, fitted: list[int]) -> None:
    load(model, **LOW_RANK)
    write_tiny_llama(model, weight_type="Q4_0", seed=1)
    assert any("safetensors" in note and "another model" in note for note in remade(load(model, **LOW_RANK)))
    assert len(fitted) == 2


def test_predictors_that_cannot_be_kept_are_used(locked: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    load(locked, **LOW_RANK)
    assert any(path.name.endswith(".safetensors") for path in prepared.cache_folder().iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(prepared, "cache_folder", lambda: tmp_path / "file" / "cache")
    engine = load(locked, **LOW_RANK)
    assert any("predictors are not kept" in note for note in engine.notes)


def test_hybrids_and_other_families_are_kept_too(tmp_path: Path, fitted: list[int]) -> None:
    model = write_tiny_gemma3(tmp_path / "g.gguf", d_ffn=256, n_layers=3)
    run = {**LOW_RANK, "sparsity": 0.5, "precision": "float32"}
    whole = logits(load(model, **run))
    torch.testing.assert_close(logits(load(model, cold_fraction=0.3, **run)), whole, rtol=1e-3, atol=1e-3)
    assert len(fitted) == 1
