"""Rotary embeddings from metadata: dimension, base, and how they are stretched to longer contexts."""

from __future__ import annotations

import math

from pinfer.config import RopeConfig, RopeStyle, YarnConfig
from pinfer.formats.errors import shown
from pinfer.formats.model_config.keys import Keys

_SCALINGS = ("none", "linear", "yarn", "longrope")


def read_rope(keys: Keys, head_dim: int, style: RopeStyle, base: float = 10000.0) -> RopeConfig:
    """The rotary embedding of an architecture that pairs dimensions in that style; `base` is its default.

    What scaling multiplies cos and sin by is `rope.scaling.attn_factor`, which a file states for longrope; under YaRN
    it multiplies YaRN's own factor, 0.1 ln(scale) + 1, or the `rope.scaling.yarn_attn_factor` stated in its place.
    """
    dim = keys.count("rope.dimension_count", head_dim)
    if dim > head_dim or dim % 2:
        raise keys.error("rope.dimension_count", f"is {dim}; it must be even and at most the head's {head_dim}")
    kind = keys.file.get(keys.name("rope.scaling.type"), str, "linear")
    if kind not in _SCALINGS:
        supported = f"{', '.join(_SCALINGS[:-1])} and {_SCALINGS[-1]} are"
        raise keys.error("rope.scaling.type", f"is {shown(kind)}, which is not supported yet; {supported}")
    scale = 1.0 if kind == "none" else _scale(keys)
    attention_factor = keys.positive("rope.scaling.attn_factor", 1.0)
    yarn = None
    if kind == "yarn":
        yarn = _yarn(keys)
        attention_factor *= keys.positive("rope.scaling.yarn_attn_factor", 1 + 0.1 * math.log(max(1.0, scale)))
    original = None
    if yarn or keys.has("rope.scaling.original_context_length"):
        original = keys.count("rope.scaling.original_context_length", keys.count("context_length"))
    return RopeConfig(dim, keys.positive("rope.freq_base", base), style, scale, yarn, attention_factor, original)


def _yarn(keys: Keys) -> YarnConfig:
    keys.refuse("rope.scaling.yarn_ext_factor", float, (1.0,), "a part of YaRN is")
    keys.refuse("rope.scaling.yarn_log_multiplier", float, (0.0,), "YaRN's multiplier of DeepSeek is")
    fast = keys.positive("rope.scaling.yarn_beta_fast", YarnConfig.beta_fast)
    slow = keys.positive("rope.scaling.yarn_beta_slow", YarnConfig.beta_slow)
    if fast < slow:
        raise keys.error("rope.scaling.yarn_beta_fast", f"is {fast:g}, which must not be below beta_slow, {slow:g}")
    return YarnConfig(fast, slow)


def _scale(keys: Keys) -> float:
    """The factor of scaling; a file may state it without a type, under a new key or an old one."""
    return keys.positive("rope.scaling.factor", keys.positive("rope.scale_linear", 1.0))
