"""The solved directory: what is written is read, and nothing that is damaged, foreign or newer ever is."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.cli.main import BAD_INPUT, run
from pinfer.engine.manifest import FORMAT, MANIFEST, ModelMark
from pinfer.engine.solved import Solved
from pinfer.formats.gguf import GGUFFile
from tests.gguf_files import write_tiny_llama

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([3], dtype=torch.int64)}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> GGUFFile:
    return GGUFFile.open(write_tiny_llama(tmp_path_factory.mktemp("model") / "m.gguf"))


@pytest.fixture
def path(tmp_path: Path, gguf: GGUFFile) -> Path:
    """A directory with two stages, the second made from the first."""
    solved = Solved.open_or_create(tmp_path / "deep" / "m.pinfer", gguf)
    solved.write("a.safetensors", TENSORS, stage="profile", settings={"tokens": 5}, figures={"density": 0.25})
    solved.write("plan.json", b"[1, 2]", stage="plan", settings={}, figures={}, made_from=("a.safetensors",))
    return solved.path


def sealed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest's content and give it the digest of that: damage that only its meaning shows."""
    values = json.loads((path / MANIFEST).read_text())
    values.pop("sha256")
    change(values)
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (path / MANIFEST).write_text(json.dumps(values))


def test_what_is_written_is_read(path: Path, gguf: GGUFFile) -> None:
    solved = Solved.open(path, gguf)
    found = solved.read_tensors("a.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert solved.read_json("plan.json") == [1, 2]
    assert solved.model == ModelMark.of(gguf)
    assert solved.model.file == "m.gguf"
    assert list(solved.stages) == ["profile", "plan"]
    profile = solved.stages["profile"]
    assert (profile.settings, profile.figures, profile.files) == ({"tokens": 5}, {"density": 0.25}, ("a.safetensors",))
    assert sorted(entry.name for entry in path.iterdir()) == ["a.safetensors", MANIFEST, "plan.json"]
    with pytest.raises(ValueError, match=r"it has no predictor.safetensors; stages done: profile, plan"):
        solved.read("predictor.safetensors")


def test_a_model_may_be_copied(path: Path, gguf: GGUFFile, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(gguf.path, copy)
    os.utime(copy, (1, 1))
    assert Solved.open(path, GGUFFile.open(copy)).has("plan.json")


def test_files_that_it_does_not_name_are_no_part_of_it(path: Path, gguf: GGUFFile) -> None:
    (path / "report.html").write_text("anything")
    assert not Solved.open(path, gguf).has("report.html")


def test_missing_and_not_a_directory(tmp_path: Path, gguf: GGUFFile) -> None:
    with pytest.raises(ValueError, match=r"gone: there is no such directory"):
        Solved.open(tmp_path / "gone", gguf)
    (tmp_path / "file").touch()
    for opened in (Solved.open, Solved.open_or_create):
        with pytest.raises(ValueError, match=r"file: not a directory"):
            opened(tmp_path / "file", gguf)
    with pytest.raises(NotADirectoryError):
        Solved.open_or_create(tmp_path / "file" / "below", gguf)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"pinfer.json: missing"):
        Solved.open(tmp_path / "empty", gguf)


def test_a_directory_of_other_things_is_left_alone(tmp_path: Path, gguf: GGUFFile) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").touch()
    with pytest.raises(ValueError, match=r"no pinfer.json but other files \(cat.png\)"):
        Solved.open_or_create(tmp_path / "photos", gguf)
    assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["cat.png"]


@pytest.mark.parametrize("name", ["a.safetensors", "plan.json"])
def test_every_flipped_byte_of_a_file_is_seen(path: Path, gguf: GGUFFile, name: str) -> None:
    content = (path / name).read_bytes()
    for at in range(len(content)):
        (path / name).write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(ValueError, match=f"{name}: damaged: its SHA-256"):
            Solved.open(path, gguf)
    (path / name).write_bytes(content)
    Solved.open(path, gguf)


def test_every_flipped_byte_of_the_manifest_is_seen_or_means_nothing(path: Path, gguf: GGUFFile) -> None:
    manifest = path / MANIFEST
    content, meaning = manifest.read_bytes(), json.loads(manifest.read_bytes())
    refused = 0
    for at in range(len(content)):
        damaged = content[:at] + bytes([content[at] ^ 0x01]) + content[at + 1 :]
        manifest.write_bytes(damaged)
        try:
            Solved.open(path, gguf)
        except ValueError as problem:
            assert MANIFEST in str(problem)
            refused += 1
        else:
            assert json.loads(damaged) == meaning
    assert refused > 0.6 * len(content)


@pytest.mark.parametrize("name", ["a.safetensors", "plan.json", MANIFEST])
def test_every_truncation_is_seen(path: Path, gguf: GGUFFile, name: str) -> None:
    content = (path / name).read_bytes()
    for length in range(len(content) - (name == MANIFEST)):  # the manifest's last byte is a newline
        (path / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=f"{name}: (truncated|damaged)"):
            Solved.open(path, gguf)


def test_a_file_that_is_longer_or_gone(path: Path, gguf: GGUFFile) -> None:
    with (path / "plan.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"plan.json: longer than it was: 7 bytes, pinfer.json says 6"):
        Solved.open(path, gguf)
    (path / "plan.json").unlink()
    with pytest.raises(ValueError, match=r"plan.json: missing, though pinfer.json names it"):
        Solved.open(path, gguf)


def test_damage_after_opening_is_seen_on_reading(path: Path, gguf: GGUFFile) -> None:
    solved = Solved.open(path, gguf)
    (path / "plan.json").write_bytes(b"[1, 3]")
    with pytest.raises(ValueError, match=r"plan.json: damaged"):
        solved.read("plan.json")


def test_another_model_is_refused_by_name(path: Path, tmp_path: Path) -> None:
    other = GGUFFile.open(write_tiny_llama(tmp_path / "other.gguf", seed=1))
    for opened in (Solved.open, Solved.open_or_create):
        with pytest.raises(ValueError, match=r"pinfer.json: made for another model, m.gguf .* not for other.gguf"):
            opened(path, other)
    assert Solved.open(path).model.file == "m.gguf"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(format=FORMAT + 1), "format version 2, made by a newer pinfer"),
        (lambda values: values.update(format=0), "format version 0 does not exist"),
        (lambda values: values.update(format="1"), "damaged: format is '1'"),
        (lambda values: values.pop("format"), "'format' is missing"),
        (lambda values: values.pop("files"), "not the content of a pinfer.json"),
        (lambda values: values.update(stages=[]), "not the content of a pinfer.json"),
        (lambda values: values["files"]["plan.json"].update(bytes="6"), "not the content of a pinfer.json"),
        (lambda values: values["files"]["plan.json"].update(colour="red"), "not the content of a pinfer.json"),
        (lambda values: values["model"].update(fingerprint=7), "not the content of a pinfer.json"),
        (lambda values: values["files"].update({"../up": values["files"]["plan.json"]}), "is no name for a file"),
        (lambda values: values["files"].update({"/etc/passwd": values["files"]["plan.json"]}), "is no name for a file"),
    ],
)
def test_a_manifest_of_another_meaning(path: Path, gguf: GGUFFile, change: Callable[..., None], message: str) -> None:
    sealed(path, change)
    with pytest.raises(ValueError, match=message):
        Solved.open(path, gguf)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"", b"[" * 100_000, b'{"format": 1e999}'])
def test_a_manifest_that_is_none(path: Path, gguf: GGUFFile, content: bytes) -> None:
    (path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"pinfer.json: damaged"):
        Solved.open(path, gguf)


def test_an_endless_manifest(path: Path, gguf: GGUFFile) -> None:
    os.truncate(path / MANIFEST, 1 << 40)
    with pytest.raises(ValueError, match=r"pinfer.json: more than 16777216 bytes"):
        Solved.open(path, gguf)


def test_writing_anew_drops_what_was_made_from_it(path: Path, gguf: GGUFFile) -> None:
    solved = Solved.open(path, gguf)
    again = {"stage": "profile", "settings": {"tokens": 5}, "figures": {"density": 0.25}}
    solved.write("a.safetensors", TENSORS, **again)
    assert list(Solved.open(path, gguf).stages) == ["profile", "plan"]  # the same once more changes nothing
    solved.write("a.safetensors", {"a": torch.ones(1)}, **again)
    reopened = Solved.open(path, gguf)
    assert list(reopened.stages) == ["profile"]
    assert not reopened.has("plan.json")
    assert not (path / "plan.json").exists()


def test_a_stage_of_several_files(path: Path, gguf: GGUFFile) -> None:
    solved = Solved.open(path, gguf)
    for name in ("one.json", "two.json"):
        solved.write(name, b"1", stage="train", settings={"rank": 1}, figures={name: 1})
    assert Solved.open(path, gguf).stages["train"].files == ("one.json", "two.json")
    assert Solved.open(path, gguf).stages["train"].figures == {"one.json": 1, "two.json": 1}
    solved.write("two.json", b"2", stage="train", settings={"rank": 2}, figures={})
    assert Solved.open(path, gguf).stages["train"].files == ("two.json",)
    assert not (path / "one.json").exists()


def test_a_writer_that_dies_leaves_a_sound_directory(
    path: Path, gguf: GGUFFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rename is the last one: the directory opens, and holds the old file, none, or the new one."""
    replace, found = os.replace, []
    for last in range(4):
        shutil.rmtree(path)
        solved = Solved.open_or_create(path, gguf)
        solved.write("x.json", b'"old"', stage="s", settings={}, figures={})
        renames = 0

        def dying(source: str, target: Path, last: int = last) -> None:
            nonlocal renames
            renames += 1
            if renames > last:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            with contextlib.suppress(KeyboardInterrupt):
                solved.write("x.json", b'"new!"', stage="s", settings={}, figures={})
        left = Solved.open(path, gguf)
        found.append(left.read_json("x.json") if left.has("x.json") else None)
        assert not list(path.glob(".*.tmp"))
    assert found == ["old", None, None, "new!"]


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", ".hidden", MANIFEST, "a\0b"])
def test_names_that_are_none(path: Path, gguf: GGUFFile, name: str) -> None:
    with pytest.raises(ValueError, match="is no name for a file"):
        Solved.open(path, gguf).write(name, b"", stage="s", settings={}, figures={})


@pytest.mark.parametrize("settings", [{"a": float("nan")}, {"a": TENSORS}])
def test_settings_that_json_cannot_hold(path: Path, gguf: GGUFFile, settings: dict[str, Any]) -> None:
    before = (path / MANIFEST).read_bytes()
    with pytest.raises(ValueError):
        Solved.open(path, gguf).write("x.json", b"1", stage="s", settings=settings, figures={})
    assert (path / MANIFEST).read_bytes() == before


def test_content_that_is_not_what_it_is_read_as(path: Path, gguf: GGUFFile) -> None:
    solved = Solved.open(path, gguf)
    with pytest.raises(ValueError, match=r"plan.json: not safetensors"):
        solved.read_tensors("plan.json")
    with pytest.raises(ValueError, match=r"a.safetensors: not JSON"):
        solved.read_json("a.safetensors")


def test_one_writer_at_a_time(path: Path, gguf: GGUFFile) -> None:
    (path / ".plan.json.abc.tmp").touch()
    with Solved.open(path, gguf).lock():
        assert not (path / ".plan.json.abc.tmp").exists()
        with pytest.raises(ValueError, match="another pinfer is writing"), Solved.open(path, gguf).lock():
            pass
    with Solved.open(path, gguf).lock():
        pass


def test_what_another_wrote_meanwhile_is_not_lost(path: Path, gguf: GGUFFile) -> None:
    first, second = Solved.open(path, gguf), Solved.open(path, gguf)
    with first.lock():
        first.write("a.json", b"{}", stage="one", settings={}, figures={})
    with second.lock():
        assert second.has("a.json")
        second.write("b.json", b"{}", stage="two", settings={}, figures={})
    merged = Solved.open(path, gguf)
    assert merged.read("a.json") == merged.read("b.json") == b"{}"
    assert set(merged.stages) >= {"one", "two"}


def test_the_command_line_refuses_with_one_line(path: Path, gguf: GGUFFile, capsys: pytest.CaptureFixture[str]) -> None:
    (path / "a.safetensors").write_bytes(b"short")
    assert run(["profile", "-m", str(gguf.path), "-o", str(path)]) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert "a.safetensors: truncated: 5 bytes" in err.splitlines()[-1]
