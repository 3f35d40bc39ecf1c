"""The families of folders that are read and written, as tables.

A family is a table of fields that both spell alike, settings that must have one value as nothing else is implemented,
and its tensors (`names.py`). Fields, defaults and conventions are those of the transformers classes of the same name;
SparseLLM's ProSparse and SJTU's Bamboo and TurboSparse come with code of their own and are read by what they publish.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pinfer.formats.huggingface import names
from pinfer.formats.huggingface.names import Dims, Link

MODEL_TYPE = "pinfer.model_type"  # of config.json, where GGUF has one architecture for several
OPT_OFFSET = 2  # rows of OPT's positions before the first


@dataclass(frozen=True)
class Field:
    """A value that both have: `default` where it is missing or null, `missing` where it is not even null; `optional`
    ones may be neither."""

    folder: str
    gguf: str
    kind: type = int
    default: Any = None
    optional: bool = False
    missing: Any = None
    other: str | None = None  # a second name of the same field


@dataclass(frozen=True)
class Family:
    """One `model_type`. `default_theta` None is a family without rotary embeddings."""

    model_type: str
    class_name: str
    architecture: str
    tensors: tuple[Link, ...]
    fields: tuple[Field, ...]
    activation: str  # the architecture's own
    activation_field: str = "hidden_act"
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    tied: bool = False  # where config.json does not say
    default_theta: float | None = 10000.0
    head_dim: bool = True  # whether config.json has the field


_SHAPE = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "embedding_length"),
    Field("num_hidden_layers", "block_count"),
    Field("num_attention_heads", "attention.head_count"),
)
_RMS = Field("rms_norm_eps", "attention.layer_norm_rms_epsilon", float, 1e-6)
_CONTEXT = Field("max_position_embeddings", "context_length", default=2048)
_KV = Field("num_key_value_heads", "attention.head_count_kv", optional=True)
_NEURONS = Field("intermediate_size", "feed_forward_length")
_WINDOW = Field("sliding_window", "attention.sliding_window", optional=True)
_USUAL_WINDOW = Field("sliding_window", "attention.sliding_window", optional=True, missing=4096)
_GATED = (*_SHAPE, _KV, _NEURONS, _CONTEXT, _RMS)
# A model of images and text states of its text part only what is not usual.
_GEMMA3 = (
    Field("vocab_size", "vocab_size", default=262208),
    Field("hidden_size", "embedding_length", default=2304),
    Field("num_hidden_layers", "block_count", default=26),
    Field("num_attention_heads", "attention.head_count", default=8),
    Field("num_key_value_heads", "attention.head_count_kv", default=4),
    Field("intermediate_size", "feed_forward_length", default=9216),
    Field("max_position_embeddings", "context_length", default=131072),
    _RMS,
)
_EXPERTS = Field("num_experts_per_tok", "expert_used_count")
SOFTCAPS = (
    Field("attn_logit_softcapping", "attn_logit_softcapping", float, optional=True),
    Field("final_logit_softcapping", "final_logit_softcapping", float, optional=True),
)
_NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
_NO_WINDOW = {"use_sliding_window": (False,)}

FAMILIES: dict[str, Family] = {
    one.model_type: one
    for one in (
        Family("llama", "LlamaForCausalLM", "llama", names.LLAMA, _GATED, "silu", neutral=_NO_BIAS),
        Family("sparsellama", "SparseLlamaForCausalLM", "llama", names.LLAMA, _GATED, "silu", neutral=_NO_BIAS),
        Family("mistral", "MistralForCausalLM", "llama", names.LLAMA, (*_GATED, _USUAL_WINDOW), "silu"),
        Family(
            "mixtral",
            "MixtralForCausalLM",
            "llama",
            names.MIXTRAL,
            (*_GATED, _WINDOW, _EXPERTS, Field("num_local_experts", "expert_count")),
            "silu",
            default_theta=1e6,
        ),
        Family("bamboo", "BambooForCausalLM", "bamboo", names.LLAMA, (*_GATED, _USUAL_WINDOW), "drelu"),
        Family("qwen2", "Qwen2ForCausalLM", "qwen2", names.QWEN2, _GATED, "silu", neutral=_NO_WINDOW, head_dim=False),
        Family("qwen3", "Qwen3ForCausalLM", "qwen3", names.QWEN3, _GATED, "silu", neutral=_NO_WINDOW | _NO_BIAS),
        Family(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            "qwen3moe",
            names.QWEN3_MOE,
            (
                *_GATED,
                _EXPERTS,
                Field("num_experts", "expert_count", other="num_local_experts"),
                Field("moe_intermediate_size", "expert_feed_forward_length"),
                Field("norm_topk_prob", "expert_weights_norm", bool, False),
            ),
            "silu",
            neutral=_NO_WINDOW | {"attention_bias": (False,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
        ),
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            "gemma2",
            names.GEMMA2,
            (*_GATED, _USUAL_WINDOW, *SOFTCAPS),
            "gelu_tanh",
            activation_field="hidden_activation",
            neutral={"attention_bias": (False,), "use_bidirectional_attention": (False,)},
            tied=True,
        ),
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            "gemma3",
            names.GEMMA3,
            (*_GEMMA3, _USUAL_WINDOW),
            "gelu_tanh",
            activation_field="hidden_activation",
            neutral={
                "attention_bias": (False,),
                "use_bidirectional_attention": (False,),
                "attn_logit_softcapping": (),
                "final_logit_softcapping": (),
            },
            tied=True,
            default_theta=1e6,
        ),
        Family(
            "phi3",
            "Phi3ForCausalLM",
            "phi3",
            names.PHI3,
            (*_GATED, _WINDOW),
            "silu",
            neutral={"attention_bias": (False,)},
            head_dim=False,
        ),
        Family(
            "falcon",
            "FalconForCausalLM",
            "falcon",
            names.FALCON_ONE_NORM,
            (
                *_SHAPE,
                Field("ffn_hidden_size", "feed_forward_length", optional=True),
                _CONTEXT,
                Field("layer_norm_epsilon", "attention.layer_norm_epsilon", float, 1e-5),
            ),
            "gelu",
            activation_field="activation",
            neutral={"alibi": (False,), "parallel_attn": (True,), "bias": (False,)},
            tied=True,
            head_dim=False,
        ),
        Family(
            "opt",
            "OPTForCausalLM",
            "opt",
            names.OPT,
            (*_SHAPE, Field("ffn_dim", "feed_forward_length"), _CONTEXT),
            "relu",
            activation_field="activation_function",
            neutral={
                "do_layer_norm_before": (True,),
                "_remove_final_layer_norm": (False,),
                "enable_bias": (True,),
                "layer_norm_elementwise_affine": (True,),
            },
            tied=True,
            default_theta=None,
            head_dim=False,
        ),
    )
}


def tensors_of(family: Family, two_norms: bool) -> tuple[Link, ...]:
    """A family's table; Falcon has two."""
    return names.FALCON_TWO_NORMS if family.model_type == "falcon" and two_norms else family.tensors


def dims_of(metadata: Mapping[str, Any], family: Family) -> Dims:
    """The sizes of tensors. FormatError is not raised here: metadata have been checked."""

    def value(name: str, default: int = 0) -> int:
        found = metadata.get(f"{family.architecture}.{name}", default)
        return max(found, default=0) if isinstance(found, list) else found

    width, heads = value("embedding_length"), value("attention.head_count")
    kv_heads = value("attention.head_count_kv", heads)
    head_dim = value("attention.key_length") or max(1, width // heads)
    neurons = value("expert_feed_forward_length") or value("feed_forward_length")
    q, k = heads * head_dim, kv_heads * head_dim
    letters = {
        "V": value("vocab_size"), "D": width, "Q": q, "K": k, "F": q + 2 * k, "N": neurons, "G": 2 * neurons,
        "E": value("expert_count"), "H": head_dim, "P": value("context_length") + OPT_OFFSET,
    }  # fmt: skip
    return Dims(letters, value("block_count"), heads, kv_heads, head_dim, value("expert_count"))
