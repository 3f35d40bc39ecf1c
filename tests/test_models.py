"""The families against a second implementation: float64, whole sequence at once, no cache, complex rope."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from pinfer.config import ModelConfig, RopeConfig
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import model_config
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.models import FAMILIES, Transformer, build_model
from pinfer.models.layers import Rope
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

TOKENS = torch.tensor([3, 17, 9, 9, 120, 44, 7, 61, 200, 5, 88, 13, 2])


class Naive:
    """Llama and Gemma 3 as their papers describe them, for the tests alone."""

    def __init__(self, gguf: GGUFFile, config: ModelConfig) -> None:
        self.gguf, self.config = gguf, config

    def matrix(self, name: str) -> torch.Tensor:
        return dequantize(self.gguf.tensor(name + ".weight")).double()

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.gguf.vector(name + ".weight").double()
        return x / (x.square().mean(-1, keepdim=True) + self.config.norm_eps).sqrt() * weight

    def rotate(self, x: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
        """x [T, heads, head_dim] as complex pairs, each turned by its angle."""
        half = rope.dim // 2
        pairs = x.unflatten(-1, (half, 2)) if rope.style == "interleaved" else x.unflatten(-1, (2, half)).mT
        turns = torch.outer(torch.arange(len(x)).double(), rope.base ** (-torch.arange(half).double() / half))
        turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(turns), turns)[:, None]
        pairs = torch.view_as_real(turned)
        return pairs.flatten(-2) if rope.style == "interleaved" else pairs.mT.flatten(-2)

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        config, prefix = self.config, f"blk.{layer}."
        heads = [(x @ self.matrix(prefix + f"attn_{n}").T).unflatten(-1, (-1, config.head_dim)) for n in "qkv"]
        if config.architecture == "gemma3":
            heads[:2] = [self.norm(head, prefix + f"attn_{n}_norm") for head, n in zip(heads, "qk", strict=False)]
        sliding = config.is_sliding(layer)
        rope = config.rope_local if sliding and config.rope_local else config.rope
        query, key, value = self.rotate(heads[0], rope), self.rotate(heads[1], rope), heads[2]
        out = torch.zeros_like(query)
        for t in range(len(x)):
            first = max(0, t - (config.sliding_window or 0) + 1) if sliding else 0
            for h in range(config.n_heads):
                kv = h * config.n_kv_heads // config.n_heads
                scores = key[first : t + 1, kv] @ query[t, h] * config.attention_scale
                out[t, h] = scores.softmax(0) @ value[first : t + 1, kv]
        return out.flatten(1) @ self.matrix(prefix + "attn_output").T

    def ffn(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        prefix = f"blk.{layer}.ffn_"
        gate = x @ self.matrix(prefix + "gate").T
        up = x @ self.matrix(prefix + "up").T
        if self.config.activation == "drelu":
            hidden, up = gate.clamp(min=0), up.clamp(min=0)
        elif self.config.activation == "relu":
            hidden = gate.clamp(min=0)
        elif self.config.activation == "silu":
            hidden = gate / (1 + (-gate).exp())
        else:
            hidden = gate / 2 * (1 + (math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)).tanh())
        return (hidden * up) @ self.matrix(prefix + "down").T

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        gemma = self.config.architecture == "gemma3"
        embedding = self.matrix("token_embd")
        x = embedding[tokens] * (math.sqrt(self.config.d_model) if gemma else 1)
        for layer in range(self.config.n_layers):
            prefix = f"blk.{layer}."
            mixed = self.attention(self.norm(x, prefix + "attn_norm"), layer)
            x = x + (self.norm(mixed, prefix + "post_attention_norm") if gemma else mixed)
            out = self.ffn(self.norm(x, prefix + "ffn_norm"), layer)
            x = x + (self.norm(out, prefix + "post_ffw_norm") if gemma else out)
        head = self.matrix("output") if self.gguf.has("output.weight") else embedding
        return self.norm(x, "output_norm") @ head.T


def models(path: Path, context: int = 64) -> tuple[Transformer, Naive]:
    gguf = GGUFFile.open(path)
    config = model_config(gguf)
    return build_model(gguf, config, context), Naive(gguf, config)


@pytest.fixture(params=["llama-relu", "llama-drelu", "llama-silu-q8_0-tied", "gemma3", "gemma3-q4_0"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Transformer, Naive]:
    path = tmp_path / "model.gguf"
    if request.param == "llama-relu":
        write_tiny_llama(path)
    elif request.param == "llama-drelu":
        write_tiny_llama(path, activation="drelu")
    elif request.param == "llama-silu-q8_0-tied":
        write_tiny_llama(path, activation="silu", weight_type="Q8_0", tied=True, n_kv_heads=1)
    elif request.param == "gemma3":
        write_tiny_gemma3(path)
    else:
        write_tiny_gemma3(path, weight_type="Q4_0", sliding_window=3, n_kv_heads=2)
    return models(path)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_whole_prompt_equals_naive(pair: tuple[Transformer, Naive]) -> None:
    model, naive = pair
    expected = naive.logits(TOKENS)
    assert expected.std() > 0.1, "a flat output would agree with anything"
    close(model(TOKENS, model.new_cache()), expected)


@torch.inference_mode()
@pytest.mark.parametrize("pieces", [[1] * 13, [5, 1, 1, 6], [12, 1]])
def test_prefill_in_pieces_and_decode_equal_naive(pair: tuple[Transformer, Naive], pieces: list[int]) -> None:
    model, naive = pair
    cache = model.new_cache()
    logits = torch.cat([model(part, cache) for part in TOKENS.split(pieces)])
    assert cache.length == len(TOKENS)
    close(logits, naive.logits(TOKENS))


@torch.inference_mode()
def test_last_only_is_the_last_row(pair: tuple[Transformer, Naive]) -> None:
    model, _ = pair
    close(model(TOKENS, model.new_cache(), last_only=True), model(TOKENS, model.new_cache())[-1:])


@torch.inference_mode()
def test_two_caches_do_not_disturb_each_other(pair: tuple[Transformer, Naive]) -> None:
    model, naive = pair
    first, second = model.new_cache(), model.new_cache()
    model(TOKENS[:4], first)
    model(TOKENS[5:], second)
    close(model(TOKENS[4:5], first), naive.logits(TOKENS[:5])[-1:])


def test_context_overflow_names_both_numbers(tmp_path: Path) -> None:
    model, _ = models(write_tiny_llama(tmp_path / "m.gguf"), context=8)
    with pytest.raises(ValueError, match=r"13 tokens do not fit the context of 8"):
        model(TOKENS, model.new_cache())


@pytest.mark.parametrize("context", [0, -1, 257])
def test_context_outside_the_models_limit_is_refused(tmp_path: Path, context: int) -> None:
    gguf = GGUFFile.open(write_tiny_llama(tmp_path / "m.gguf"))
    with pytest.raises(ValueError, match=str(context)):
        build_model(gguf, model_config(gguf), context)


def test_families_cover_what_the_reader_accepts(tmp_path: Path) -> None:
    gguf = GGUFFile.open(write_tiny_gemma3(tmp_path / "m.gguf"))
    assert model_config(gguf).architecture in FAMILIES


def turned_from(rope: Rope, x: torch.Tensor, start: int) -> torch.Tensor:
    rope.reserve(start + len(x))
    return rope(x, torch.tensor([start]))


def test_rope_frequency_factors_and_scale_slow_the_turning() -> None:
    x = torch.randn(4, 2, 8)
    plain = RopeConfig(dim=8, base=10000, style="halves")
    halved = Rope(RopeConfig(dim=8, base=10000, style="halves", scale=2.0))
    factors = Rope(plain, factors=torch.full((4,), 2.0))
    torch.testing.assert_close(turned_from(halved, x, 4), turned_from(factors, x, 4))
    # At twice the position, half the speed turns as far.
    torch.testing.assert_close(turned_from(halved, x[:1], 6), turned_from(Rope(plain), x[:1], 3))


def test_rope_table_grows_with_the_positions() -> None:
    x, config = torch.randn(2, 1, 8), RopeConfig(dim=8, base=10000, style="halves")
    fresh, grown = Rope(config), Rope(config)
    late = turned_from(fresh, x, 5000)
    turned_from(grown, x, 1023)
    torch.testing.assert_close(turned_from(grown, x, 5000), late)
    torch.testing.assert_close(turned_from(grown, x, 0), turned_from(Rope(config), x, 0))


def test_rope_frequency_factors_of_a_file_are_used(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    gguf = GGUFFile.open(write_tiny_llama(path))
    config = model_config(gguf)

    class WithFactors:
        """The file, with Llama 3.1's tensor added."""

        tensor = staticmethod(gguf.tensor)

        def has(self, name: str) -> bool:
            return name == "rope_freqs.weight" or gguf.has(name)

        def vector(self, name: str) -> torch.Tensor:
            return torch.full((8,), 4.0) if name == "rope_freqs.weight" else gguf.vector(name)

    scaled = dataclasses.replace(config, rope=dataclasses.replace(config.rope, scale=4.0))
    with torch.inference_mode():
        expected = (model := build_model(gguf, scaled, 64))(TOKENS, model.new_cache())
        factored = (model := build_model(WithFactors(), config, 64))(TOKENS, model.new_cache())
        plain = (model := build_model(gguf, config, 64))(TOKENS, model.new_cache())
    close(factored, expected)
    assert float((plain - expected).abs().max()) > 1e-2


def test_rope_leaves_the_rest_of_a_head_alone() -> None:
    x = torch.randn(3, 1, 8)
    turned = turned_from(Rope(RopeConfig(dim=4, base=100, style="interleaved")), x, 1)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert not torch.equal(turned[..., :4], x[..., :4])
