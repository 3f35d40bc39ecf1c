"""Writing GGUF: what was written is read back by our reader and by the `gguf` package, or nothing is left."""

from __future__ import annotations

import errno
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

import pinfer.files
from pinfer.formats import open_model
from pinfer.formats.gguf_writer import Outgoing, fuse, metadata_of, stored, write_gguf
from pinfer.quant import F16, F32, Q8_0
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama


def tensor(name: str, *shape: int) -> Outgoing:
    values = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
    return Outgoing(name, shape, F32, lambda: [values.view(torch.uint8)])


def copy(source: Path, path: Path) -> Path:
    with open_model(source) as file:
        write_gguf(path, metadata_of(file), [stored(file, name) for name in file.tensors])
    return path


@pytest.mark.parametrize("weight_type", ["F32", "F16", "BF16", "Q8_0"])
def test_a_model_is_read_back_as_it_was(tmp_path: Path, weight_type: str) -> None:
    source = write_tiny_llama(tmp_path / "a.gguf", weight_type=weight_type)
    one, two = open_model(source), open_model(copy(source, tmp_path / "b.gguf"))
    assert two.metadata == one.metadata
    assert list(two.tensors) == list(one.tensors)
    for name in one.tensors:
        assert torch.equal(one.raw(name), two.raw(name)), name


def test_value_types_are_those_of_the_file_that_was_read(tmp_path: Path, shipped_model: Path) -> None:
    for source in (write_tiny_gemma3(tmp_path / "a.gguf"), shipped_model):
        before = gguf.GGUFReader(source).fields
        after = gguf.GGUFReader(copy(source, tmp_path / "b.gguf")).fields
        assert {k: f.types for k, f in after.items()} == {k: f.types for k, f in before.items()}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "BOOL"),
        (7, "UINT32"),
        (-7, "INT32"),
        (2**32, "UINT64"),
        (-(2**40), "INT64"),
        (0.5, "FLOAT32"),
        (1e300, "FLOAT64"),
        ("x", "STRING"),
        ([1, -2], "INT32"),
        ([2**31], "UINT32"),
        ([True], "BOOL"),
        ([0.5, 1], "FLOAT32"),
        (["a"], "STRING"),
    ],
)
def test_value_types_follow_from_values(tmp_path: Path, value: Any, kind: str) -> None:
    write_gguf(tmp_path / "a.gguf", {"general.architecture": "x", "x.key": value}, [tensor("a", 3)])
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["x.key"].types[-1].name == kind
    assert open_model(tmp_path / "a.gguf").metadata["x.key"] == value


def test_keys_of_floats_are_floats_whatever_they_hold(tmp_path: Path) -> None:
    keys = {"llama.rope.freq_base": 10000, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.block_count": 1}
    keys |= {"tokenizer.ggml.scores": [0, -1], "split.no": 1}
    write_gguf(tmp_path / "a.gguf", keys, [])
    types = {key: field.types[-1].name for key, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert [types[key] for key in keys] == ["FLOAT32", "FLOAT32", "UINT32", "FLOAT32", "UINT16"]


@pytest.mark.parametrize("value", [None, {"a": 1}, [1, "a"], 2**64, [1, None]])
def test_values_that_gguf_has_not_are_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata key 'x\.key'"):
        write_gguf(tmp_path / "a.gguf", {"x.key": value}, [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad",
    [tensor("a" * 64, 3), tensor("", 3), tensor("a", 1, 1, 1, 1, 1), Outgoing("a", (2, 33), Q8_0, list)],
    ids=["long name", "no name", "five dimensions", "part of a block"],
)
def test_tensors_that_gguf_has_not_are_refused(tmp_path: Path, bad: Outgoing) -> None:
    with pytest.raises(ValueError, match="tensor"):
        write_gguf(tmp_path / "a.gguf", {}, [bad])
    assert not list(tmp_path.iterdir())


def test_pieces_of_another_length_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"before")
    short = Outgoing("a", (4,), F32, lambda: [torch.zeros(12, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="12 bytes where 16 are announced"):
        write_gguf(path, {}, [short])
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"]
    assert path.read_bytes() == b"before"


def test_a_disk_without_room_is_known_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pinfer.files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    asked: list[int] = []
    big = Outgoing("a", (400,), F32, lambda: asked.append(1) or [])
    with pytest.raises(OSError, match="no room") as caught:
        write_gguf(tmp_path / "a.gguf", {}, [big])
    assert caught.value.errno == errno.ENOSPC
    assert not asked
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path) -> None:
    def full() -> list[torch.Tensor]:
        raise OSError(errno.ENOSPC, "No space left on device", "temporary")

    with pytest.raises(OSError, match=r"never\.gguf"):
        write_gguf(tmp_path / "never.gguf", {}, [Outgoing("a", (4,), F32, full)])
    assert not list(tmp_path.iterdir())


def test_fused_tensors_are_one_behind_the_other(tmp_path: Path) -> None:
    names = {"qkv": ["q", "k", "v"], "none": ["x", "y"]}
    parts = [tensor("q", 4, 8), tensor("norm", 8), tensor("k", 2, 8), tensor("v", 2, 8)]
    write_gguf(tmp_path / "a.gguf", {}, fuse(parts, names))
    file = open_model(tmp_path / "a.gguf")
    assert {name: info.shape for name, info in file.tensors.items()} == {"qkv": (8, 8), "norm": (8,)}
    expected = torch.cat([part for one in (0, 2, 3) for part in parts[one].pieces()])
    assert torch.equal(file.raw("qkv"), expected)


def test_fused_tensors_that_lack_a_part_or_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="qk is made of q, k, of which only q are there"):
        fuse([tensor("q", 4, 8)], {"qk": ["q", "k"]})
    half = Outgoing("k", (2, 8), F16, list)
    with pytest.raises(ValueError, match="types or columns differ"):
        fuse([tensor("q", 4, 8), half], {"qk": ["q", "k"]})


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    told: list[int] = []
    total = write_gguf(tmp_path / "a.gguf", {}, [tensor("a", 5), tensor("b", 2, 2)], progress=told.append)
    assert sum(told) == 36
    assert (tmp_path / "a.gguf").stat().st_size == total
    assert struct.unpack_from("<I", (tmp_path / "a.gguf").read_bytes(), 4) == (3,)
