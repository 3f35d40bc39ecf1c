"""One reader an architecture: its keys, defaults and conventions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pinfer.config import ExpertsConfig, ModelConfig, RopeConfig
from pinfer.formats.errors import FormatError, shown
from pinfer.formats.model_config.keys import Keys
from pinfer.formats.model_config.rope import read_rope
from pinfer.formats.model_file import ModelFile

_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62
_OPT_POSITION_OFFSET = 2

# Keys that some architecture of llama.cpp computes by, and none here: the values that change nothing, and what they ask for.
_UNSUPPORTED: tuple[tuple[str, type[Any], tuple[object, ...], str], ...] = (
    ("attention.causal", bool, (True,), "attention to later tokens is"),
    ("attention.max_alibi_bias", float, (0.0,), "ALiBi is"),
    ("attention.clamp_kqv", float, (0.0,), "clamping of queries, keys and values is"),
    ("attention.output_scale", float, (0.0, 1.0), "scaling of attention's output is"),
    ("attention.temperature_scale", float, (0.0,), "scaling of queries by position is"),
    ("attention.shared_kv_layers", int, (0,), "sharing of keys among layers is"),
    ("logit_scale", float, (0.0, 1.0), "scaling of logits is"),
    ("residual_scale", float, (0.0, 1.0), "scaling of what layers add is"),
    ("embedding_scale", float, (0.0, 1.0), "a stated scale of embeddings is"),
    ("router_logit_softcapping", float, (0.0,), "capping of the router is"),
    ("expert_gating_func", int, (0, 1), "a router by another function than softmax is"),
    ("rope.scaling.alpha", float, (0.0,), "scaling of rope's base is"),
)

Reader = Callable[[Keys], ModelConfig]


def model_config(file: ModelFile) -> ModelConfig:
    """The model that a file's metadata describes.

    Raises FormatError naming the key that is missing, mistyped, out of range, or asks for
    something that is not supported. Says nothing about the tensors: see `check_tensors`.
    """
    keys = Keys(file)
    if keys.architecture not in READERS:
        supported = ", ".join(READERS)
        raise file.error(f"architecture {shown(keys.architecture)} is not supported yet; supported: {supported}")
    for key, kind, neutral, what in _UNSUPPORTED:
        keys.refuse(key, kind, neutral, what)
    if keys.architecture != "gemma2":
        keys.refuse("attn_logit_softcapping", float, (0.0,), "capping of attention scores is")
        keys.refuse("final_logit_softcapping", float, (0.0,), "capping of logits is")
    try:
        return READERS[keys.architecture](keys)
    except FormatError:
        raise
    except ValueError as error:  # what ModelConfig found wrong with the values together
        raise file.error(f"metadata of {keys.architecture}: {error}") from None


def _llama(keys: Keys) -> ModelConfig:
    """Llama 1 to 3, CodeLlama, Mistral; ReLULLaMA, ProSparse and TurboSparse by `hidden_activation`; Mixtral."""
    shape = _shape(keys)
    rope = read_rope(keys, shape["head_dim"], "interleaved")
    return ModelConfig(**shape, activation=keys.activation("silu"), rope=rope, experts=_experts(keys))


def _bamboo(keys: Keys) -> ModelConfig:
    shape = _shape(keys)
    return ModelConfig(
        **shape, activation=keys.activation("drelu"), rope=read_rope(keys, shape["head_dim"], "interleaved")
    )


def _neox(keys: Keys) -> ModelConfig:
    """Qwen 2, Qwen 3 and Phi-3: llama with dimensions paired over halves; their biases and norms are in the tensors."""
    shape = _shape(keys)
    rope = read_rope(keys, shape["head_dim"], "halves")
    return ModelConfig(**shape, activation=keys.activation("silu"), rope=rope)


def _qwen3moe(keys: Keys) -> ModelConfig:
    """Qwen 3 with experts, whose neurons have a key of their own."""
    experts = _experts(keys)
    if experts is None:
        raise keys.error("expert_count", "is missing")
    stated = keys.has("expert_feed_forward_length")
    neurons = keys.count("expert_feed_forward_length") if stated else keys.count("feed_forward_length") // experts.used
    shape = _shape(keys, d_ffn=neurons)
    rope = read_rope(keys, shape["head_dim"], "halves")
    return ModelConfig(**shape, activation=keys.activation("silu"), rope=rope, experts=experts)


def _gemma2(keys: Keys) -> ModelConfig:
    shape = _shape(keys, window=4096, period=2)
    return ModelConfig(
        **shape | _gemma_scales(keys, shape, _GEMMA2_27B_LAYERS),
        activation=keys.activation("gelu_tanh"),
        rope=read_rope(keys, shape["head_dim"], "halves"),
        attention_softcap=keys.at_least_zero("attn_logit_softcapping", 50.0) or None,
        logit_softcap=keys.at_least_zero("final_logit_softcapping", 30.0) or None,
    )


def _gemma3(keys: Keys) -> ModelConfig:
    shape = _shape(keys, period=6)
    rope = read_rope(keys, shape["head_dim"], "halves", base=1e6)
    local_base = keys.positive("rope.freq_base_swa", keys.positive("rope.local.freq_base", 10000.0))
    return ModelConfig(
        **shape | _gemma_scales(keys, shape, _GEMMA3_27B_LAYERS),
        activation=keys.activation("gelu_tanh"),
        rope=rope,
        rope_local=RopeConfig(rope.dim, local_base, rope.style),
    )


def _gemma_scales(keys: Keys, shape: dict[str, Any], layers_of_27b: int) -> dict[str, Any]:
    """Scores are scaled by the head's width, in the 27B models by the residual's over the heads; embeddings too."""
    d_model, n_heads = shape["d_model"], shape["n_heads"]
    width = d_model // n_heads if shape["n_layers"] == layers_of_27b else shape["head_dim"]
    scale = shape["attention_scale"] or width**-0.5
    return {"attention_scale": scale, "embedding_scale": math.sqrt(d_model)}


def _falcon(keys: Keys) -> ModelConfig:
    """Falcon 7B and 40B; trained with the exact GELU, which llama.cpp replaces by the tanh form."""
    shape = _shape(keys)
    rope = read_rope(keys, shape["head_dim"], "halves")
    return ModelConfig(**shape, activation=keys.activation("gelu"), rope=rope, gated=False, norm="layer")


def _opt(keys: Keys) -> ModelConfig:
    """OPT with norms before its layers, as all but the one of 350M have them; architecture name and keys of PowerInfer."""
    return ModelConfig(
        **_shape(keys),
        activation=keys.activation("relu"),
        rope=None,
        gated=False,
        norm="layer",
        position_offset=_OPT_POSITION_OFFSET,
    )


READERS: dict[str, Reader] = {
    "llama": _llama,
    "qwen2": _neox,
    "qwen3": _neox,
    "qwen3moe": _qwen3moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _neox,
    "falcon": _falcon,
    "opt": _opt,
    "bamboo": _bamboo,
}
_LAYER_NORM = ("falcon", "opt")


def _shape(keys: Keys, *, d_ffn: int | None = None, window: int = 0, period: int | None = None) -> dict[str, Any]:
    """The fields of ModelConfig that all architectures spell alike; `window` and `period` as in `_windows`."""
    d_model, n_heads = keys.count("embedding_length"), keys.count("attention.head_count")
    n_kv_heads = keys.count("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        raise keys.error("attention.head_count_kv", f"is {n_kv_heads}, which does not divide the {n_heads} heads")
    epsilon = "layer_norm_epsilon" if keys.architecture in _LAYER_NORM else "layer_norm_rms_epsilon"
    n_layers = _layers(keys)
    return {
        "architecture": keys.architecture,
        "name": keys.file.get("general.name", str, keys.file.path.stem),
        "n_layers": n_layers,
        "d_model": d_model,
        "d_ffn": keys.count("feed_forward_length") if d_ffn is None else d_ffn,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": _head_dim(keys, d_model, n_heads),
        "vocab_size": _vocab_size(keys),
        "context_length": keys.count("context_length"),
        "norm_eps": keys.fraction(f"attention.{epsilon}"),
        "cutoff": keys.at_least_zero("hidden_activation_cutoff"),
        "attention_scale": keys.at_least_zero("attention.scale"),
        **_windows(keys, n_layers, window, period),
    }


def _layers(keys: Keys) -> int:
    n_layers, n_tensors = keys.count("block_count"), len(keys.file.tensors)
    if n_layers > n_tensors:
        raise keys.error("block_count", f"is {n_layers}, but the file has only {n_tensors} tensors")
    return n_layers


def _head_dim(keys: Keys, d_model: int, n_heads: int) -> int:
    if not keys.has("attention.key_length") and d_model % n_heads:
        raise keys.error("attention.head_count", f"is {n_heads}, which does not divide embedding_length {d_model}")
    head_dim = keys.count("attention.key_length", max(1, d_model // n_heads))
    value_dim = keys.count("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise keys.error("attention.value_length", f"is {value_dim}; other than key_length {head_dim} is not supported")
    return head_dim


def _vocab_size(keys: Keys) -> int:
    """As stated, else the tokenizer's, else the embedding's rows."""
    file = keys.file
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    stated = len(tokens) if isinstance(tokens, list) else 0
    return keys.count("vocab_size", stated or file.info("token_embd.weight").shape[0])


def _windows(keys: Keys, n_layers: int, window: int, period: int | None) -> dict[str, Any]:
    """The sliding window, `window` where none is stated and none at 0, and which layers have it.

    As a list states, or all but the last of every period; without either, all layers where `period` is None.
    """
    window = keys.count("attention.sliding_window", window, least=0)
    if not window:
        return {}
    key = "attention.sliding_window_pattern"
    if keys.is_list(key):
        listed = keys.file.get_list(keys.name(key), bool)
        if len(listed) != n_layers:
            raise keys.error(key, f"holds {len(listed)} values for {n_layers} layers")
        return {"sliding_window": window, "sliding": tuple(listed)}
    if period is None and not keys.has(key):
        return {"sliding_window": window, "sliding": (True,) * n_layers}
    period = keys.count(key, period)
    return {"sliding_window": window, "sliding": tuple(layer % period < period - 1 for layer in range(n_layers))}


def _experts(keys: Keys) -> ExpertsConfig | None:
    """The mixture of experts of a file that states their number; llama.cpp always normalises for these architectures."""
    keys.refuse("expert_shared_count", int, (0,), "experts that every token goes to are")
    keys.refuse("expert_group_count", int, (0,), "groups of experts are")
    count = keys.count("expert_count", 0, least=0)
    if not count:
        return None
    used = keys.count("expert_used_count")
    if used > count:
        raise keys.error("expert_used_count", f"is {used}, of {count} experts")
    normalised = keys.file.get(keys.name("expert_weights_norm"), bool, True)
    return ExpertsConfig(count, used, normalised, keys.positive("expert_weights_scale", 1.0))
