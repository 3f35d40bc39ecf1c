"""From a GGUF file's metadata to a `ModelConfig`, and the check that its tensors fit it.

Key names, defaults and conventions follow llama.cpp's loaders of the same architectures. What
would change the result and is not implemented (mixture of experts, YaRN, biases, logit caps) is
an error, never ignored.
"""

from __future__ import annotations

import math
from typing import Any, cast, get_args

from pinfer.config import Activation, ModelConfig, RopeConfig, RopeStyle
from pinfer.formats.errors import FormatError, shown
from pinfer.formats.model_file import FLOAT_DTYPES, ModelFile

# Some files carry Hugging Face's name of the same function.
_ACTIVATION_NAMES = {"gelu_pytorch_tanh": "gelu_tanh", "swish": "silu", "relu_squared": "relu2"}
_GEMMA3_SLIDING_PERIOD = 6
_GEMMA3_27B_LAYERS = 62
_LARGEST_COUNT = 2**31 - 1


class _Keys:
    """The metadata keys of one architecture, checked as they are read."""

    def __init__(self, file: ModelFile) -> None:
        self.file = file
        self.architecture = file.architecture

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def error(self, key: str, problem: str) -> FormatError:
        return self.file.error(f"metadata key {shown(self.name(key))} {problem}")

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of at least `least`; a list with one value for every layer counts as that value."""
        name = self.name(key)
        if isinstance(self.file.metadata.get(name), list):
            value = self._uniform(key)
        else:
            value = self.file.get(name, int) if default is None else self.file.get(name, int, default)
        if not least <= value <= _LARGEST_COUNT:
            raise self.error(key, f"must lie in [{least}, {_LARGEST_COUNT}], not {value}")
        return value

    def _uniform(self, key: str) -> int:
        values = set(self.file.get_list(self.name(key), int))
        if len(values) != 1:
            raise self.error(key, f"holds {len(values)} different values; layers that differ are not supported yet")
        return values.pop()

    def positive(self, key: str, default: float | None = None) -> float:
        name = self.name(key)
        value = self.file.get(name, float) if default is None else self.file.get(name, float, default)
        if not (math.isfinite(value) and value > 0):
            raise self.error(key, f"must be finite and positive, not {value}")
        return value

    def refuse(self, key: str, kind: type[Any], neutral: object, what: str) -> None:
        """Fail if `key` is there with any but its `neutral` value."""
        value = self.file.get(self.name(key), kind, neutral)
        if value != neutral:
            raise self.error(key, f"is {value}: {what} not supported yet")


def model_config(file: ModelFile) -> ModelConfig:
    """The model that a file's metadata describes.

    Raises FormatError naming the key that is missing, mistyped, out of range, or asks for
    something that is not supported. Says nothing about the tensors: see `check_tensors`.
    """
    keys = _Keys(file)
    if keys.architecture not in _READERS:
        supported = ", ".join(_READERS)
        raise file.error(f"architecture {shown(keys.architecture)} is not supported yet; supported: {supported}")
    keys.refuse("expert_count", int, 0, "mixture of experts is")
    keys.refuse("attention.causal", bool, True, "attention to later tokens is")
    keys.refuse("attn_logit_softcapping", float, 0.0, "capping of attention scores is")
    keys.refuse("final_logit_softcapping", float, 0.0, "capping of logits is")
    try:
        return _READERS[keys.architecture](keys)
    except FormatError:
        raise
    except ValueError as error:  # what ModelConfig found wrong with the values together
        raise file.error(f"metadata of {keys.architecture}: {error}") from None


def _llama(keys: _Keys) -> ModelConfig:
    shape = _shape(keys)
    rope = _rope(keys, shape["head_dim"], "interleaved", base=10000.0)
    return ModelConfig(**shape, activation=_activation(keys, "silu"), rope=rope)


def _gemma3(keys: _Keys) -> ModelConfig:
    shape = _shape(keys)
    d_model, head_dim = shape["d_model"], shape["head_dim"]
    rope = _rope(keys, head_dim, "halves", base=1e6)
    local_base = keys.positive("rope.freq_base_swa", keys.positive("rope.local.freq_base", 10000.0))
    window = keys.count("attention.sliding_window", 0, least=0)
    score_dim = d_model // shape["n_heads"] if shape["n_layers"] == _GEMMA3_27B_LAYERS else head_dim
    return ModelConfig(
        **shape,
        activation=_activation(keys, "gelu_tanh"),
        rope=rope,
        rope_local=RopeConfig(rope.dim, local_base, rope.style),
        sliding_window=window or None,
        sliding=_sliding(keys, shape["n_layers"]) if window else (),
        attention_scale=score_dim**-0.5,
        embedding_scale=math.sqrt(d_model),
    )


_READERS = {"llama": _llama, "gemma3": _gemma3}


def _shape(keys: _Keys) -> dict[str, Any]:
    """The fields of ModelConfig that both architectures spell alike."""
    d_model, n_heads = keys.count("embedding_length"), keys.count("attention.head_count")
    n_kv_heads = keys.count("attention.head_count_kv", n_heads)
    if n_heads % n_kv_heads:
        raise keys.error("attention.head_count_kv", f"is {n_kv_heads}, which does not divide the {n_heads} heads")
    return {
        "architecture": keys.architecture,
        "name": keys.file.get("general.name", str, keys.file.path.stem),
        "n_layers": _layers(keys),
        "d_model": d_model,
        "d_ffn": keys.count("feed_forward_length"),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": _head_dim(keys, d_model, n_heads),
        "vocab_size": _vocab_size(keys),
        "context_length": keys.count("context_length"),
        "norm_eps": _norm_eps(keys),
    }


def _layers(keys: _Keys) -> int:
    n_layers, n_tensors = keys.count("block_count"), len(keys.file.tensors)
    if n_layers > n_tensors:
        raise keys.error("block_count", f"is {n_layers}, but the file has only {n_tensors} tensors")
    return n_layers


def _head_dim(keys: _Keys, d_model: int, n_heads: int) -> int:
    if keys.name("attention.key_length") not in keys.file.metadata and d_model % n_heads:
        raise keys.error("attention.head_count", f"is {n_heads}, which does not divide embedding_length {d_model}")
    head_dim = keys.count("attention.key_length", max(1, d_model // n_heads))
    value_dim = keys.count("attention.value_length", head_dim)
    if value_dim != head_dim:
        raise keys.error("attention.value_length", f"is {value_dim}; other than key_length {head_dim} is not supported")
    return head_dim


def _vocab_size(keys: _Keys) -> int:
    """As stated, else the tokenizer's, else the embedding's rows."""
    file = keys.file
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    stated = len(tokens) if isinstance(tokens, list) else 0
    return keys.count("vocab_size", stated or file.info("token_embd.weight").shape[0])


def _norm_eps(keys: _Keys) -> float:
    key = "attention.layer_norm_rms_epsilon"
    eps = keys.positive(key)
    if eps >= 1:
        raise keys.error(key, f"must lie in (0, 1), not {eps}")
    return eps


def _activation(keys: _Keys, default: str) -> Activation:
    """From our own key `hidden_activation`, which ReLU models need: llama.cpp has none for them."""
    stated = keys.file.get(keys.name("hidden_activation"), str, default)
    value = _ACTIVATION_NAMES.get(stated, stated)
    if value not in get_args(Activation):
        known = ", ".join(get_args(Activation))
        raise keys.error("hidden_activation", f"is {shown(stated)}, which is not supported yet; {known} are")
    return cast(Activation, value)


def _rope(keys: _Keys, head_dim: int, style: RopeStyle, base: float) -> RopeConfig:
    dim = keys.count("rope.dimension_count", head_dim)
    if dim > head_dim or dim % 2:
        raise keys.error("rope.dimension_count", f"is {dim}; it must be even and at most the head's {head_dim}")
    return RopeConfig(dim, keys.positive("rope.freq_base", base), style, _rope_scale(keys))


def _rope_scale(keys: _Keys) -> float:
    """Linear scaling's factor; a file may state the factor alone, under a new key or an old one."""
    kind = keys.file.get(keys.name("rope.scaling.type"), str, "linear")
    if kind == "none":
        return 1.0
    if kind != "linear":
        raise keys.error("rope.scaling.type", f"is {shown(kind)}, which is not supported yet; none and linear are")
    return keys.positive("rope.scaling.factor", keys.positive("rope.scale_linear", 1.0))


def _sliding(keys: _Keys, n_layers: int) -> tuple[bool, ...]:
    """Which layers slide: as a list states, or all but the last of every period."""
    key = "attention.sliding_window_pattern"
    if isinstance(keys.file.metadata.get(keys.name(key)), list):
        listed = keys.file.get_list(keys.name(key), bool)
        if len(listed) != n_layers:
            raise keys.error(key, f"holds {len(listed)} values for {n_layers} layers")
        return tuple(listed)
    period = keys.count(key, _GEMMA3_SLIDING_PERIOD)
    return tuple(layer % period < period - 1 for layer in range(n_layers))


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape `[rows, columns]` or `[n]` of every tensor a model needs, in its own order."""
    d_model, head_dim = config.d_model, config.head_dim
    block = {
        "attn_norm": (d_model,),
        "attn_q": (config.n_heads * head_dim, d_model),
        "attn_k": (config.n_kv_heads * head_dim, d_model),
        "attn_v": (config.n_kv_heads * head_dim, d_model),
        "attn_output": (d_model, config.n_heads * head_dim),
        "ffn_norm": (d_model,),
        "ffn_gate": (config.d_ffn, d_model),
        "ffn_up": (config.d_ffn, d_model),
        "ffn_down": (d_model, config.d_ffn),
    }
    if config.architecture == "gemma3":
        block |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        block |= {"post_attention_norm": (d_model,), "post_ffw_norm": (d_model,)}
    expected: dict[str, tuple[int, ...]] = {"token_embd.weight": (config.vocab_size, d_model)}
    for layer in range(config.n_layers):
        expected |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    expected["output_norm.weight"] = (d_model,)
    return expected


def check_tensors(file: ModelFile, config: ModelConfig) -> None:
    """Check that a file holds exactly the model's tensors in their shapes; reads no weights.

    `output.weight` may be absent: the output matrix is then the embedding. `rope_freqs.weight`
    (Llama 3.1's frequency factors) may be there for llama. Raises FormatError
    naming the first tensor that is missing, misshapen, not of floats where it must be, or unknown
    (an ignored bias would silently change the model).
    """
    expected = expected_tensors(config)
    if file.has("output.weight"):
        expected["output.weight"] = (config.vocab_size, config.d_model)
    if file.has("rope_freqs.weight") and config.architecture == "llama":
        expected["rope_freqs.weight"] = (config.rope.dim // 2,)
    for name, shape in expected.items():
        info = file.info(name)
        if info.shape != shape:
            raise file.error(f"tensor {shown(name)} has shape {list(info.shape)}, not {list(shape)}")
        if len(shape) == 1 and info.type not in FLOAT_DTYPES:
            raise file.error(f"tensor {shown(name)} is {info.type}; a norm must be F32, F16 or BF16")
    for name in file.tensors:
        if name not in expected:
            raise file.error(f"tensor {shown(name)} is not supported yet for {config.architecture}")
