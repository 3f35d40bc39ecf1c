"""A 70B model's file is opened and shown by its header alone: nothing of its 40 GB is read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pinfer.engine.quantize_model import targets
from pinfer.formats import open_model
from tests.large_files import has_holes, write_holes

# Inspects a model and says what the process took at most, in KB.
_INSPECT = """
import resource, sys
from pinfer.cli.main import run
code = run(["inspect", "--json", sys.argv[1]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_holes(tmp_path_factory.mktemp("large") / "70b.gguf")
    if not has_holes(path):
        path.unlink()
        pytest.skip("this file system keeps room for holes")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is counted otherwise")
def test_inspecting_40_gb_takes_less_than_300_mb(large: Path) -> None:
    environment = {
        key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
    }  # which is imported then
    command = [sys.executable, "-c", _INSPECT, str(large)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    figures, peak_kb = shown.stdout.splitlines()
    assert json.loads(figures)["weights_bytes"] > 40e9
    assert int(peak_kb) * 1024 < 300e6


def test_its_types_are_those_of_the_mix(large: Path) -> None:
    """What is a Q4_K_M already stays as it is."""
    with open_model(large) as file:
        chosen = targets(file, "q4_k_m")
        assert all(one.type is one.stored for one in chosen)
        assert {one.type.name for one in chosen if "attn_v" in one.name} == {"Q5_K", "Q6_K"}
