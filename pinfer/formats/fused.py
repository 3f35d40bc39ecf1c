"""Tensors that files store as one where the model has several, one's rows after the other's: views, not copies.

Query, key and value as `attn_qkv` (Falcon, Phi-3, PowerInfer's OPT), with or without a bias, and Phi-3's gate and up
as one `ffn_up` of twice the neurons. A model file always shows the parts (`split_fused`), a writer joins them again as
llama.cpp reads them (`fused_groups`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pinfer.formats.model_file import TensorInfo

_QKV = ("attn_q", "attn_k", "attn_v")
_GATE_UP = ("ffn_gate", "ffn_up")
# By architecture, what llama.cpp has as one tensor: its name and its parts, in the order of their rows.
_GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "falcon": {"attn_qkv": _QKV},
    "phi3": {"attn_qkv": _QKV, "ffn_up": _GATE_UP},
}
_BLOCK_TENSOR = re.compile(r"(blk\.\d+)\.(attn_qkv|ffn_up)\.(weight|bias)")


def fused_groups(architecture: str) -> dict[str, tuple[str, ...]]:
    """What a file of that architecture is to store as one: `blk.{}.attn_qkv` of `blk.{}.attn_q`, … and so on.

    Names are without the `.weight` or `.bias` that both sides share, `{}` being the layer; parts stand in the order of
    their rows. An empty table for architectures that store every tensor alone.
    """
    groups = _GROUPS.get(architecture, {})
    return {f"blk.{{}}.{whole}": tuple(f"blk.{{}}.{part}" for part in parts) for whole, parts in groups.items()}


def split_fused(metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors with every fused one replaced by its parts, which lie where its rows do.

    How many rows each part has follows from the metadata. A tensor whose rows are not what that says stays as it is,
    for `check_tensors` to name.
    """
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = _BLOCK_TENSOR.fullmatch(name)
        rows = _rows(metadata, match[2], f"{match[1]}.ffn_gate.{match[3]}" in tensors) if match else None
        if match is None or rows is None or sum(rows.values()) != info.shape[0] or len(info.shape) > 2:
            found[name] = info
            continue
        first = 0
        for part, count in rows.items():
            view = _row_view(info, f"{match[1]}.{part}.{match[3]}", first, count)
            found[view.name] = view
            first += count
    return found


def _row_view(info: TensorInfo, name: str, first: int, count: int) -> TensorInfo:
    row_bytes = info.nbytes // info.shape[0]
    shape = (count, *info.shape[1:])
    return dataclasses.replace(
        info, name=name, shape=shape, offset=info.offset + first * row_bytes, nbytes=count * row_bytes
    )


def _rows(metadata: Mapping[str, Any], whole: str, has_gate: bool) -> dict[str, int] | None:
    """Rows of each part of a fused tensor; None where it is none, or the metadata does not say."""
    architecture = metadata.get("general.architecture")

    def number(key: str) -> int:
        value = metadata.get(f"{architecture}.{key}", 0)
        if isinstance(value, list):  # one for each layer
            value = value[0] if value and all(one == value[0] for one in value) else 0
        return value if type(value) is int and value > 0 else 0

    if whole == "ffn_up":
        fused = "ffn_up" in _GROUPS.get(str(architecture), {}) and not has_gate
        return dict.fromkeys(_GATE_UP, number("feed_forward_length")) if fused else None
    heads = number("attention.head_count")
    if not heads:
        return None
    head_dim = number("attention.key_length") or number("embedding_length") // heads
    keys = (number("attention.head_count_kv") or heads) * head_dim
    return {"attn_q": heads * head_dim, "attn_k": keys, "attn_v": keys}
