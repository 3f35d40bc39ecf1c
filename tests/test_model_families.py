"""What each architecture's metadata says: defaults, windows, scalings, experts; and tensors that are stored as one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.config import ExpertsConfig, ModelConfig, RopeConfig, YarnConfig
from pinfer.formats import ModelFile, TensorInfo, open_model
from pinfer.formats.errors import FormatError
from pinfer.formats.fused import fused_groups, split_fused
from pinfer.formats.gguf_writer import write_gguf
from pinfer.formats.model_config import check_tensors, model_config, optional_tensors
from pinfer.formats.standard import standard_metadata, standard_tensors
from pinfer.kernels.ops import dequantize
from pinfer.models.layers import Rope
from pinfer.quant import F32
from tests.gguf_files import BOOL
from tests.hf_models import make_folder
from tests.test_model_config import BLOCK, LLAMA_KEYS, LLAMA_SHAPES, Keys, Shapes, f, items, s, u, write_model


def keys_of(architecture: str, more: Keys | None = None) -> Keys:
    """LLAMA_KEYS of another architecture, `more` without its prefix."""
    named = {name.replace("llama.", f"{architecture}."): value for name, value in LLAMA_KEYS.items()}
    more = {f"{architecture}.{name}": value for name, value in (more or {}).items()}
    return named | {"general.architecture": s(architecture)} | more


def config_of(path: Path, architecture: str, more: Keys | None = None, n_layers: int = 2) -> ModelConfig:
    shapes: Shapes = {"token_embd.weight": (5, 8)} | {f"t{i}": (1,) for i in range(n_layers)}
    keys = keys_of(architecture, {"block_count": u(n_layers)} | (more or {}))
    return model_config(write_model(path / "m.gguf", keys, shapes))


def test_a_window_holds_in_all_layers_or_in_those_that_are_named(tmp_path: Path) -> None:
    assert config_of(tmp_path, "llama").sliding_window is None
    window: Keys = {"attention.sliding_window": u(16)}
    assert config_of(tmp_path, "llama", window).sliding == (True, True)
    listed = items(BOOL, b"\0", b"\1")
    assert config_of(tmp_path, "qwen2", window | {"attention.sliding_window_pattern": listed}).sliding == (False, True)
    assert config_of(tmp_path, "phi3", {"attention.sliding_window": u(0)}).sliding == ()


def test_gemma2_has_llama_cpps_defaults(tmp_path: Path) -> None:
    config = config_of(tmp_path, "gemma2", n_layers=3)
    assert (config.sliding_window, config.sliding) == (4096, (True, False, True))
    assert (config.attention_softcap, config.logit_softcap) == (50.0, 30.0)
    assert (config.embedding_scale, config.attention_scale) == (8**0.5, 4**-0.5)
    assert config.rope == RopeConfig(4, 10000.0, "halves") and config.rope_local is None
    off: Keys = {"attn_logit_softcapping": f(0.0), "final_logit_softcapping": f(0.0), "attention.scale": f(0.25)}
    config = config_of(tmp_path, "gemma2", off)
    assert (config.attention_softcap, config.logit_softcap, config.attention_scale) == (None, None, 0.25)
    of_27b = config_of(tmp_path, "gemma2", {"attention.key_length": u(6)}, n_layers=46)
    assert of_27b.attention_scale == (8 // 2) ** -0.5


def test_yarn(tmp_path: Path) -> None:
    yarn: Keys = {"rope.scaling.type": s("yarn"), "rope.scaling.factor": f(4.0)}
    rope = config_of(tmp_path, "qwen2", yarn).rope
    assert rope is not None
    assert (rope.yarn, rope.scale, rope.original_context) == (YarnConfig(32.0, 1.0), 4.0, 64)
    assert rope.attention_factor == pytest.approx(1.13863, rel=1e-5)  # 0.1 ln 4 + 1
    more: Keys = {"rope.scaling.yarn_beta_fast": f(16.0), "rope.scaling.original_context_length": u(16)}
    rope = config_of(tmp_path, "qwen2", yarn | more | {"rope.scaling.yarn_attn_factor": f(2.0)}).rope
    assert rope is not None
    assert (rope.yarn, rope.attention_factor, rope.original_context) == (YarnConfig(16.0, 1.0), 2.0, 16)
    rope = config_of(tmp_path, "qwen2", yarn | {"rope.scaling.attn_factor": f(0.5)}).rope
    assert rope is not None and rope.attention_factor == pytest.approx(1.13863 / 2, rel=1e-5)


def test_yarn_keeps_fast_dimensions_and_scales_slow_ones() -> None:
    plain = RopeConfig(64, 10000.0, "halves")
    yarn = RopeConfig(64, 10000.0, "halves", 8.0, YarnConfig(), original_context=4096)
    ratio = Rope(plain).frequency / Rope(yarn).frequency
    assert torch.equal(ratio[:8], torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(ratio[-8:], torch.full((8,), 8.0, dtype=torch.float64))
    assert bool((ratio.diff() >= 0).all()) and 1 < float(ratio[20]) < 8


def test_longrope_needs_both_factors_and_its_first_context(tmp_path: Path) -> None:
    def shapes(*names: str) -> Shapes:
        return LLAMA_SHAPES | {f"rope_factors_{name}.weight": (2,) for name in names}

    context: Keys = {"rope.scaling.original_context_length": u(16), "rope.scaling.attn_factor": f(1.25)}
    file = write_model(tmp_path / "m.gguf", keys_of("phi3", context), shapes("long", "short"))
    config = model_config(file)
    check_tensors(file, config)
    assert config.rope is not None
    assert (config.rope.original_context, config.rope.attention_factor, config.rope.scale) == (16, 1.25, 1.0)
    for keys, names in ((context, ("long",)), ({}, ("long", "short"))):
        file = write_model(tmp_path / "m.gguf", keys_of("phi3", keys), shapes(*names))
        with pytest.raises(FormatError, match="rope_factors_long and _short need each other"):
            check_tensors(file, model_config(file))


def test_layer_norms_and_ungated_ffns(tmp_path: Path) -> None:
    epsilon: Keys = {"attention.layer_norm_epsilon": f(1e-5)}
    with pytest.raises(FormatError, match=r"'falcon\.attention\.layer_norm_epsilon' is missing"):
        config_of(tmp_path, "falcon")
    falcon = config_of(tmp_path, "falcon", epsilon)
    assert (falcon.norm, falcon.gated, falcon.activation) == ("layer", False, "gelu")
    assert "blk.1.attn_norm_2.bias" in optional_tensors(falcon)
    opt = config_of(tmp_path, "opt", epsilon)
    assert (opt.rope, opt.position_offset, opt.activation, opt.norm) == (None, 2, "relu", "layer")
    assert config_of(tmp_path, "bamboo").activation == "drelu"


def test_a_cutoff_of_relu(tmp_path: Path) -> None:
    keys: Keys = {"hidden_activation": s("fatrelu"), "hidden_activation_cutoff": f(0.5)}
    config = config_of(tmp_path, "llama", keys)
    assert (config.activation, config.cutoff) == ("relu", 0.5)


def test_experts(tmp_path: Path) -> None:
    experts: Keys = {"expert_count": u(4), "expert_used_count": u(2)}
    mixtral = config_of(tmp_path, "llama", experts)
    assert (mixtral.experts, mixtral.d_ffn) == (ExpertsConfig(4, 2), 12)
    assert config_of(tmp_path, "llama", {"expert_count": u(0)}).experts is None
    own: Keys = {"expert_feed_forward_length": u(3), "expert_weights_norm": (7, b"\0"), "expert_weights_scale": f(2.5)}
    qwen = config_of(tmp_path, "qwen3moe", experts | own)
    assert (qwen.experts, qwen.d_ffn) == (ExpertsConfig(4, 2, normalised=False, scale=2.5), 3)
    assert config_of(tmp_path, "qwen3moe", experts).d_ffn == 6, "a share of the FFN's, as llama.cpp has it"
    with pytest.raises(FormatError, match=r"'qwen3moe\.expert_count' is missing"):
        config_of(tmp_path, "qwen3moe")


def test_experts_tensors_are_checked(tmp_path: Path) -> None:
    keys = keys_of("llama", {"expert_count": u(4), "expert_used_count": u(2)})
    block: Shapes = {
        name: shape for name, shape in BLOCK.items() if not name.startswith(("ffn_gate", "ffn_up", "ffn_d"))
    }
    block |= {
        "ffn_gate_inp": (4, 8),
        "ffn_gate_exps": (4, 12, 8),
        "ffn_up_exps": (4, 12, 8),
        "ffn_down_exps": (4, 8, 12),
    }
    shapes: Shapes = {"token_embd.weight": (5, 8), "output_norm.weight": (8,)}
    shapes |= {f"blk.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in block.items()}
    file = write_model(tmp_path / "m.gguf", keys, shapes)
    check_tensors(file, model_config(file))
    assert file.tensor("blk.0.ffn_down_exps.weight").shape == (32, 12)
    bad = write_model(tmp_path / "m.gguf", keys, shapes | {"blk.1.ffn_up_exps.weight": (4, 8, 12)})
    with pytest.raises(FormatError, match=r"'blk\.1\.ffn_up_exps\.weight' has shape \[4, 8, 12\], not \[4, 12, 8\]"):
        check_tensors(bad, model_config(bad))


# Tensors that are stored as one


@pytest.fixture(scope="module", params=["phi3", "falcon-40b"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelFile, Any]]:
    """A model whose GGUF has fused tensors, opened, and what lies in it."""
    from gguf import GGUFReader

    folder = tmp_path_factory.mktemp("fused")
    with open_model(make_folder(request.param, folder / "hf")) as file:
        path = folder / "m.gguf"
        write_gguf(path, standard_metadata(file, None), standard_tensors(file, None, dequantize))
    yield open_model(path), GGUFReader(path)


def test_parts_are_rows_of_what_is_stored(pair: tuple[ModelFile, Any]) -> None:
    file, reader = pair
    stored = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    groups = fused_groups(file.architecture)
    assert groups["blk.{}.attn_qkv"] == ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v")
    for whole, parts in groups.items():
        name = whole.format(1) + ".weight"
        rows = [dequantize(file.tensor(part.format(1) + ".weight")) for part in parts]
        assert torch.equal(torch.cat(rows), stored[name])
        assert file.info(f"{parts[0].format(1)}.weight").nbytes < stored[name].nbytes
    assert "blk.1.attn_qkv.weight" in stored and not file.has("blk.1.attn_qkv.weight")


def test_a_fused_tensor_of_other_rows_stays_as_it_is(pair: tuple[ModelFile, Any]) -> None:
    file, _ = pair
    name = "blk.0.attn_qkv.weight"
    tensors = {name: TensorInfo(name, (40, 64), F32, 0, 40 * 256)}
    assert split_fused(file.metadata, tensors) == tensors


def test_a_fused_bias_is_split_as_its_matrix(tmp_path: Path) -> None:
    """PowerInfer's OPT has both."""
    shapes: Shapes = {"token_embd.weight": (5, 8), "blk.0.attn_qkv.weight": (24, 8), "blk.0.attn_qkv.bias": (24,)}
    file = write_model(tmp_path / "m.gguf", keys_of("opt"), shapes)
    assert [file.info(f"blk.0.attn_{part}.bias").shape for part in "qkv"] == [(8,)] * 3
    start = file.info("blk.0.attn_q.bias").offset
    assert [file.info(f"blk.0.attn_{part}.bias").offset - start for part in "qkv"] == [0, 32, 64]
    assert file.vector("blk.0.attn_v.bias").shape == (8,)
    assert fused_groups("opt") == {} == fused_groups("llama")
