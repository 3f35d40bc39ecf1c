"""GGUF in several files, as llama.cpp splits it: any part opens the model; parts that do not belong together do not."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch

from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.engine.mapped import fingerprint
from pinfer.formats import open_model
from pinfer.formats.errors import FormatError
from tests import gguf_files


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A tiny model in parts of at most five tensors, by the gguf package."""
    writer = partial(gguf.GGUFWriter, split_max_tensors=5)
    monkeypatch.setattr(gguf_files.gguf, "GGUFWriter", writer)
    gguf_files.write_tiny_llama(tmp_path / "tiny.gguf", n_layers=1)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) == 3
    return parts


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return gguf_files.write_tiny_llama(tmp_path / "whole.gguf", n_layers=1)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_part_opens_the_model(number: int, whole: Path, split: list[Path]) -> None:
    with open_model(split[number]) as file, open_model(whole) as one:
        assert file.path == split[0]
        assert [part.path for part in file.parts] == split
        assert file.tensors.keys() == one.tensors.keys()
        for name in one.tensors:
            assert torch.equal(file.raw(name), one.raw(name)), name
        assert file.get("llama.block_count", int) == 1


def test_it_runs(whole: Path, split: list[Path]) -> None:
    one, two = (load_engine(RunConfig(model=str(path), backend="reference")) for path in (whole, split[2]))
    ids = torch.tensor([1, 5, 9])
    with one.computing(), two.computing():
        expected = one.model(ids, one.model.new_cache())
        assert torch.equal(two.model(ids, two.model.new_cache()), expected)


def test_fingerprint_is_over_all_parts(split: list[Path]) -> None:
    before = fingerprint(open_model(split[0]), timed=False)
    raw = bytearray(split[2].read_bytes())
    raw[-40] ^= 1
    split[2].write_bytes(raw)
    assert fingerprint(open_model(split[0]), timed=False) != before


def test_a_missing_part_is_named(split: list[Path]) -> None:
    split[1].unlink()
    with pytest.raises(FormatError, match=r"part 2 of 3 is missing: tiny-00002-of-00003\.gguf"):
        open_model(split[0])


def test_a_part_of_another_place_is_named(split: list[Path]) -> None:
    shutil.copy(split[2], split[1])
    with pytest.raises(FormatError, match=r"00002-of-00003.gguf: split.no is 2, not 1"):
        open_model(split[0])


def test_parts_of_two_models_are_told_apart(split: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other"
    other.mkdir()
    gguf_files.write_tiny_llama(other / "tiny.gguf", n_layers=1, tied=True)
    shutil.copy(sorted(other.glob("tiny-*.gguf"))[1], split[1])
    with pytest.raises(FormatError, match=r"split.tensors.count is 11, not 12"):
        open_model(split[0])


def test_a_tensor_that_no_part_has_is_counted(split: list[Path]) -> None:
    """All parts agree on thirteen tensors and hold twelve."""
    for part in split:
        raw = part.read_bytes()
        assert raw.count(b"split.tensors.count\x05\x00\x00\x00\x0c\x00\x00\x00") == 1
        part.write_bytes(raw.replace(b"tensors.count\x05\x00\x00\x00\x0c", b"tensors.count\x05\x00\x00\x00\x0d"))
    with pytest.raises(FormatError, match=r"the parts hold 12 tensors, split.tensors.count is 13"):
        open_model(split[0])


def test_a_tensor_in_two_parts_is_named(split: list[Path]) -> None:
    """The first part's tensors under the second's number."""
    raw = split[0].read_bytes()
    assert raw.count(b"split.no\x02\x00\x00\x00\x00\x00") == 1
    split[1].write_bytes(raw.replace(b"split.no\x02\x00\x00\x00\x00\x00", b"split.no\x02\x00\x00\x00\x01\x00"))
    with pytest.raises(FormatError, match=r"00002-of-00003.gguf: tensor 'token_embd.weight' is in part 1 as well"):
        open_model(split[0])


def test_a_name_that_tells_nothing(split: list[Path]) -> None:
    renamed = split[0].rename(split[0].with_name("first.gguf"))
    with pytest.raises(FormatError, match=r"its name must end in -00001-of-00003\.gguf"):
        open_model(renamed)
