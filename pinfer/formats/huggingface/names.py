"""Which tensors of a folder are which of GGUF, family by family, and what lies between the two; readable both ways.

A `Link` is one tensor of the folder and the one or more of GGUF that hold the same weights. What changes is the order
of rows (`Change`), 1 that GGUF adds to Gemma's norms, and that GGUF stacks experts. Shapes are letters: V vocabulary,
D width, Q and K rows of queries and keys, N neurons, E experts, H dimensions of a head, P learned positions, F a fused
qkv (Q + 2 K), G a fused gate and up (2 N).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import torch

from pinfer.formats.errors import shown

HEAD = "lm_head.weight"  # which a model whose head is its embedding does not have
RowOrder = slice | torch.Tensor  # rows that lie together, or an int64 index


class Change(Enum):
    SAME = "same"
    ROTARY = "rows of each head: halves in the folder, pairs in GGUF"
    PLUS_ONE = "a norm's weight, to which GGUF has added 1"
    QKV = "rows of q, then k, then v"
    HALVES = "rows of one, then of the other"
    GROUPED = "Falcon: by kv head, its rows of q, then k, then v"
    STACKED = "one tensor an expert in the folder, all experts in GGUF"


@dataclass(frozen=True)
class Dims:
    """The sizes behind the letters. FormatError where a tensor's do not agree with them is the reader's to raise."""

    letters: Mapping[str, int]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_experts: int = 0

    def shape(self, letters: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self.letters[letter] for letter in letters)


@dataclass(frozen=True)
class Link:
    """`folder` is a tensor's name, with {layer} and {expert} where there are many; `gguf` the names of its parts."""

    folder: str
    gguf: tuple[str, ...]
    shape: str
    change: Change = Change.SAME

    def of(self, layer: int, expert: int | None = None) -> Link:
        names = tuple(name.replace("{layer}", str(layer)) for name in self.gguf)
        folder = self.folder.replace("{layer}", str(layer))
        if expert is not None:
            folder = folder.replace("{expert}", str(expert))
        return Link(folder, names, self.shape, self.change)


def row_orders(link: Link, dims: Dims) -> list[RowOrder]:
    """Per tensor of GGUF, which rows of the folder's tensor it is made of."""
    q, k, n = dims.n_heads * dims.head_dim, dims.n_kv_heads * dims.head_dim, dims.letters["N"]
    if link.change is Change.ROTARY:
        rows = torch.arange(dims.letters[link.shape[0]])
        return [rows.view(-1, 2, dims.head_dim // 2).transpose(1, 2).reshape(-1)]
    if link.change is Change.QKV:
        return [slice(0, q), slice(q, q + k), slice(q + k, q + 2 * k)]
    if link.change is Change.HALVES:
        return [slice(0, n), slice(n, 2 * n)]
    if link.change is Change.GROUPED:
        return _grouped(dims)
    return [slice(None)]


def _grouped(dims: Dims) -> list[RowOrder]:
    each = dims.n_heads // dims.n_kv_heads
    if dims.n_kv_heads == 1:  # one group: rows of q, then k, then v
        q, k = each * dims.head_dim, dims.head_dim
        return [slice(0, q), slice(q, q + k), slice(q + k, q + 2 * k)]
    rows = torch.arange(dims.n_kv_heads * (each + 2) * dims.head_dim).view(dims.n_kv_heads, each + 2, dims.head_dim)
    return [rows[:, :each].reshape(-1), rows[:, each].reshape(-1), rows[:, each + 1].reshape(-1)]


def folder_order(link: Link, dims: Dims) -> torch.Tensor | None:
    """The way back: which row of GGUF's tensors, one after the other, each row of the folder's is; None: as they are."""
    orders = row_orders(link, dims)
    if all(isinstance(order, slice) for order in orders):
        return None
    return torch.cat([order for order in orders if isinstance(order, torch.Tensor)]).argsort()


def links(table: tuple[Link, ...], dims: Dims) -> Iterator[Link]:
    """A family's links, those of layers once for each; experts stay together."""
    for link in table:
        if "{layer}" not in link.folder:
            yield link
    for layer in range(dims.n_layers):
        for link in table:
            if "{layer}" in link.folder:
                yield link.of(layer)


def folder_names(link: Link, dims: Dims) -> list[str]:
    """The folder's tensors of a link: one, or one an expert."""
    if link.change is not Change.STACKED:
        return [link.folder]
    return [link.folder.replace("{expert}", str(expert)) for expert in range(dims.n_experts)]


def misshapen(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What to say of a tensor that is not as large as it should be."""
    return f"tensor {shown(name)} has shape {list(found)}, config.json asks for {list(expected)}"


# Tables.

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."


def _in_layer(folder: str, gguf: str | tuple[str, ...], shape: str, change: Change = Change.SAME) -> Link:
    parts = (gguf,) if isinstance(gguf, str) else gguf
    return Link(_LAYER + folder, tuple(_BLOCK + part for part in parts), shape, change)


def _ends(norm: Change = Change.SAME) -> tuple[Link, ...]:
    return (
        Link("model.embed_tokens.weight", ("token_embd.weight",), "VD"),
        Link("model.norm.weight", ("output_norm.weight",), "D", norm),
        Link(HEAD, ("output.weight",), "VD"),
    )


def _norms(change: Change = Change.SAME) -> tuple[Link, ...]:
    return (
        _in_layer("input_layernorm.weight", "attn_norm.weight", "D", change),
        _in_layer("post_attention_layernorm.weight", "ffn_norm.weight", "D", change),
    )


def _attention(qk: Change = Change.SAME) -> tuple[Link, ...]:
    return (
        _in_layer("self_attn.q_proj.weight", "attn_q.weight", "QD", qk),
        _in_layer("self_attn.k_proj.weight", "attn_k.weight", "KD", qk),
        _in_layer("self_attn.v_proj.weight", "attn_v.weight", "KD"),
        _in_layer("self_attn.o_proj.weight", "attn_output.weight", "DQ"),
    )


def _qk_norms(change: Change = Change.SAME) -> tuple[Link, ...]:
    return (
        _in_layer("self_attn.q_norm.weight", "attn_q_norm.weight", "H", change),
        _in_layer("self_attn.k_norm.weight", "attn_k_norm.weight", "H", change),
    )


_QKV_BIASES = (
    _in_layer("self_attn.q_proj.bias", "attn_q.bias", "Q"),
    _in_layer("self_attn.k_proj.bias", "attn_k.bias", "K"),
    _in_layer("self_attn.v_proj.bias", "attn_v.bias", "K"),
)
_MLP = (
    _in_layer("mlp.gate_proj.weight", "ffn_gate.weight", "ND"),
    _in_layer("mlp.up_proj.weight", "ffn_up.weight", "ND"),
    _in_layer("mlp.down_proj.weight", "ffn_down.weight", "DN"),
)


def _experts(folder: str, gate: str, up: str, down: str) -> tuple[Link, ...]:
    return (
        _in_layer(f"{folder}.gate.weight", "ffn_gate_inp.weight", "ED"),
        *(
            _in_layer(f"{folder}.experts.{{expert}}.{name}.weight", f"ffn_{part}_exps.weight", shape, Change.STACKED)
            for name, part, shape in ((gate, "gate", "ND"), (up, "up", "ND"), (down, "down", "DN"))
        ),
    )


LLAMA = (*_ends(), *_norms(), *_attention(Change.ROTARY), *_MLP)
MIXTRAL = (*_ends(), *_norms(), *_attention(Change.ROTARY), *_experts("block_sparse_moe", "w1", "w3", "w2"))
QWEN2 = (*_ends(), *_norms(), *_attention(), *_QKV_BIASES, *_MLP)
QWEN3 = (*_ends(), *_norms(), *_attention(), *_qk_norms(), *_MLP)
QWEN3_MOE = (
    *_ends(),
    *_norms(),
    *_attention(),
    *_qk_norms(),
    *_experts("mlp", "gate_proj", "up_proj", "down_proj"),
)
GEMMA2 = (
    *_ends(Change.PLUS_ONE),
    _in_layer("input_layernorm.weight", "attn_norm.weight", "D", Change.PLUS_ONE),
    _in_layer("post_attention_layernorm.weight", "post_attention_norm.weight", "D", Change.PLUS_ONE),
    _in_layer("pre_feedforward_layernorm.weight", "ffn_norm.weight", "D", Change.PLUS_ONE),
    _in_layer("post_feedforward_layernorm.weight", "post_ffw_norm.weight", "D", Change.PLUS_ONE),
    *_attention(),
    *_MLP,
)
GEMMA3 = (*GEMMA2, *_qk_norms(Change.PLUS_ONE))
PHI3 = (
    *_ends(),
    *_norms(),
    _in_layer("self_attn.qkv_proj.weight", ("attn_q.weight", "attn_k.weight", "attn_v.weight"), "FD", Change.QKV),
    _in_layer("self_attn.o_proj.weight", "attn_output.weight", "DQ"),
    _in_layer("mlp.gate_up_proj.weight", ("ffn_gate.weight", "ffn_up.weight"), "GD", Change.HALVES),
    _in_layer("mlp.down_proj.weight", "ffn_down.weight", "DN"),
)


def _weight_and_bias(folder: str, gguf: str, shape: str) -> tuple[Link, ...]:
    rows = shape[0]
    return (
        Link(f"{folder}.weight", (f"{gguf}.weight",), shape),
        Link(f"{folder}.bias", (f"{gguf}.bias",), rows),
    )


_FALCON_LAYER = "transformer.h.{layer}."
_FALCON = (
    Link("transformer.word_embeddings.weight", ("token_embd.weight",), "VD"),
    *_weight_and_bias("transformer.ln_f", "output_norm", "D"),
    Link(HEAD, ("output.weight",), "VD"),
    Link(
        _FALCON_LAYER + "self_attention.query_key_value.weight",
        tuple(_BLOCK + part for part in ("attn_q.weight", "attn_k.weight", "attn_v.weight")),
        "FD",
        Change.GROUPED,
    ),
    Link(_FALCON_LAYER + "self_attention.dense.weight", (_BLOCK + "attn_output.weight",), "DQ"),
    Link(_FALCON_LAYER + "mlp.dense_h_to_4h.weight", (_BLOCK + "ffn_up.weight",), "ND"),
    Link(_FALCON_LAYER + "mlp.dense_4h_to_h.weight", (_BLOCK + "ffn_down.weight",), "DN"),
)
FALCON_ONE_NORM = (*_FALCON, *_weight_and_bias(_FALCON_LAYER + "input_layernorm", _BLOCK + "attn_norm", "D"))
FALCON_TWO_NORMS = (
    *_FALCON,
    *_weight_and_bias(_FALCON_LAYER + "ln_mlp", _BLOCK + "attn_norm", "D"),
    *_weight_and_bias(_FALCON_LAYER + "ln_attn", _BLOCK + "attn_norm_2", "D"),
)

_OPT_LAYER = "model.decoder.layers.{layer}."
OPT = (
    Link("model.decoder.embed_tokens.weight", ("token_embd.weight",), "VD"),
    Link("model.decoder.embed_positions.weight", ("position_embd.weight",), "PD"),
    *_weight_and_bias("model.decoder.final_layer_norm", "output_norm", "D"),
    Link(HEAD, ("output.weight",), "VD"),
    *_weight_and_bias(_OPT_LAYER + "self_attn_layer_norm", _BLOCK + "attn_norm", "D"),
    *_weight_and_bias(_OPT_LAYER + "self_attn.q_proj", _BLOCK + "attn_q", "QD"),
    *_weight_and_bias(_OPT_LAYER + "self_attn.k_proj", _BLOCK + "attn_k", "KD"),
    *_weight_and_bias(_OPT_LAYER + "self_attn.v_proj", _BLOCK + "attn_v", "KD"),
    *_weight_and_bias(_OPT_LAYER + "self_attn.out_proj", _BLOCK + "attn_output", "DQ"),
    *_weight_and_bias(_OPT_LAYER + "final_layer_norm", _BLOCK + "ffn_norm", "D"),
    *_weight_and_bias(_OPT_LAYER + "fc1", _BLOCK + "ffn_up", "ND"),
    *_weight_and_bias(_OPT_LAYER + "fc2", _BLOCK + "ffn_down", "DN"),
)
# Buffers that some folders carry and that follow from the config.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")
# TurboSparse folders carry the predictors that were trained with the model; ours are fitted, on the model itself.
_PREDICTORS = ".mlp.predictor."


def is_ignored(name: str) -> bool:
    """Whether the model is the same without a tensor of the folder."""
    return name.endswith(_BUFFERS) or _PREDICTORS in name


_TEXT_PREFIXES = ("language_model.model.", "model.language_model.")
_IMAGE_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def text_name(name: str) -> str | None:
    """A tensor of a model of images and text under its name in a model of text; None where it is of images."""
    if name.startswith(_IMAGE_PREFIXES):
        return None
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")
