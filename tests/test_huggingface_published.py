"""What is read of config.json of published models."""

from __future__ import annotations

from typing import Any

import pytest

from pinfer.formats.huggingface.describe import describe
from pinfer.formats.huggingface.json_file import Node

IDS = [1, 17, 300, 42, 42, 260, 99, 401, 7, 311, 28, 133, 8, 9, 10, 11]

# config.json of published models, those of their fields that matter here, and what must come of them.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama-3.1-8B": (
        {
            "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False, "pretraining_tp": 1,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
        },
        {"llama.rope.freq_base": 500000.0, "llama.rope.dimension_count": 128, "llama.attention.head_count_kv": 8},
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        {"general.architecture": "llama", "llama.attention.sliding_window": 4096},
    ),
    "Mixtral-8x7B": (
        {
            "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
        },
        {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.rope.freq_base": 1e6},
    ),
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
            "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28,
            "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 131072, "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False,
            "vocab_size": 152064,
            "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        },
        {
            "qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0,
            "qwen2.rope.scaling.original_context_length": 32768, "qwen2.rope.dimension_count": 128,
            "qwen2.attention.sliding_window": None,
        },
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
            "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True,
            "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
            "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
            "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        {
            "qwen3moe.expert_count": 128, "qwen3moe.expert_feed_forward_length": 768,
            "qwen3moe.expert_weights_norm": True, "qwen3moe.attention.key_length": 128,
        },
    ),
    "gemma-3-4b-it": (
        {
            "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "image_token_index": 262144,
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        },
        {
            "gemma3.attention.head_count": 8, "gemma3.attention.head_count_kv": 4, "gemma3.attention.key_length": 256,
            "gemma3.context_length": 131072, "gemma3.vocab_size": 262208, "gemma3.rope.freq_base": 1e6,
            "gemma3.rope.freq_base_swa": 10000.0, "gemma3.rope.scaling.factor": 8.0, "gemma3.attention.scale": None,
            "gemma3.attention.sliding_window_pattern": [bool((layer + 1) % 6) for layer in range(34)],
        },
    ),
    "gemma-2-27b": (
        {
            "model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608,
            "intermediate_size": 36864, "max_position_embeddings": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
        },
        {"gemma2.attention.scale": 144**-0.5, "gemma2.attn_logit_softcapping": 50.0},
    ),
    "Phi-3-mini-4k": (
        {
            "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
        {"phi3.attention.sliding_window": 2047, "phi3.rope.dimension_count": 96},
    ),
    "falcon-7b": (
        {
            "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 4544, "layer_norm_epsilon": 1e-05,
            "multi_query": True, "new_decoder_architecture": False, "num_attention_heads": 71,
            "num_hidden_layers": 32, "num_kv_heads": 71, "parallel_attn": True, "vocab_size": 65024,
        },
        {
            "falcon.attention.head_count_kv": 1, "falcon.feed_forward_length": 18176, "falcon.context_length": 2048,
            "falcon.rope.dimension_count": 64,
        },
    ),
    "falcon-40b": (
        {
            "model_type": "falcon", "alibi": False, "bias": False, "hidden_size": 8192, "layer_norm_epsilon": 1e-05,
            "multi_query": True, "new_decoder_architecture": True, "num_attention_heads": 128,
            "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": True, "vocab_size": 65024,
        },
        {"falcon.attention.head_count_kv": 8, "falcon.feed_forward_length": 32768},
    ),
    "opt-6.7b": (
        {
            "model_type": "opt", "activation_function": "relu", "do_layer_norm_before": True, "ffn_dim": 16384,
            "hidden_size": 4096, "max_position_embeddings": 2048, "num_attention_heads": 32, "num_hidden_layers": 32,
            "vocab_size": 50272, "word_embed_proj_dim": 4096,
        },
        {"opt.feed_forward_length": 16384, "opt.context_length": 2048, "opt.attention.layer_norm_epsilon": 1e-5},
    ),
    "TurboSparse-Mistral": (
        {
            "model_type": "bamboo", "architectures": ["BambooForCausalLM"], "hidden_act": "relu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32064,
        },
        {"general.architecture": "bamboo", "bamboo.attention.sliding_window": 4096},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    config, expected = PUBLISHED[name]
    described = describe(Node(config, "config.json:"))
    for key, value in expected.items():
        found = described.metadata.get(key)
        assert found == (pytest.approx(value) if isinstance(value, float) else value), key
    assert all(min(described.dims.shape(link.shape)) > 0 for link in described.tensors)
    if name == "Llama-3.1-8B":
        factors = described.vectors["rope_freqs.weight"]
        assert (factors.min(), factors.max(), factors.numel()) == (1, 8, 64)
