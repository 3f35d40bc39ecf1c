"""Tiny random `transformers` models of every family, saved as the folders people publish.

    folder = make_folder("llama3", tmp_path / "llama3")            # config.json, safetensors, tokenizer.json
    expected = reference_logits(load_reference("llama3", folder), ids)   # float32 [T, V]

Weights are drawn widely enough for logits to depend on every tensor; norms and biases are random too. Models whose
published code is not in transformers (ProSparse, Bamboo, TurboSparse) are a patched Llama or Mistral, saved under the
config.json fields that their authors publish.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from tests.tiny_tokenizers import TOKENIZERS, save_tokenizer

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

WIDTH, NEURONS, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 3, 4, 2, 128
FATRELU_CUTOFF = 0.1
_LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_GQA = _LLAMA | {"num_key_value_heads": KV_HEADS}
_GEMMA = _GQA | {
    "head_dim": 32,  # other than WIDTH / HEADS, as in the real ones
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 4,
}
_QWEN3 = _GQA | {"head_dim": 32, "rms_norm_eps": 1e-6}
_FALCON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "parallel_attn": True,
    "bias": False,
    "alibi": False,
    "max_position_embeddings": CONTEXT,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0],
}
# TurboSparse-Mistral is published under the same code and fields as Bamboo.
_BAMBOO_FIELDS = {"model_type": "bamboo", "architectures": ["BambooForCausalLM"], "hidden_act": "relu"}
_PROSPARSE_FIELDS = {
    "model_type": "sparsellama",
    "architectures": ["SparseLlamaForCausalLM"],
    "hidden_act": "fatrelu",
    "hidden_act_param": FATRELU_CUTOFF,
}


class _FatRelu(nn.Module):
    """g where g > cutoff, else 0 (ProSparse)."""

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return torch.where(gate > FATRELU_CUTOFF, gate, torch.zeros_like(gate))


def _fat_relu(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = _FatRelu()


def _d_relu(model: PreTrainedModel) -> None:
    """relu(gate) · relu(up): Bamboo and TurboSparse."""
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
        layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj, nn.ReLU())


@dataclass(frozen=True)
class Family:
    """One kind of folder: the transformers class and settings, and what its config.json says otherwise.

    `published` replaces fields of the saved config.json (for code that transformers does not have, `patch` makes a
    model of what it has compute the same); `old_rope` writes `rope_theta` and `rope_scaling`, as before transformers 5.
    """

    kind: str
    settings: dict[str, Any]
    tokenizer: str
    patch: Callable[[PreTrainedModel], None] | None = None
    published: dict[str, Any] = field(default_factory=dict)
    old_rope: bool = False
    padding: int = 0  # rows of the embedding that no token has
    shard_bytes: int | None = None


FAMILIES: dict[str, Family] = {
    "llama2": Family("Llama", _LLAMA, "spm", shard_bytes=100_000),
    "llama3": Family(
        "Llama",
        _GQA
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "llama3",
        old_rope=True,
    ),
    "llama3-tied": Family(
        "Llama",
        _GQA
        | {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "llama3",
    ),
    "llama-linear": Family(
        "Llama", _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, "spm"
    ),
    "llama-yarn": Family(
        "Llama",
        _GQA
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        "spm",
    ),
    "codellama": Family(
        "Llama",
        _LLAMA
        | {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        "spm",
        old_rope=True,
    ),
    "relu-llama": Family("Llama", _LLAMA | {"hidden_act": "relu"}, "spm", old_rope=True),
    "prosparse": Family("Llama", _LLAMA, "spm", patch=_fat_relu, published=_PROSPARSE_FIELDS, old_rope=True),
    "mistral": Family("Mistral", _GQA | {"sliding_window": None}, "spm", old_rope=True),
    "mistral-window": Family("Mistral", _GQA | {"sliding_window": 8}, "spm"),
    "bamboo": Family(
        "Mistral", _GQA | {"sliding_window": None}, "spm", patch=_d_relu, published=_BAMBOO_FIELDS, old_rope=True
    ),
    "turbosparse": Family(
        "Mistral",
        _GQA | {"sliding_window": 8},
        "spm",
        patch=_d_relu,
        published=_BAMBOO_FIELDS,
        old_rope=True,
        padding=32,
    ),
    "qwen2": Family("Qwen2", _GQA | {"rms_norm_eps": 1e-6}, "qwen2", padding=32, old_rope=True),
    "qwen2-yarn": Family(
        "Qwen2",
        _GQA
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "qwen2",
    ),
    "qwen3": Family("Qwen3", _QWEN3 | {"tie_word_embeddings": True}, "qwen2"),
    "gemma2": Family(
        "Gemma2",
        _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
        "gemma",
    ),
    "gemma3": Family(
        "Gemma3",
        _GEMMA
        | {
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            },
        },
        "gemma",
    ),
    "phi3": Family("Phi3", _LLAMA | {"sliding_window": None, "pad_token_id": 2}, "phi3", old_rope=True),
    "phi3-longrope": Family(
        "Phi3",
        _GQA
        | {
            "sliding_window": 40,
            "pad_token_id": 2,
            "original_max_position_embeddings": 32,
            "rope_parameters": _LONGROPE,
        },
        "phi3",
    ),
    "phi4-mini": Family(  # three quarters of a head turn
        "Phi3",
        _GQA
        | {
            "sliding_window": None,
            "pad_token_id": 2,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.05, 1.1, 1.15, 1.2, 1.25],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
            },
        },
        "phi3",
    ),
    "falcon-7b": Family(
        "Falcon",
        _FALCON | {"multi_query": True, "new_decoder_architecture": False},
        "falcon",
    ),
    "falcon-40b": Family(
        "Falcon",
        _FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True, "multi_query": True},
        "falcon",
    ),
    "opt": Family(
        "OPT",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "ffn_dim": NEURONS,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
        },
        "opt",
    ),
    "mixtral": Family(
        "Mixtral", _GQA | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, "spm"
    ),
    "qwen3-moe": Family(
        "Qwen3Moe",
        _QWEN3 | {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "norm_topk_prob": True},
        "qwen2",
    ),
}


def make_reference(name: str, seed: int = 0) -> PreTrainedModel:
    """The random model of a family, float32, ready to run."""
    family = FAMILIES[name]
    ids = TOKENIZERS[family.tokenizer].special_ids
    vocabulary = {"vocab_size": TOKENIZERS[family.tokenizer].size + family.padding}
    config = _class(family, "Config")(**(ids | family.settings | vocabulary))
    torch.manual_seed(seed)
    model = _class(family, "ForCausalLM")._from_config(config, attn_implementation="eager").float().eval()
    _randomise(model)
    if family.patch is not None:
        family.patch(model)
    return model


def make_folder(name: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A family's folder as published: config.json, generation_config.json, safetensors of `dtype`, tokenizer.json."""
    family = FAMILIES[name]
    model = make_reference(name, seed)
    if family.patch is not None:
        _unpatch(model)
    limit = {} if family.shard_bytes is None else {"max_shard_size": family.shard_bytes}
    model.to(dtype).save_pretrained(folder, **limit)
    path = folder / "config.json"
    settings = json.loads(path.read_text()) | family.published
    if family.old_rope:
        _write_old_rope(settings)
    path.write_text(json.dumps(settings, indent=2))
    save_tokenizer(family.tokenizer, folder)
    return folder


def load_reference(name: str, folder: Path) -> PreTrainedModel:
    """The transformers model of a folder, computing in float32; `name` says what its own code would have computed."""
    family = FAMILIES[name]
    settings = json.loads((folder / "config.json").read_text())
    config_class = _class(family, "Config")
    for field_name in family.published:
        settings.pop(field_name, None)
    config = config_class.from_dict({key: value for key, value in settings.items() if key != "model_type"})
    loaded = _class(family, "ForCausalLM").from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    if family.patch is not None:
        family.patch(loaded)
    return loaded.eval()


@torch.inference_mode()
def reference_logits(model: PreTrainedModel, ids: list[int] | torch.Tensor) -> torch.Tensor:
    """Float32 logits `[T, V]` of one sequence (`[B, T, V]` of a batch `[B, T]`), computed at once."""
    tokens = torch.as_tensor(ids)
    logits = model(input_ids=tokens.reshape(-1, tokens.shape[-1]), use_cache=False).logits.float()
    return logits if tokens.dim() > 1 else logits[0]


def _class(family: Family, suffix: str) -> Any:
    kind = "Gemma3Text" if (family.kind, suffix) == ("Gemma3", "Config") else family.kind
    return getattr(transformers, kind + suffix)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Norms near 1 (Gemma's near 0), biases of a third, matrices of 1.5 / sqrt(inputs), embeddings of about 1."""
    gemma = model.config.model_type.startswith("gemma")
    for name, weight in model.named_parameters():
        is_norm = "norm" in name or ".ln_" in name
        if weight.dim() == 1:
            weight.copy_(0.3 * torch.randn_like(weight) + float(is_norm and name.endswith("weight") and not gemma))
        elif "embed" in name:
            weight.normal_(std=weight.shape[1] ** -0.5 if gemma else 0.7)
        else:
            weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)


def _unpatch(model: PreTrainedModel) -> None:
    """Back to the tensors' names of the class it was made of."""
    for layer in model.model.layers:
        if isinstance(layer.mlp.up_proj, nn.Sequential):
            layer.mlp.up_proj = layer.mlp.up_proj[0]


def _write_old_rope(settings: dict[str, Any]) -> None:
    """`rope_parameters` as the two fields that all folders from before transformers 5 have."""
    rope = settings.pop("rope_parameters", None) or {}
    settings["rope_theta"] = rope.pop("rope_theta", 10000.0)
    rope.pop("partial_rotary_factor", None)
    settings["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
