"""Tiny random models of every architecture that llama.cpp knows: it opens our GGUF and computes the same logits.

Needs llama-cpp-python, in this environment or in that of the interpreter $PINFER_LLAMA_PYTHON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from pinfer.formats import ModelFile, open_model
from pinfer.formats.gguf_writer import write_gguf
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.standard import standard_metadata, standard_tensors
from pinfer.kernels.ops import dequantize
from pinfer.models import build_model
from tests.hf_models import FAMILIES, make_folder

INTERPRETER = os.environ.get("PINFER_LLAMA_PYTHON") or (
    sys.executable if importlib.util.find_spec("llama_cpp") else None
)
pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(
        INTERPRETER is None, reason="no llama-cpp-python; $PINFER_LLAMA_PYTHON names an interpreter of it"
    ),
]
LENGTH = 70
# llama.cpp has no such architecture, or no key for what makes the family another than llama.
UNKNOWN = ("bamboo", "turbosparse", "opt")
UNSAID = ("relu-llama", "prosparse")
# What it has no key for, or ignores: the model is written without, and is the same to both readers then.
CHANGED: dict[str, dict[str, Any]] = {
    "mistral-window": {"llama.attention.sliding_window": None},
    "phi3-longrope": {"phi3.attention.sliding_window": None},
    "gemma2": {"gemma2.attention.scale": None},
    "gemma3": {"gemma3.attention.scale": None},
    "falcon-7b": {"falcon.hidden_activation": "gelu_tanh"},
    "falcon-40b": {"falcon.hidden_activation": "gelu_tanh"},
}
GELU_TABLE = ("gemma2", "gemma3", "falcon-7b", "falcon-40b")  # which it looks up in half precision
COMPARED = [name for name in FAMILIES if name not in UNKNOWN + UNSAID]


def write_changed(file: ModelFile, path: Path, changes: dict[str, Any]) -> None:
    metadata = standard_metadata(file, None) | changes
    kept = {key: value for key, value in metadata.items() if value is not None}
    write_gguf(path, kept, standard_tensors(file, None, dequantize))


def tokens_of(file: ModelFile) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model_config(file).vocab_size, (LENGTH,), generator=generator).tolist()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[int], Path, str | None]]:
    """By family: our file, the tokens, llama.cpp's logits, and what it said instead."""
    folder = tmp_path_factory.mktemp("llama-cpp")
    jobs = []
    for name in (*COMPARED, *UNKNOWN):
        with open_model(make_folder(name, folder / name)) as file:
            path = folder / f"{name}.gguf"
            write_changed(file, path, CHANGED.get(name, {}))
            jobs.append({"model": str(path), "tokens": tokens_of(file), "output": str(folder / f"{name}.npy")})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("llama_cpp_logits.py")
    command = [str(INTERPRETER), str(script), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    problems = [json.loads(line) for line in done.stdout.splitlines()]
    return {
        name: (Path(job["model"]), job["tokens"], Path(job["output"]), problem)
        for name, job, problem in zip((*COMPARED, *UNKNOWN), jobs, problems, strict=True)
    }


@torch.inference_mode()
@pytest.mark.parametrize("name", COMPARED)
def test_our_file_gives_the_same_logits_there(
    name: str, answers: dict[str, tuple[Path, list[int], Path, str | None]]
) -> None:
    path, tokens, output, problem = answers[name]
    assert problem is None
    theirs = torch.from_numpy(np.load(output))
    file = open_model(path)
    config = model_config(file)
    check_tensors(file, config)
    model = build_model(file, config, config.context_length)
    ours = model(torch.tensor(tokens), model.new_cache())
    cosine = float(cosine_similarity(ours.double(), theirs.double(), dim=-1).min())
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{name}: cosine at least {cosine:.8f}, largest difference {error:.1e} of the largest logit")
    assert theirs.std() > 0.5, "a flat output would agree with anything"
    if name in GELU_TABLE:
        assert cosine >= 0.99999 and error < 2e-3
    else:
        assert cosine >= 0.9999999 and error < 2e-5


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_it_does_not_know_it_refuses(
    name: str, answers: dict[str, tuple[Path, list[int], Path, str | None]]
) -> None:
    """Once it knows one of them, this fails, and the family belongs among those that are compared."""
    assert "Failed to load model" in str(answers[name][3])
