"""Configurations are checked where they are made, and every error names its key, value and limit."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pinfer.config import ModelConfig, RopeConfig, RunConfig, SamplingConfig

SHAPE: dict[str, Any] = {
    "architecture": "llama", "name": "", "n_layers": 2, "d_model": 64, "d_ffn": 96, "n_heads": 4, "n_kv_heads": 2,
    "head_dim": 16, "vocab_size": 100, "context_length": 128, "norm_eps": 1e-5, "activation": "silu",
    "rope": RopeConfig(16, 10000.0, "interleaved"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1), ("temperature", math.nan), ("temperature", math.inf), ("top_p", 0), ("top_p", 5),
        ("top_k", -1), ("min_p", 1.5), ("repeat_penalty", 0), ("repeat_last_n", -1), ("seed", -1), ("seed", 2**64),
    ],
)  # fmt: skip
def test_sampling_out_of_range(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        SamplingConfig(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("context", -1), ("threads", 0), ("threads", 1.5), ("context", True), ("context", "abc"), ("sampling", 5), ("sparsity", 1.0), ("sparsity", -0.1), ("cold_fraction", 2.0),
        ("method", "magic"), ("backend", "opencl"), ("activation", "tanh"),
    ],
)  # fmt: skip
def test_run_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        RunConfig.from_mapping({key: value})


def test_unknown_keys_are_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown key sparsty; known keys: .*sparsity"):
        RunConfig.from_mapping({"sparsty": 0.5})
    with pytest.raises(ValueError, match=r"unknown key sampling\.temp;"):
        RunConfig.from_mapping({"sampling": {"temp": 0.5}})


def test_mapping_and_overrides() -> None:
    run = RunConfig.from_mapping({"sparsity": 0.5, "sampling": {"top_k": 3}}, sparsity=0.7)
    assert run.sparsity == 0.7
    assert run.sampling.top_k == 3
    assert RunConfig.from_mapping({}) == RunConfig()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_layers", 0), ("n_heads", 0), ("n_kv_heads", 3), ("norm_eps", math.nan), ("norm_eps", 0.0),
        ("activation", "swish"), ("sliding", (True,)), ("rope", RopeConfig(18, 1e4, "halves")),
        ("rope", RopeConfig(15, 1e4, "halves")), ("rope_local", RopeConfig(18, 1e4, "halves")),
    ],
)  # fmt: skip
def test_model_shape_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key.removesuffix("_local")):
        ModelConfig(**{**SHAPE, key: value})


@pytest.mark.parametrize("stated", [{"base": math.nan}, {"base": 0.0}, {"scale": 0.0}, {"attention_factor": math.inf}])
def test_rope_out_of_range(stated: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be finite and positive"):
        RopeConfig(**{"dim": 16, "base": 1e4, "style": "halves", **stated})


def test_attention_scale_defaults_to_the_head() -> None:
    assert ModelConfig(**SHAPE).attention_scale == 0.25
    assert ModelConfig(**{**SHAPE, "attention_scale": 0.1}).attention_scale == 0.1
