"""What a config.json says, under GGUF's keys; what it asks for and is not implemented is an error, never ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pinfer.formats.errors import shown
from pinfer.formats.huggingface.families import (
    FAMILIES,
    MODEL_TYPE,
    SOFTCAPS,
    Family,
    Field,
    dims_of,
    tensors_of,
)
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.huggingface.names import Dims, Link
from pinfer.formats.huggingface.rope import RopeReader, Vectors, number

MAX_COUNT = 2**31 - 1
MAX_LAYERS = 4096
# config.json's functions under the names of `ModelConfig.activation`.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "fatrelu": "relu",
}
_SLIDING, _FULL = "sliding_attention", "full_attention"
_OPT_EPSILON = 1e-5
_GEMMA_HEAD_DIM = 256
_PHI3_ORIGINAL = 4096
_WITH_IMAGES = "gemma3"  # whose text part, text_config, is a gemma3_text


@dataclass(frozen=True)
class Described:
    """A model by its config.json: GGUF's metadata, tensors that follow from it, the tensors it has."""

    family: Family
    metadata: dict[str, Any]
    vectors: Vectors
    tensors: tuple[Link, ...]
    dims: Dims
    tied: bool
    with_images: bool  # the tensors are the text part of a model that reads images too


def describe(config: Node) -> Described:
    """FormatError naming config.json and the field that is missing, wrong, or asks for what is not implemented."""
    with_images = config.at("model_type").value == _WITH_IMAGES
    if with_images:
        _refuse_quantised(config)
        config = config.at("text_config")
    family = _find_family(config)
    for name, values in family.neutral.items():
        node = config.at(name)
        if node.value is not None and node.value not in values:
            raise node.fault(f"is {shown(repr(node.value))}, which is not supported for {family.model_type}")
    read = _Reader(config, family)
    metadata = {"general.architecture": family.architecture, MODEL_TYPE: family.model_type} | read.fields()
    read.check(metadata)
    dims = dims_of(metadata, family)
    metadata |= read.activation() | read.own(dims)
    vectors: Vectors = {}
    if family.default_theta is not None:
        rope = RopeReader(config, family.architecture, dims.head_dim, metadata[read.key("context_length")])
        if family.model_type == "gemma3_text":
            rope.read_two(family.default_theta, 10000.0)
        else:
            rope.read(family.default_theta)
        metadata |= rope.metadata
        vectors = rope.vectors
    tied = with_images or config.get("tie_word_embeddings", bool, family.tied)
    return Described(family, metadata, vectors, tensors_of(family, read.two_norms()), dims, tied, with_images)


def _refuse_quantised(config: Node) -> None:
    quantised = config.at("quantization_config")
    if quantised.value is not None:
        method = quantised.at("quant_method").value
        raise quantised.fault(
            f"quant_method is {shown(str(method))}: weights that another library has quantised are not supported; "
            "take the model's unquantised folder, or a GGUF"
        )


def _find_family(config: Node) -> Family:
    _refuse_quantised(config)
    model_type = config.get("model_type", str)
    if model_type is None:
        raise config.fault("model_type is missing")
    if model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, _WITH_IMAGES))
        raise config.fault(f"model_type is {shown(model_type)}, which is not supported; {known} are")
    return FAMILIES[model_type]


class _Reader:
    """Reads the fields of one config.json."""

    def __init__(self, config: Node, family: Family) -> None:
        self.config, self.family = config, family

    def key(self, name: str) -> str:
        return f"{self.family.architecture}.{name}"

    def fields(self) -> dict[str, Any]:
        values = {}
        for one in self.family.fields:
            value = self._value(one)
            if value is not None:
                values[self.key(one.gguf)] = value
        values.setdefault(self.key("attention.head_count_kv"), self._kv_heads(values))
        if self.family.model_type == "falcon":
            values.setdefault(self.key("feed_forward_length"), 4 * values[self.key("embedding_length")])
        usual = _GEMMA_HEAD_DIM if self.family.model_type.startswith("gemma") else None
        if self.family.head_dim and (head_dim := self._count("head_dim") or usual) is not None:
            values |= dict.fromkeys((self.key("attention.key_length"), self.key("attention.value_length")), head_dim)
        return values

    def check(self, metadata: Mapping[str, Any]) -> None:
        """FormatError for sizes that do not go together, or that no file of tensors could have."""
        for name in ("block_count", "expert_count"):
            if (value := metadata.get(self.key(name), 1)) > MAX_LAYERS:
                where = next(one.folder for one in self.family.fields if one.gguf == name)
                raise self.config.at(where).fault(f"is {value}; at most {MAX_LAYERS} are supported")
        heads, width = metadata[self.key("attention.head_count")], metadata[self.key("embedding_length")]
        kv_heads = metadata[self.key("attention.head_count_kv")]
        if heads % kv_heads:
            raise self.config.at("num_attention_heads").fault(f"is {heads}, no multiple of the {kv_heads} kv heads")
        head_dim = metadata.get(self.key("attention.key_length"))
        if head_dim is None and width % heads:
            raise self.config.at("hidden_size").fault(f"is {width}, no multiple of the {heads} heads")
        if (head_dim or width // heads) % 2:
            raise self.config.at("hidden_size").fault(
                f"gives heads of {head_dim or width // heads}, which must be even"
            )

    def two_norms(self) -> bool:
        """Whether attention and FFN of a Falcon have a norm each."""
        new = self.config.get("new_decoder_architecture", bool, False)
        return new and self._count("num_ln_in_parallel_attn") != 1

    def _value(self, one: Field) -> Any:
        name = one.folder
        if one.other is not None and self.config.at(name).value is None:
            name = one.other
        node = self.config.at(name)
        if one.missing is not None and one.folder not in (self.config.value or {}):
            return one.missing
        if node.value is None:
            if one.default is None and not one.optional:
                raise node.fault("is missing")
            return one.default
        if one.kind is int:
            return self._count(name)
        if one.kind is float:
            value = number(node)
            if not (math.isfinite(value) and value > 0):
                raise node.fault(f"is {value:g}; it must be finite and positive")
            return value
        return node.as_(one.kind)

    def _count(self, name: str) -> int | None:
        node = self.config.at(name)
        value = node.as_(int)
        if value is not None and not 1 <= value <= MAX_COUNT:
            raise node.fault(f"is {value}; it must lie in [1, {MAX_COUNT}]")
        return value

    def _kv_heads(self, values: Mapping[str, Any]) -> int:
        """Falcon states them in three ways; elsewhere there are as many as heads."""
        heads = values[self.key("attention.head_count")]
        if self.family.model_type != "falcon":
            return heads
        if self.config.get("multi_query", bool, True) and not self.config.get("new_decoder_architecture", bool, False):
            return 1
        return self._count("num_kv_heads") or heads

    def activation(self) -> dict[str, Any]:
        """`hidden_activation` where it is not the architecture's own, and FATReLU's threshold."""
        node = self.config.at(self.family.activation_field)
        if node.value is None and self.family.activation_field == "hidden_activation":
            node = self.config.at("hidden_act")
        stated = node.as_(str)
        if stated is None or (self.family.activation == "drelu" and stated in ("relu", "drelu")):
            return {}
        if stated not in ACTIVATIONS:
            raise node.fault(f"is {shown(stated)}, which is not supported; {', '.join(ACTIVATIONS)} are")
        found: dict[str, Any] = {}
        if ACTIVATIONS[stated] != self.family.activation:
            found["hidden_activation"] = ACTIVATIONS[stated]
        if stated == "fatrelu":
            cutoff = self.config.at("hidden_act_param")
            value = 0.0 if cutoff.value is None else number(cutoff)
            if not (math.isfinite(value) and value >= 0):
                raise cutoff.fault(f"is {value:g}; it must be finite and at least 0")
            found["hidden_activation_cutoff"] = value
        return {self.key(name): value for name, value in found.items()}

    def own(self, dims: Dims) -> dict[str, Any]:
        """What single families state."""
        kind, found = self.family.model_type, dict[str, Any]()
        if kind.startswith("gemma"):
            found |= self._gemma(dims)
        elif kind == "phi3":
            original = self._count("original_max_position_embeddings") or _PHI3_ORIGINAL
            found |= {"rope.scaling.original_context_length": original}
            found |= {"attention.sliding_window": self._count("sliding_window") or 0}
        elif kind == "falcon":
            found |= {"tensor_data_layout": "jploski"}
        elif kind == "opt":
            found |= {"attention.layer_norm_epsilon": _OPT_EPSILON}
            if self._count("word_embed_proj_dim") not in (None, dims.letters["D"]):
                raise self.config.at("word_embed_proj_dim").fault("is not hidden_size, which is not supported")
        return {self.key(name): value for name, value in found.items()}

    def _gemma(self, dims: Dims) -> dict[str, Any]:
        """Which layers slide, and what scores are scaled by where it is not the head's width."""
        found: dict[str, Any] = {"attention.sliding_window_pattern": self._sliding(dims.n_layers)}
        node = self.config.at("query_pre_attn_scalar")
        width = float(_GEMMA_HEAD_DIM) if node.value is None else number(node)
        if not (math.isfinite(width) and width > 0):
            raise node.fault(f"is {width:g}; it must be finite and positive")
        if width != dims.head_dim:
            found["attention.scale"] = width**-0.5
        if self.family.model_type == "gemma2":
            for one in SOFTCAPS:
                if self.config.at(one.folder).value is None:
                    found[one.gguf] = 0.0
        return found

    def _sliding(self, n_layers: int) -> list[bool]:
        stated = [(node, node.as_(str)) for node in self.config.at("layer_types").items()]
        if not stated:
            usual = 2 if self.family.model_type == "gemma2" else 6
            period = self._count("sliding_window_pattern") or self._count("_sliding_window_pattern") or usual
            return [bool((layer + 1) % period) for layer in range(n_layers)]
        for node, kind in stated:
            if kind not in (_SLIDING, _FULL):
                raise node.fault(f"is {shown(str(kind))}; {_SLIDING} and {_FULL} are supported")
        if len(stated) != n_layers:
            raise self.config.at("layer_types").fault(f"has {len(stated)} items for {n_layers} layers")
        return [kind == _SLIDING for _, kind in stated]
