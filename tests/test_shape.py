"""What a model will take, told from its file, is what it takes: to the byte, for every family and method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.shape import model_shape
from pinfer.ffn import HybridFFN, SparseFFN
from pinfer.kernels.planes import repack
from pinfer.models import replace_weights
from pinfer.models.weights import held_bytes
from pinfer.predictors import Predictor
from pinfer.quant import Layout
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

WRITERS = {"llama": write_tiny_llama, "gemma3": write_tiny_gemma3}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "F32", {"method": "dense"}),
    ("gemma3", "Q4_0", {"method": "dense"}),
    ("llama", "Q8_0", {"method": "exact"}),
    ("llama", "Q4_0", {"method": "low_rank", "predictor_rank": 32}),
    ("llama", "F16", {"method": "sign_bits"}),
    ("gemma3", "Q5_1", {"method": "gate_threshold", "sparsity": 0.5}),
    ("llama", "Q4_1", {"method": "weighted_threshold", "sparsity": 0.5}),
    ("gemma3", "Q8_0", {"method": "shift_threshold", "sparsity": 0.5}),
    ("gemma3", "F16", {"method": "shift_threshold", "sparsity": 0.5}),
    ("gemma3", "Q4_0", {"method": "input_threshold", "sparsity": 0.5}),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    family, kind, method = request.param
    return loaded(tmp_path_factory.mktemp("shape"), family, kind, method)


def loaded(folder: Path, family: str, kind: str, method: dict[str, Any]) -> Engine:
    path = WRITERS[family](folder / "m.gguf", weight_type=kind, n_layers=2)
    return load_engine(RunConfig(model=str(path), **method))


def predictors_of(engine: Engine) -> list[Predictor] | None:
    found = [ffn.predictor for ffn in engine.model.ffns() if isinstance(ffn, SparseFFN)]
    return found or None


def test_the_shape_holds_what_the_loaded_model_does(engine: Engine) -> None:
    shape = model_shape(engine.file, engine.config, engine.method, predictors_of(engine))
    for layer, block in zip(shape.layers, engine.model.blocks, strict=True):
        ffn = layer.neuron_bytes * layer.n_neurons + layer.shared_bytes + layer.compensation_bytes
        rest = layer.attention_bytes
        assert rest + ffn == held_bytes(block)
        if engine.method not in ("dense", "input_threshold"):
            assert ffn == held_bytes(block.ffn)
    assert shape.head_bytes == engine.model.head.nbytes + 4 * engine.config.d_model
    tied = engine.model.head is engine.model.embedding
    assert shape.embedding_bytes == (0 if tied else engine.model.embedding.nbytes)
    cache = engine.model.new_cache()
    for layer, kept in zip(shape.layers, cache.layers, strict=True):
        assert layer.kv_bytes(cache.context) == kept.nbytes


def test_most_methods_are_known_before_they_are_fitted(engine: Engine) -> None:
    if engine.method in ("sign_bits", "low_rank"):
        with pytest.raises(ValueError, match="name a solved directory"):
            model_shape(engine.file, engine.config, engine.method)
        return
    before, after = (
        model_shape(engine.file, engine.config, engine.method, found) for found in (None, predictors_of(engine))
    )
    assert before == after


@pytest.mark.parametrize("layout", ["blocks", "planes"])
def test_neurons_of_a_split_layer_weigh_what_their_shards_hold(tmp_path: Path, layout: Layout) -> None:
    whole = loaded(tmp_path, "llama", "Q4_0", {"method": "exact"})
    shape = model_shape(whole.file, whole.config, "exact", predictors_of(whole), rearranged=layout == "planes")
    split = load_engine(RunConfig(model=str(whole.path), method="exact", cold_fraction=0.25))
    if layout == "planes":
        replace_weights(split.model, repack)
    for one, block in zip(shape.layers, split.model.blocks, strict=True):
        layer = one.on("gpu")
        assert isinstance(block.ffn, HybridFFN)
        for shard in (block.ffn.hot, *block.ffn.cold):
            assert isinstance(shard, SparseFFN)
            assert held_bytes(shard) == layer.neuron_bytes * shard.weights.n_neurons + layer.shared_bytes


def test_a_gate_that_predicts_is_read_by_every_token(tmp_path: Path) -> None:
    engine = loaded(tmp_path, "llama", "Q8_0", {"method": "exact"})
    layer = model_shape(engine.file, engine.config, "exact").layers[0]
    d = engine.config.d_model
    assert (layer.always_bytes, layer.active_bytes) == (34 * d // 32, 2 * 34 * d // 32)
    dense = model_shape(engine.file, engine.config, "dense").layers[0]
    assert dense.active_bytes == 0
    assert torch.tensor(dense.always_bytes) == dense.neuron_bytes
