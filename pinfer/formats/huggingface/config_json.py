"""config.json and generation_config.json of a model file: what `families` reads, the other way round."""

from __future__ import annotations

from typing import Any

import torch

from pinfer.formats.errors import shown
from pinfer.formats.huggingface.families import (
    FAMILIES,
    MODEL_TYPE,
    Dims,
    Family,
    Field,
    dims_of,
    tensors_of,
)
from pinfer.formats.huggingface.names import Link
from pinfer.formats.huggingface.rope import short_float, write_rope
from pinfer.formats.model_file import ModelFile

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
_ROLES = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


class Folder:
    """What a model file is as a folder: its family, config.json's fields, the table of its tensors."""

    def __init__(self, file: ModelFile) -> None:
        """FormatError, naming the key, for a model that no supported `model_type` is."""
        self._file = file
        self.family = _find_family(file)
        metadata = dict(file.metadata)
        metadata.setdefault(self._key("vocab_size"), file.info("token_embd.weight").shape[0])
        self.dims: Dims = dims_of(metadata, self.family)
        self.two_norms = file.has("blk.0.attn_norm_2.weight")
        self.tensors: tuple[Link, ...] = tensors_of(self.family, self.two_norms)
        self.tied = not file.has("output.weight")

    def _key(self, name: str) -> str:
        return f"{self.family.architecture}.{name}"

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """The fields of config.json for weights of `dtype`."""
        family = self.family
        config: dict[str, Any] = {"architectures": [family.class_name], "model_type": family.model_type}
        for one in family.fields:
            if (value := self._value(one)) is not None:
                config[one.folder] = value
            elif one.missing is not None:
                config[one.folder] = None  # missing and null are two things there
        if family.head_dim:
            config["head_dim"] = self.dims.head_dim
        context = config["max_position_embeddings"]
        if family.default_theta is not None:
            config["rope_parameters"] = write_rope(self._file, self._key("rope."), context)
        config |= self._activation() | self._own(config)
        config |= {"tie_word_embeddings": self.tied, "dtype": str(dtype).removeprefix("torch.")}
        return config | self.generation()

    def generation(self) -> dict[str, int]:
        """The ids of special tokens, of those that the file names."""
        keys = {name: f"tokenizer.ggml.{role}_token_id" for name, role in _ROLES.items()}
        return {name: self._file.get(key, int) for name, key in keys.items() if key in self._file.metadata}

    def _value(self, one: Field) -> Any:
        key = self._key(one.gguf)
        if one.gguf == "vocab_size":
            return self.dims.letters["V"]
        if one.gguf == "attention.sliding_window":
            return self._file.get(key, int, 0) or None
        if one.gguf not in ("feed_forward_length", "attention.head_count", "attention.head_count_kv"):
            value = self._file.get(key, one.kind, one.default)
        else:  # lists with one value a layer count as that value
            value = self._same(key)
        if value is None and not one.optional:
            raise self._file.error(f"metadata key {shown(key)} is missing")
        return short_float(value) if one.kind is float and value is not None else value

    def _same(self, key: str) -> int | None:
        if not isinstance(self._file.metadata.get(key), list):
            return self._file.get(key, int, None)
        values = set(self._file.get_list(key, int))
        if len(values) != 1:
            raise self._file.error(f"metadata key {shown(key)} differs between layers, which config.json cannot say")
        return values.pop()

    def _activation(self) -> dict[str, Any]:
        family = self.family
        stated = self._file.get(self._key("hidden_activation"), str, family.activation)
        if family.activation == "drelu":
            return {"hidden_act": "relu"}
        cutoff = self._file.get(self._key("hidden_activation_cutoff"), float, 0.0)
        if family.model_type == "sparsellama":
            return {"hidden_act": "fatrelu", "hidden_act_param": short_float(cutoff)}
        if stated not in _ACTIVATIONS or cutoff:
            raise self._file.error(
                f"hidden_activation {shown(stated)} with cutoff {cutoff:g} is nothing that a folder of "
                f"{family.model_type} can say"
            )
        return {family.activation_field: _ACTIVATIONS[stated]}

    def _own(self, config: dict[str, Any]) -> dict[str, Any]:
        """What single families state."""
        kind, layers, found = self.family.model_type, self.dims.n_layers, dict[str, Any]()
        if kind.startswith("gemma"):
            scale = self._file.get(self._key("attention.scale"), float, 0.0) or self._gemma_width() ** -0.5
            width = scale**-2
            found["query_pre_attn_scalar"] = round(width) if abs(width - round(width)) < 1e-4 * width else width
            sliding = self._sliding(2 if kind == "gemma2" else 6)
            found["layer_types"] = ["sliding_attention" if one else "full_attention" for one in sliding]
            found["sliding_window"] = config["sliding_window"] or 4096
        if kind == "gemma2":
            usual = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
            found |= {key: self._file.get(self._key(key), float, value) or None for key, value in usual.items()}
        if kind == "gemma3_text":
            full = config["rope_parameters"]
            base = self._file.get(self._key("rope.freq_base_swa"), float, 10000.0)
            local = {"rope_type": "default", "rope_theta": short_float(base)}
            found["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
        if kind == "phi3":
            turned = self._file.get(self._key("rope.dimension_count"), int, self.dims.head_dim)
            config["rope_parameters"]["partial_rotary_factor"] = turned / self.dims.head_dim
            original = self._file.get(self._key("rope.scaling.original_context_length"), int, 0)
            found["original_max_position_embeddings"] = original or config["max_position_embeddings"]
        if kind == "falcon":
            found |= {"parallel_attn": True, "bias": False, "alibi": False}
            found |= self._falcon()
        if kind == "opt":
            found |= {"word_embed_proj_dim": self.dims.letters["D"], "do_layer_norm_before": True}
        if kind == "qwen3_moe":
            found |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
            found["layer_types"] = ["full_attention"] * layers
        return found

    def _gemma_width(self) -> float:
        """What scores are scaled by where the file does not say: the 27B models' is not the head's."""
        layers_of_27b = {"gemma2": 46, "gemma3_text": 62}[self.family.model_type]
        if self.dims.n_layers == layers_of_27b:
            return self.dims.letters["D"] / self.dims.n_heads
        return self.dims.head_dim

    def _sliding(self, usual: int) -> list[bool]:
        key = self._key("attention.sliding_window_pattern")
        if isinstance(self._file.metadata.get(key), list):
            return self._file.get_list(key, bool)
        period = self._file.get(key, int, usual)
        return [layer % period < period - 1 for layer in range(self.dims.n_layers)]

    def _falcon(self) -> dict[str, Any]:
        one_group = self.dims.n_kv_heads == 1 and not self.two_norms
        norms = {"num_ln_in_parallel_attn": 2 if self.two_norms else 1}
        return {
            "multi_query": one_group,
            "new_decoder_architecture": not one_group,
            "num_kv_heads": self.dims.n_kv_heads,
        } | ({} if one_group else norms)


def _find_family(file: ModelFile) -> Family:
    """By `pinfer.model_type`, else by what the metadata hold."""
    architecture = file.architecture
    fitting = [one for one in FAMILIES.values() if one.architecture == architecture]
    if not fitting:
        known = ", ".join(sorted({one.architecture for one in FAMILIES.values()}))
        raise file.error(f"architecture {shown(architecture)} has no folder form here; {known} have")
    stated = file.metadata.get(MODEL_TYPE)
    for one in fitting:
        if one.model_type == stated:
            return one
    if architecture != "llama":
        return fitting[0]
    if file.get("llama.expert_count", int, 0):
        return FAMILIES["mixtral"]
    if file.get("llama.hidden_activation_cutoff", float, 0.0):
        return FAMILIES["sparsellama"]
    return FAMILIES["mistral" if file.get("llama.attention.sliding_window", int, 0) else "llama"]
