"""The model configuration and tensor check of a GGUF file, and mutated files as a whole."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinfer.config import RopeConfig
from pinfer.formats.errors import FormatError
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import check_tensors, expected_tensors, model_config
from tests.gguf_files import (
    ARRAY,
    BOOL,
    F32,
    I32,
    STRING,
    U32,
    U64,
    bpe_vocab,
    key,
    raw_gguf,
    spm_vocab,
    tensor,
    text,
    u32,
    u64,
    write_tiny_gemma3,
    write_tiny_llama,
)


def u(value: int) -> tuple[int, bytes]:
    return U32, u32(value)


def f(value: float) -> tuple[int, bytes]:
    return F32, struct.pack("<f", value)


def s(value: str) -> tuple[int, bytes]:
    return STRING, text(value)


def items(kind: int, *values: bytes) -> tuple[int, bytes]:
    return ARRAY, u32(kind) + u64(len(values)) + b"".join(values)


Keys = dict[str, tuple[int, bytes]]
Shapes = dict[str, tuple[int, ...]]
LLAMA_KEYS: Keys = {
    "general.architecture": s("llama"),
    "llama.block_count": u(2),
    "llama.embedding_length": u(8),
    "llama.feed_forward_length": u(12),
    "llama.attention.head_count": u(2),
    "llama.attention.layer_norm_rms_epsilon": f(1e-5),
    "llama.context_length": u(64),
}
GEMMA3_KEYS: Keys = {name.replace("llama.", "gemma3."): value for name, value in LLAMA_KEYS.items()} | {
    "general.architecture": s("gemma3"),
    "gemma3.attention.key_length": u(6),
    "gemma3.attention.sliding_window": u(16),
}
BLOCK: Shapes = {
    "attn_norm": (8,),
    "attn_q": (8, 8),
    "attn_k": (8, 8),
    "attn_v": (8, 8),
    "attn_output": (8, 8),
    "ffn_norm": (8,),
    "ffn_gate": (12, 8),
    "ffn_up": (12, 8),
    "ffn_down": (8, 12),
}
LLAMA_SHAPES: Shapes = {
    "token_embd.weight": (5, 8),
    **{f"blk.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in BLOCK.items()},
    "output_norm.weight": (8,),
}


def write_model(path: Path, keys: Keys, shapes: Shapes = LLAMA_SHAPES, types: dict[str, int] | None = None) -> GGUFFile:
    """A file of zeros with these keys and tensors, F32 unless `types` says F16 (1)."""
    entries, offset = [], 0
    for name, shape in shapes.items():
        entries.append(tensor(name, shape[::-1], (types or {}).get(name, 0), offset))
        offset += -(-4 * int(np.prod(shape)) // 32) * 32
    path.write_bytes(raw_gguf([key(name, *value) for name, value in keys.items()], entries, bytes(offset)))
    return GGUFFile.open(path)


def test_llama_config_and_defaults(tmp_path: Path) -> None:
    file = write_model(tmp_path / "some-name.gguf", LLAMA_KEYS)
    config = model_config(file)
    check_tensors(file, config)
    assert (config.name, config.n_layers, config.d_model, config.d_ffn) == ("some-name", 2, 8, 12)
    assert (config.n_heads, config.n_kv_heads, config.head_dim, config.vocab_size) == (2, 2, 4, 5)
    assert config.rope == RopeConfig(4, 10000.0, "interleaved") and config.rope_local is None
    assert (config.activation, config.embedding_scale, config.attention_scale) == ("silu", 1.0, 0.5)
    assert not any(config.is_sliding(layer) for layer in range(2))
    assert expected_tensors(config) == LLAMA_SHAPES


def test_llama_config_from_keys(tmp_path: Path) -> None:
    keys = LLAMA_KEYS | {
        "general.name": s("A name"),
        "llama.attention.head_count_kv": items(U32, u32(1), u32(1)),
        "llama.attention.key_length": u(6),
        "llama.rope.dimension_count": u(2),
        "llama.rope.freq_base": f(5e5),
        "llama.rope.scaling.type": s("linear"),
        "llama.rope.scaling.factor": f(4.0),
        "llama.hidden_activation": s("relu"),
        "tokenizer.ggml.tokens": items(STRING, text("a"), text("b"), text("c")),
    }
    config = model_config(write_model(tmp_path / "m.gguf", keys))
    assert (config.name, config.n_kv_heads, config.head_dim, config.vocab_size) == ("A name", 1, 6, 3)
    assert config.rope == RopeConfig(2, 5e5, "interleaved", 4.0) and config.activation == "relu"
    stated = model_config(write_model(tmp_path / "m.gguf", keys | {"llama.vocab_size": u(9)}))
    assert stated.vocab_size == 9


def gemma3_config(path: Path, more: Keys, n_layers: int = 7) -> Any:
    shapes: Shapes = {"token_embd.weight": (5, 8)} | {f"t{i}": (1,) for i in range(n_layers)}
    return model_config(write_model(path, GEMMA3_KEYS | {"gemma3.block_count": u(n_layers)} | more, shapes))


def test_gemma3_config_and_defaults(tmp_path: Path) -> None:
    config = gemma3_config(tmp_path / "m.gguf", {})
    assert config.rope == RopeConfig(6, 1e6, "halves") and config.rope_local == RopeConfig(6, 1e4, "halves")
    assert config.sliding == (True,) * 5 + (False, True) and config.sliding_window == 16
    assert (config.activation, config.embedding_scale, config.attention_scale) == ("gelu_tanh", 8**0.5, 6**-0.5)


def test_gemma3_config_from_keys(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    scaled = {"gemma3.rope.scaling.type": s("linear"), "gemma3.rope.scaling.factor": f(8.0)}
    config = gemma3_config(path, scaled | {"gemma3.rope.freq_base_swa": f(2e4)})
    assert (config.rope.scale, config.rope_local.scale, config.rope_local.base) == (8.0, 1.0, 2e4)
    pattern = "gemma3.attention.sliding_window_pattern"
    assert gemma3_config(path, {pattern: u(2)}, 4).sliding == (True, False, True, False)
    listed = items(BOOL, b"\1", b"\0", b"\0")
    assert gemma3_config(path, {pattern: listed}, 3).sliding == (True, False, False)
    none = gemma3_config(path, {"gemma3.attention.sliding_window": u(0)})
    assert none.sliding_window is None and not none.is_sliding(0)
    assert gemma3_config(path, {}, 62).attention_scale == (8 // 2) ** -0.5


def test_written_models_fit(tmp_path: Path) -> None:
    for weight_type, tied in itertools.product(("F16", "Q8_0"), (False, True)):
        file = GGUFFile.open(write_tiny_llama(tmp_path / "l.gguf", weight_type=weight_type, tied=tied))
        check_tensors(file, config := model_config(file))
        assert config.activation == "relu" and config.vocab_size == len(bpe_vocab())
        assert file.has("output.weight") is not tied
    file = GGUFFile.open(write_tiny_gemma3(tmp_path / "g.gguf"))
    check_tensors(file, config := model_config(file))
    assert (config.head_dim, config.vocab_size, config.sliding[5]) == (32, len(spm_vocab()), False)


BAD_KEYS: dict[str, tuple[Keys, str]] = {
    "unknown architecture": ({"general.architecture": s("gpt5")}, "'gpt5' is not supported yet; supported: llama"),
    "architecture a number": ({"general.architecture": u(3)}, "'general.architecture' must be str, not int"),
    "heads 0": ({"llama.attention.head_count": u(0)}, "'llama.attention.head_count' must lie in"),
    "kv heads 0": ({"llama.attention.head_count_kv": u(0)}, "'llama.attention.head_count_kv' must lie in"),
    "kv heads 3": ({"llama.attention.head_count_kv": u(3)}, "'llama.attention.head_count_kv' is 3"),
    "heads that do not divide": ({"llama.attention.head_count": u(3)}, "'llama.attention.head_count' is 3"),
    "mixed kv heads": (
        {"llama.attention.head_count_kv": items(U32, u32(1), u32(2))},
        "'llama.attention.head_count_kv' holds 2 different values",
    ),
    "no kv heads": ({"llama.attention.head_count_kv": items(U32)}, "'llama.attention.head_count_kv' holds 0"),
    "huge block_count": ({"llama.block_count": u(2**31 - 1)}, "'llama.block_count' is 2147483647, but the file"),
    "negative width": ({"llama.embedding_length": (I32, b"\xff" * 4)}, "'llama.embedding_length' must lie in"),
    "width a string": ({"llama.embedding_length": s("8")}, "'llama.embedding_length' must be int, not str"),
    "width of 2^63": ({"llama.embedding_length": (U64, u64(1 << 63))}, "'llama.embedding_length' must lie in"),
    "eps NaN": ({"llama.attention.layer_norm_rms_epsilon": f(float("nan"))}, "rms_epsilon' must be finite"),
    "eps 0": ({"llama.attention.layer_norm_rms_epsilon": f(0.0)}, "rms_epsilon' must be finite and positive"),
    "eps 1": ({"llama.attention.layer_norm_rms_epsilon": f(1.0)}, "rms_epsilon' must lie in"),
    "rope base 0": ({"llama.rope.freq_base": f(0.0)}, "'llama.rope.freq_base' must be finite and positive"),
    "rope base NaN": ({"llama.rope.freq_base": f(float("nan"))}, "'llama.rope.freq_base' must be finite"),
    "rope odd": ({"llama.rope.dimension_count": u(3)}, "'llama.rope.dimension_count' is 3"),
    "rope too wide": ({"llama.rope.dimension_count": u(6)}, "'llama.rope.dimension_count' is 6"),
    "scaling": (
        {"llama.rope.scaling.type": s("ntk")},
        "'llama.rope.scaling.type' is 'ntk', which is not supported yet",
    ),
    "part of YaRN": (
        {"llama.rope.scaling.type": s("yarn"), "llama.rope.scaling.yarn_ext_factor": f(0.5)},
        "'llama.rope.scaling.yarn_ext_factor' is 0.5",
    ),
    "YaRN's bounds": (
        {"llama.rope.scaling.type": s("yarn"), "llama.rope.scaling.yarn_beta_fast": f(0.5)},
        "'llama.rope.scaling.yarn_beta_fast' is 0.5, which must not be below beta_slow, 1",
    ),
    "YaRN's base": (
        {"llama.rope.scaling.type": s("yarn"), "llama.rope.freq_base": f(1.0)},
        "metadata of llama: YaRN needs a base above 1",
    ),
    "factor 0": ({"llama.rope.scaling.factor": f(0.0)}, "'llama.rope.scaling.factor' must be finite"),
    "experts": ({"llama.expert_count": u(8)}, "'llama.expert_used_count' is missing"),
    "experts used": (
        {"llama.expert_count": u(8), "llama.expert_used_count": u(9)},
        "'llama.expert_used_count' is 9, of 8 experts",
    ),
    "shared experts": ({"llama.expert_shared_count": u(1)}, "'llama.expert_shared_count' is 1: experts that every"),
    "cutoff": ({"llama.hidden_activation_cutoff": f(-0.1)}, "'llama.hidden_activation_cutoff' must be finite and at"),
    "cutoff without ReLU": ({"llama.hidden_activation_cutoff": f(0.5)}, "metadata of llama: cutoff 0.5 has no meaning"),
    "attention scale": ({"llama.attention.scale": f(-1.0)}, "'llama.attention.scale' must be finite and at least 0"),
    "softcap": ({"llama.final_logit_softcapping": f(30.0)}, "'llama.final_logit_softcapping' is 30.0"),
    "ALiBi": ({"llama.attention.max_alibi_bias": f(8.0)}, "'llama.attention.max_alibi_bias' is 8.0: ALiBi is not"),
    "clamping": ({"llama.attention.clamp_kqv": f(6.0)}, "'llama.attention.clamp_kqv' is 6.0"),
    "logit scale": ({"llama.logit_scale": f(0.25)}, "'llama.logit_scale' is 0.25: scaling of logits is not"),
    "residual scale": ({"llama.residual_scale": f(0.5)}, "'llama.residual_scale' is 0.5"),
    "embedding scale": ({"llama.embedding_scale": f(12.0)}, "'llama.embedding_scale' is 12.0"),
    "sigmoid router": ({"llama.expert_gating_func": u(2)}, "'llama.expert_gating_func' is 2: a router by another"),
    "query temperature": ({"llama.attention.temperature_scale": f(0.5)}, "'llama.attention.temperature_scale' is 0.5"),
    "value width": ({"llama.attention.value_length": u(2)}, "'llama.attention.value_length' is 2"),
    "activation": ({"llama.hidden_activation": s("mish")}, "'llama.hidden_activation' is 'mish'"),
    "context 0": ({"llama.context_length": u(0)}, "'llama.context_length' must lie in"),
}


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_key_is_named(tmp_path: Path, name: str) -> None:
    bad, message = BAD_KEYS[name]
    file = write_model(tmp_path / "m.gguf", LLAMA_KEYS | bad)
    with pytest.raises(FormatError) as caught:
        model_config(file)
    assert str(tmp_path / "m.gguf") in str(caught.value) and message in str(caught.value)


def test_keys_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    neutral: Keys = {
        "logit_scale": f(1.0),
        "residual_scale": f(0.0),
        "expert_gating_func": u(1),
        "attention.clamp_kqv": f(0.0),
    }
    keys = LLAMA_KEYS | {f"llama.{name}": value for name, value in neutral.items()}
    found, plain = (model_config(write_model(tmp_path / "m.gguf", one)) for one in (keys, LLAMA_KEYS))
    assert found == plain


@pytest.mark.parametrize("name", LLAMA_KEYS)
def test_missing_key_is_named(tmp_path: Path, name: str) -> None:
    file = write_model(tmp_path / "m.gguf", {k: v for k, v in LLAMA_KEYS.items() if k != name})
    with pytest.raises(FormatError, match=f"'{name}' is missing"):
        model_config(file)


@pytest.mark.parametrize("name", LLAMA_SHAPES)
def test_missing_or_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    keys = LLAMA_KEYS | {"llama.vocab_size": u(5)}
    without = {k: v for k, v in LLAMA_SHAPES.items() if k != name}
    for shapes, problem in ((without, "is missing"), (LLAMA_SHAPES | {name: (7, 8)}, r"has shape \[7, 8\], not")):
        file = write_model(tmp_path / "m.gguf", keys, shapes)
        with pytest.raises(FormatError, match=f"tensor '{name}' {problem}"):
            check_tensors(file, model_config(file))


def test_unexpected_tensors_are_refused(tmp_path: Path) -> None:
    for name in ("blk.0.ffn_up.bias", "blk.0.attn_q_norm.weight", "blk.2.attn_norm.weight"):
        file = write_model(tmp_path / "m.gguf", LLAMA_KEYS, LLAMA_SHAPES | {name: (8,)})
        with pytest.raises(FormatError, match=f"tensor '{name}' is not supported yet for llama"):
            check_tensors(file, model_config(file))


def test_rope_frequency_factors_are_taken_in_their_size(tmp_path: Path) -> None:
    shapes = LLAMA_SHAPES | {"rope_freqs.weight": (2,)}
    file = write_model(tmp_path / "m.gguf", LLAMA_KEYS, shapes)
    check_tensors(file, model_config(file))
    file = write_model(tmp_path / "m.gguf", LLAMA_KEYS, shapes | {"rope_freqs.weight": (8,)})
    with pytest.raises(FormatError, match=r"'rope_freqs\.weight' has shape \[8\], not \[2\]"):
        check_tensors(file, model_config(file))


def test_quantised_norm_is_refused(tmp_path: Path) -> None:
    keys = LLAMA_KEYS | {"llama.embedding_length": u(32)}
    shapes = {name: tuple(32 if n == 8 else n for n in shape) for name, shape in LLAMA_SHAPES.items()}
    file = write_model(tmp_path / "m.gguf", keys, shapes, {"blk.1.ffn_norm.weight": 8})
    with pytest.raises(FormatError, match=r"tensor 'blk\.1\.ffn_norm\.weight' is Q8_0; a norm must be"):
        check_tensors(file, model_config(file))


# Mutated files: sound or one FormatError, never anything else


def load(path: Path) -> None:
    """All that reading a model does before it computes."""
    file = GGUFFile.open(path)
    config = model_config(file)
    check_tensors(file, config)
    for name, shape in expected_tensors(config).items():
        file.vector(name) if len(shape) == 1 else file.tensor(name)


def load_or_refuse(path: Path) -> None:
    try:
        load(path)
    except FormatError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1000


def opt_parts() -> tuple[Keys, Shapes]:
    """LayerNorms, learned positions, biases, and query, key and value stored as one."""
    keys = {name.replace("llama.", "opt.").replace("_rms_", "_"): value for name, value in LLAMA_KEYS.items()}
    block: Shapes = {"attn_qkv.weight": (24, 8), "attn_qkv.bias": (24,), "attn_output.weight": (8, 8)}
    block |= {f"{norm}.{part}": (8,) for norm in ("attn_norm", "ffn_norm") for part in ("weight", "bias")}
    block |= {"ffn_up.weight": (12, 8), "ffn_up.bias": (12,), "ffn_down.weight": (8, 12), "ffn_down.bias": (8,)}
    around: Shapes = {"token_embd.weight": (5, 8), "position_embd.weight": (66, 8)}
    around |= {"output_norm.weight": (8,), "output_norm.bias": (8,)}
    shapes = around | {f"blk.{layer}.{name}": shape for layer in (0, 1) for name, shape in block.items()}
    return keys | {"general.architecture": s("opt")}, shapes


def expert_parts() -> tuple[Keys, Shapes]:
    """Two experts, YaRN and a window."""
    keys = LLAMA_KEYS | {"llama.expert_count": u(2), "llama.expert_used_count": u(1)}
    keys |= {"llama.rope.scaling.type": s("yarn"), "llama.rope.scaling.factor": f(2.0)}
    keys |= {"llama.attention.sliding_window": u(7)}
    ffn: Shapes = {f"ffn_{part}_exps": (2, *BLOCK[f"ffn_{part}"]) for part in ("gate", "up", "down")}
    ffn |= {"ffn_gate_inp": (2, 8)}
    shapes = {name: shape for name, shape in LLAMA_SHAPES.items() if ".ffn_" not in name or "norm" in name}
    return keys, shapes | {f"blk.{layer}.{name}.weight": shape for layer in (0, 1) for name, shape in ffn.items()}


@pytest.fixture(scope="module", params=["llama", "gemma3", "opt", "experts"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, int]:
    """A path to overwrite, a sound file's bytes, and where its weights begin."""
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    keys, shapes = (LLAMA_KEYS, LLAMA_SHAPES)
    if request.param == "opt":
        keys, shapes = opt_parts()
    elif request.param == "experts":
        keys, shapes = expert_parts()
    elif request.param == "gemma3":
        keys = {name: value for name, value in GEMMA3_KEYS.items() if "key_length" not in name}
        extra = {"attn_q_norm": (4,), "attn_k_norm": (4,), "post_attention_norm": (8,), "post_ffw_norm": (8,)}
        shapes = shapes | {f"blk.{i}.{name}.weight": shape for i in (0, 1) for name, shape in extra.items()}
    tokens = items(STRING, *(text(c) for c in "abcde"))
    file = write_model(path, keys | {"tokenizer.ggml.tokens": tokens}, shapes)
    start = min(info.offset for info in file.tensors.values())
    load(path)
    return path, path.read_bytes(), start


@pytest.mark.parametrize("mutate", [lambda byte: byte ^ 0xFF, lambda byte: byte ^ 1, lambda byte: byte ^ 0x80])
def test_every_header_byte_flipped(sound: tuple[Path, bytes, int], mutate: Callable[[int], int]) -> None:
    path, data, start = sound
    with path.open("r+b") as out:
        out.write(data)
        for at in range(start):
            out.seek(at)
            out.write(bytes([mutate(data[at])]))
            out.flush()
            load_or_refuse(path)
            out.seek(at)
            out.write(data[at : at + 1])


INTERESTING = st.sampled_from([0, 1, 3, 9, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]).map(u64)
PATCHES = st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=12) | INTERESTING), max_size=6)


@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    patches=PATCHES, cut=st.none() | st.integers(0, 8000), doubled=st.tuples(st.integers(0, 4000), st.integers(0, 64))
)
def test_mutated_files(sound: tuple[Path, bytes, int], patches: Any, cut: int | None, doubled: tuple[int, int]) -> None:
    path, data, start = sound
    at, n = doubled[0] % start, doubled[1]
    broken = bytearray(data[: at + n] + data[at:])
    for position, patch in patches:
        broken[position % start : position % start + len(patch)] = patch
    path.write_bytes(broken[:cut])
    load_or_refuse(path)
