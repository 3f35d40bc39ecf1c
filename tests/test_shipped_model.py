"""The shipped model keeps its promises: sparse, lossless, readable, small."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pinfer import sparsify
from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import SHIPPED_MODEL, Engine, Generation, load_engine
from pinfer.engine.text import ASSETS, EVALUATION_TEXT
from pinfer.formats.gguf import GGUFFile
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.transpose import transpose_weights
from pinfer.quality import evaluate, perplexity, sliding_windows, summarise, windows

REPOSITORY = Path(__file__).parent.parent
HELD_OUT = REPOSITORY / "experiments" / "data" / "heldout.txt"
SHIPPED_PREDICTORS = ASSETS / "pinfer-tiny.pinfer"
RESULTS = REPOSITORY / "experiments" / "results" / "tiny"
PROMPTS = ("And the LORD said unto Moses,", "The function returns", "CREATE TABLE creates", "A hacker is")


@pytest.fixture(scope="module")
def sparse() -> Engine:
    return load_engine(RunConfig(precision="float32"))


@pytest.fixture(scope="module")
def dense() -> Engine:
    return load_engine(RunConfig(method="dense", precision="float32"))


@pytest.fixture(scope="module")
def pieces(sparse: Engine) -> list[torch.Tensor]:
    """Every fourth window of the held-out text."""
    tokens = sparse.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"), add_bos=False)
    return list(windows(tokens, 256, sparse.tokenizer.bos_id))[::4]


def test_size_and_method(sparse: Engine) -> None:
    assert SHIPPED_MODEL.stat().st_size <= 32e6
    assert sparse.method == "exact"
    assert sparse.config.activation == "relu"


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0), SamplingConfig(temperature=0.8, seed=5)])
def test_sparse_text_is_the_dense_text(sparse: Engine, dense: Engine, prompt: str, sampling: SamplingConfig) -> None:
    ids = sparse.tokenizer.encode(prompt)
    runs = [Generation(engine, ids, max_tokens=100, sampling=sampling, ignore_eos=True) for engine in (sparse, dense)]
    texts = ["".join(run) for run in runs]
    assert runs[0].ids == runs[1].ids
    assert texts[0] == texts[1]
    assert len(runs[0].ids) == 100


def test_density_is_at_most_a_tenth(sparse: Engine, pieces: list[torch.Tensor]) -> None:
    sparsify.reset_activity(sparse.model)
    with sparse.computing():
        perplexity(sparse.model, pieces)
    assert 0.01 < sparsify.density(sparse.model) <= 0.10


def test_firing_is_skewed(sparse: Engine, pieces: list[torch.Tensor]) -> None:
    """A minority of neurons holds 80 % of all firings, in every layer."""
    counts = [torch.zeros(sparse.config.d_ffn) for _ in range(sparse.config.n_layers)]

    def count(layer: int):
        def hook(_: torch.nn.Module, __: object, prediction) -> None:
            counts[layer] += prediction.mask.sum(0)

        return hook

    handles = [ffn.predictor.register_forward_hook(count(layer)) for layer, ffn in enumerate(sparse.model.ffns())]
    with sparse.computing():
        perplexity(sparse.model, pieces)
    for handle in handles:
        handle.remove()
    for layer in counts:
        ordered = layer.sort(descending=True).values.cumsum(0) / layer.sum()
        assert float((ordered < 0.8).float().mean()) < 0.45


def test_perplexity_is_what_training_reported_and_sparse_equals_dense(
    sparse: Engine, dense: Engine, pieces: list[torch.Tensor]
) -> None:
    results = []
    for engine in (sparse, dense):
        with engine.computing():
            results.append(perplexity(engine.model, pieces))
    assert results[0].nll == pytest.approx(results[1].nll, abs=1e-4)
    uniform = math.log(sparse.config.vocab_size)
    assert results[0].nll < uniform - 3, "far better than guessing"


def test_down_is_transposed_without_loss() -> None:
    gguf = GGUFFile.open(SHIPPED_MODEL)
    down = gguf.tensor("blk.0.ffn_down.weight")
    turned, error = transpose_weights(down)
    assert torch.equal(dequantize(turned), dequantize(down).T)
    assert error == 0


def test_training_results_are_recorded() -> None:
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    assert records
    assert (SHIPPED_MODEL.parent / "MODEL_CARD.md").is_file()


def test_its_predictors_keep_the_quality_they_were_calibrated_to() -> None:
    """On text that they were neither trained nor calibrated on: 99 % of perplexity, about as many named as fire."""
    engine = load_engine(RunConfig(predictor_path=str(SHIPPED_PREDICTORS), precision="float32"))
    dense = load_engine(RunConfig(method="dense", precision="float32"))
    assert engine.method == "low_rank"
    ids = engine.tokenizer.encode(EVALUATION_TEXT.read_text(encoding="utf-8"), add_bos=False)
    found = sliding_windows(ids, 512, 512, engine.tokenizer.bos_id)
    with engine.computing():
        summary = summarise(list(evaluate(dense.model, found, engine.model)))
    assert summary.sparse is not None
    assert summary.dense.perplexity / summary.sparse.perplexity.perplexity > 0.99
    neurons = summary.sparse.neurons
    assert neurons.over_prediction is not None
    assert neurons.over_prediction < 1.3
    assert neurons.weighted_recall > 0.92
    ffn_bytes = sum(info.nbytes for name, info in engine.file.tensors.items() if ".ffn_" in name and "norm" not in name)
    assert 0 < sparsify.predictor_bytes(engine.model) < 0.05 * ffn_bytes
