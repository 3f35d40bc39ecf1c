"""Compiling and finding the C++ core: first use, edits, two processes at once, wheels, and what its code needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pinfer.kernels.cpp import cache_folder, compile
from pinfer.kernels.cpp.compile import CompileError, cached_library, find_compiler, levels_of, levels_to_build

ROOT = Path(__file__).parent.parent
AVX512 = "avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_vnni"


@pytest.fixture
def compiler() -> list[str]:
    try:
        return find_compiler()
    except CompileError as problem:
        pytest.skip(str(problem))


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A core that compiles at once."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "part.h").write_text("#define ANSWER 1\n")
    (folder / "core.cpp").write_text('#include "part.h"\nextern "C" int answer() { return ANSWER; }\n')
    (folder / "kernels.cpp").write_text("namespace PINFER_NAMESPACE { int level = PINFER_LEVEL; }\n")
    return folder


def test_an_edit_of_any_source_or_header_makes_another_library(
    compiler: list[str], sources: Path, tmp_path: Path
) -> None:
    first = cached_library(tmp_path, ("portable",), sources)
    made = first.stat().st_mtime_ns
    assert cached_library(tmp_path, ("portable",), sources) == first
    assert first.stat().st_mtime_ns == made
    for name in ("part.h", "core.cpp", "kernels.cpp"):
        (sources / name).write_text((sources / name).read_text() + "// edited\n")
        edited = cached_library(tmp_path, ("portable",), sources)
        assert edited != first
        assert edited.exists()
        first = edited
    (sources / "new.h").write_text("\n")
    assert cached_library(tmp_path, ("portable",), sources) != first


def test_the_library_is_named_by_its_sets(compiler: list[str], sources: Path, tmp_path: Path) -> None:
    libraries = {cached_library(tmp_path, levels, sources) for levels in (("portable",), tuple(compile.LEVELS))}
    assert len(libraries) == min(2, len(compile.LEVELS))


def test_two_processes_that_build_at_once_both_end_right(compiler: list[str], sources: Path, tmp_path: Path) -> None:
    script = (
        "import ctypes, pathlib, sys; from pinfer.kernels.cpp.compile import cached_library; "
        "library = cached_library(pathlib.Path(sys.argv[1]), ('portable',), pathlib.Path(sys.argv[2])); "
        "assert ctypes.CDLL(str(library)).answer() == 1; print(library)"
    )
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", script, str(cache), str(sources)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    outcomes = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], outcomes
    assert [path.name for path in cache.iterdir()] == [Path(outcomes[0][0].strip()).name]


def test_what_the_compiler_says_is_told(compiler: list[str], sources: Path, tmp_path: Path) -> None:
    (sources / "core.cpp").write_text("nonsense;\n")
    with pytest.raises(CompileError, match=r"cannot compile the C\+\+ core: .*core.cpp.*nonsense"):
        cached_library(tmp_path / "cache", ("portable",), sources)
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(CompileError, match=r"no C\+\+ compiler found at .*, which CXX names"):
        find_compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"no C\+\+ compiler found \(g\+\+ or clang\+\+"):
        find_compiler()


@pytest.mark.skipif(len(compile.LEVELS) == 1, reason="one instruction set on this kind of processor")
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2", ("portable",)),
        ("fpu avx2 fma", ("portable",)),
        ("fpu avx2 fma f16c", ("avx2",)),
        ("fpu avx2 fma f16c avx512f avx512bw", ("avx2",)),
        (AVX512, ("avx512",)),
    ],
)
def test_a_first_use_compiles_the_widest_set_alone(flags: str, expected: tuple[str, ...]) -> None:
    assert levels_of(f"processor : 0\nflags\t\t: {flags}\nbugs : avx2\n") == expected


def test_all_sets_are_compiled_where_the_processor_does_not_tell_or_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert levels_of("") == tuple(compile.LEVELS)
    monkeypatch.setenv("PINFER_ALL_SETS", "1")
    assert levels_to_build() == tuple(compile.LEVELS)


# What marks code that only AVX processors run: VEX and EVEX mnemonics, wide and mask registers.
WIDE = re.compile(r"\tv[a-z0-9]+ |%[yz]mm|%k[0-7]")
WIDER = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing")
@pytest.mark.skipif("avx512" not in compile.LEVELS, reason="not an x86 processor")
def test_code_that_all_sets_share_runs_on_any_processor(compiler: list[str]) -> None:
    """Inline functions of several objects are one in the library: it must not be the one compiled for AVX."""
    library = cached_library(cache_folder(), tuple(compile.LEVELS))  # test_instruction_sets needs the same
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, set[str]] = {"shared": set(), "portable": set(), "avx2": set(), "avx512": set()}
    wrong, meant = [], 0
    function, owner = "", "shared"
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split(" ", 1)[1]
            owner = next((name for name in compile.LEVELS if f"pinfer::{name}::" in function), "shared")
            found[owner].add(function)
        elif (WIDER if owner.startswith("avx") else WIDE).search(line):
            if owner == "avx512":
                meant += 1
            else:
                wrong.append((function, line.strip()))
    assert not wrong, wrong[:5]
    assert meant > 1000
    assert all(found.values())
    assert any("Team::barrier" in name for name in found["shared"])


def test_the_fuzzer_of_make_sanitize_knows_the_interface(compiler: list[str]) -> None:
    """It is compiled and run by `make sanitize` alone: here, only whether it still fits abi.h."""
    fuzzer = ROOT / "tests/fuzz/fuzz_core.cpp"
    compile.call(compiler, ("-std=c++17", "-fsyntax-only", "-Wno-psabi", "-I", str(compile.FOLDER), str(fuzzer)))


# ---- wheels ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, so that nothing is left in this one."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("pyproject.toml asks for setuptools 77")
    folder = tmp_path_factory.mktemp("tree")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "pinfer", folder / "pinfer", ignore=shutil.ignore_patterns("__pycache__", "*.gguf"))
    return folder


def build(tree: Path, hook: str, **environment: str) -> Path:
    """What the hook that pip calls leaves, a wheel."""
    script = f"from setuptools import build_meta; print(build_meta.{hook}('dist'))"
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    return tree / "dist" / result.stdout.splitlines()[-1]


def libraries(wheel: Path) -> list[str]:
    return [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


@pytest.fixture(scope="module")
def installed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, unpacked; compiled without optimisation, which takes a fraction of the time."""
    try:
        real = find_compiler()
    except CompileError as problem:
        pytest.skip(str(problem))
    folder = tmp_path_factory.mktemp("installed")
    fast = folder / "fast-compiler"
    fast.write_text(f'#!/bin/sh\nexec {" ".join(real)} "$@" -O0\n')
    fast.chmod(0o755)
    wheel = build(tree, "build_wheel", CXX=str(fast))
    assert re.fullmatch(r"pinfer-[\d.]+-py3-none-(?!any).+\.whl", wheel.name)
    assert len(libraries(wheel)) == 1
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run_installed(site: Path, script: str, tmp_path: Path) -> str:
    """The script's output with the unpacked package, no compiler and an empty cache."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "CXX": "/no/compiler",
        "PINFER_CACHE": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_a_wheel_carries_every_set_and_needs_no_compiler(installed: Path, tmp_path: Path) -> None:
    script = (
        "from pinfer.kernels.cpp import core_problem, load_core; from pinfer.kernels.cpp.compile import LEVELS\n"
        "assert core_problem() is None, core_problem()\n"
        "assert load_core().pinfer_use(b'portable')\n"
        "assert load_core().pinfer_knows_type(8)\n"
        "print(load_core()._name)"
    )
    assert Path(run_installed(installed, script, tmp_path)).is_relative_to(installed)
    assert not (tmp_path / "cache").exists()


def test_a_packaged_library_of_other_sources_is_left_alone(installed: Path, tmp_path: Path) -> None:
    header = installed / "pinfer/kernels/cpp/team.h"
    before = header.read_text()
    header.write_text(before + "// edited\n")
    try:
        output = run_installed(
            installed, "from pinfer.kernels.cpp import core_problem; print(core_problem())", tmp_path
        )
    finally:
        header.write_text(before)
    assert output == "no C++ compiler found at /no/compiler, which CXX names"


def test_a_packaged_library_that_cannot_be_loaded_is_passed_over(installed: Path, tmp_path: Path) -> None:
    (library,) = (installed / "pinfer/kernels/cpp").glob("_core-*.so")
    before = library.read_bytes()
    library.write_bytes(b"not a library")
    try:
        output = run_installed(
            installed, "from pinfer.kernels.cpp import core_problem; print(core_problem())", tmp_path
        )
    finally:
        library.write_bytes(before)
    assert output.startswith("no C++ compiler found")


def test_without_a_compiler_the_wheel_is_for_any_platform(tree: Path) -> None:
    wheel = build(tree, "build_wheel", CXX="/no/compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries(wheel) == []
    assert "pinfer/kernels/cpp/team.h" in zipfile.ZipFile(wheel).namelist()  # the first use compiles it


def test_an_editable_install_compiles_nothing(tree: Path) -> None:
    wheel = build(tree, "build_editable", CXX="/bin/false")
    assert libraries(wheel) == []
    assert not list((tree / "pinfer").rglob("*.so"))
