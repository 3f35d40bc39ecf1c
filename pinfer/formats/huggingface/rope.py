"""Rotary embeddings: the fields of config.json as GGUF's keys and tensors, and back.

config.json spells them `rope_theta` and `rope_scaling` (before transformers 5) or `rope_parameters`. GGUF has keys for
linear and YaRN scaling; Llama 3's scaling is `rope_freqs.weight`, what each frequency is divided by, and longrope's
are `rope_factors_short.weight` and `rope_factors_long.weight`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from pinfer.formats.errors import shown
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.model_file import ModelFile

Vectors = dict[str, torch.Tensor]

FREQS, SHORT, LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
_YARN_KEYS = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
_UNSUPPORTED = ("mscale", "mscale_all_dim", "truncate")
_ALLOWED_UNSUPPORTED = {"truncate": True}
_LOW, _HIGH = 1.0, 4.0  # of Llama 3, which all published models have


class RopeReader:
    """Reads one model's rope: `metadata` gains GGUF's keys, `vectors` (float32) the tensors that stand for others."""

    def __init__(self, config: Node, architecture: str, head_dim: int, context: int) -> None:
        self._config, self._prefix = config, f"{architecture}.rope."
        self._head_dim, self._context = head_dim, context
        self.metadata: dict[str, Any] = {}
        self.vectors: Vectors = {}

    def read(self, default_theta: float) -> None:
        """A model with one rope for all layers."""
        self._read(self._section(None), _positive(self._config, "rope_theta", default_theta))

    def read_two(self, default_theta: float, default_local: float) -> None:
        """Gemma 3: full layers scale, sliding ones have a base of their own."""
        self._read(self._section("full_attention"), _positive(self._config, "rope_theta", default_theta))
        local = self._section("sliding_attention")
        if _kind(local) != "default":
            raise local.fault(f"has rope_type {shown(_kind(local))}; sliding layers are supported without scaling")
        stated = _positive(self._config, "rope_local_base_freq", default_local)
        self.metadata[self._prefix + "freq_base_swa"] = _positive(local, "rope_theta", stated)

    def _section(self, layers: str | None) -> Node:
        """The object that describes those layers' rope, whichever way it is spelled."""
        both = self._config.at("rope_parameters")
        if both.value is None:
            old = self._config.at("rope_scaling")
            return old if layers != "sliding_attention" else Node(None, old.where)
        return both if layers is None else both.at(layers)

    def _read(self, rope: Node, theta: float) -> None:
        self.metadata[self._prefix + "freq_base"] = theta = _positive(rope, "rope_theta", theta)
        part = _positive(rope, "partial_rotary_factor", _positive(self._config, "partial_rotary_factor", 1.0))
        turned = int(self._head_dim * part)
        if not 0 < turned <= self._head_dim or turned % 2:
            raise rope.fault(f"partial_rotary_factor {part:g} turns {turned} of {self._head_dim} dimensions")
        self.metadata[self._prefix + "dimension_count"] = turned
        readers = {
            "default": lambda *_: None,
            "linear": self._linear,
            "yarn": self._yarn,
            "llama3": self._llama3,
            "longrope": self._longrope,
            "su": self._longrope,
        }
        kind = _kind(rope)
        if kind not in readers:
            raise rope.fault(f"has rope_type {shown(kind)}, which is not supported; {', '.join(readers)} are")
        readers[kind](rope, theta, turned)

    def _scaling(self, **values: Any) -> None:
        self.metadata |= {f"{self._prefix}scaling.{key}": value for key, value in values.items() if value is not None}

    def _original(self, rope: Node) -> int:
        """The context before scaling."""
        stated = self._config.get("original_max_position_embeddings", int, self._context)
        value = rope.get("original_max_position_embeddings", int, stated)
        if not 1 <= value < 2**31:
            raise rope.fault(f"original_max_position_embeddings is {value}; it must lie in [1, 2^31)")
        return value

    def _linear(self, rope: Node, theta: float, turned: int) -> None:
        self._scaling(type="linear", factor=_positive(rope, "factor"))

    def _yarn(self, rope: Node, theta: float, turned: int) -> None:
        for key in _UNSUPPORTED:
            if rope.at(key).value not in (None, _ALLOWED_UNSUPPORTED.get(key)):
                raise rope.fault(f"{key} is {shown(repr(rope.at(key).value))}, which is not supported")
        stated = {gguf: _positive(rope, key) for key, gguf in _YARN_KEYS.items() if rope.at(key).value is not None}
        if rope.at("attention_factor").value is not None:
            stated["yarn_attn_factor"] = _positive(rope, "attention_factor")
        factor, original = _positive(rope, "factor"), self._original(rope)
        self._scaling(type="yarn", factor=factor, original_context_length=original, **stated)

    def _llama3(self, rope: Node, theta: float, turned: int) -> None:
        low, high = _positive(rope, "low_freq_factor"), _positive(rope, "high_freq_factor")
        if low >= high:
            raise rope.fault(f"low_freq_factor {low:g} must be below high_freq_factor {high:g}")
        factor = _positive(rope, "factor")
        self.vectors[FREQS] = llama3_factors(theta, turned, factor, self._original(rope), low, high)

    def _longrope(self, rope: Node, theta: float, turned: int) -> None:
        for name, key in ((SHORT, "short_factor"), (LONG, "long_factor")):
            values = [number(node) for node in rope.at(key).items()]
            if len(values) != turned // 2 or not all(math.isfinite(value) and value > 0 for value in values):
                raise rope.fault(f"{key} must hold {turned // 2} positive numbers, not {len(values)}")
            self.vectors[name] = torch.tensor(values, dtype=torch.float32)
        original = self._original(rope)
        factor = _positive(rope, "factor", self._context / original)
        stated = _positive(rope, "attention_factor", _longrope_attention(factor, original))
        self._scaling(type="longrope", original_context_length=original, attn_factor=stated)


def llama3_factors(theta: float, turned: int, factor: float, original: int, low: float, high: float) -> torch.Tensor:
    """What Llama 3.1 divides each frequency by, float32 [turned / 2]: 1 for wavelengths below original / high, `factor`
    above original / low, in between a mix of the two in the frequencies."""
    freqs = 1.0 / (theta ** (torch.arange(0, turned, 2).float() / turned))
    wavelengths = 2 * math.pi / freqs
    smooth = (original / wavelengths - low) / (high - low)
    mixed = (1 - smooth) * freqs / factor + smooth * freqs
    scaled = torch.where(wavelengths > original / low, freqs / factor, freqs)
    medium = (wavelengths <= original / low) & (wavelengths >= original / high)
    return freqs / torch.where(medium, mixed, scaled)


def write_rope(file: ModelFile, prefix: str, context: int) -> dict[str, Any]:
    """The `rope_parameters` of a model file; FormatError for what config.json cannot say."""
    metadata = file.metadata
    theta = short_float(file.get(f"{prefix}freq_base", float, 10000.0))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    kind = metadata.get(f"{prefix}scaling.type", "linear" if f"{prefix}scaling.factor" in metadata else "none")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": short_float(file.get(f"{prefix}scaling.factor", float))}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = file.get(f"{prefix}scaling.original_context_length", int, context)
        stated = {**_YARN_KEYS, "attention_factor": "yarn_attn_factor"}
        for key, gguf in stated.items():
            if (value := file.get(f"{prefix}scaling.{gguf}", float, None)) is not None:
                rope[key] = short_float(value)
    if file.has(FREQS):
        rope |= _find_llama3(file, theta, context)
    if file.has(LONG):
        rope |= _write_longrope(file, prefix, context)
    return rope


def _find_llama3(file: ModelFile, theta: float, context: int) -> dict[str, Any]:
    """The settings that rope_freqs.weight was made of: its largest factor, and the context that gives the others."""
    found = file.vector(FREQS)
    factor = float(found.max())
    for original in [1 << power for power in range(4, 24)] + [context]:
        made = llama3_factors(theta, 2 * found.numel(), factor, original, _LOW, _HIGH)
        if torch.allclose(made, found, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": short_float(factor),
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": original,
            }
    raise file.error(f"{FREQS} are not the factors of Llama 3's scaling, which is all that config.json could say")


def _write_longrope(file: ModelFile, prefix: str, context: int) -> dict[str, Any]:
    original = file.get(f"{prefix}scaling.original_context_length", int)
    rope: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": original}
    for name, key in ((SHORT, "short_factor"), (LONG, "long_factor")):
        rope[key] = [short_float(value) for value in file.vector(name).tolist()]
    attention = file.get(f"{prefix}scaling.attn_factor", float, 1.0)
    if not math.isclose(attention, _longrope_attention(context / original, original), rel_tol=1e-6):
        rope["attention_factor"] = short_float(attention)
    return rope


def _longrope_attention(factor: float, original: int) -> float:
    """What cos and sin are multiplied by where the config does not say (LongRoPE, Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def short_float(value: float) -> float:
    """The number with the fewest digits that float32 rounds to `value`: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _kind(rope: Node) -> str:
    return rope.get("rope_type", str, rope.get("type", str, "default")).lower()


def number(node: Node) -> float:
    """A JSON number, whole or not; FormatError for anything else."""
    if type(node.value) not in (int, float):
        raise node.fault(f"is {shown(repr(node.value))}, not a number")
    return float(node.value)


def _positive(rope: Node, key: str, default: float | None = None) -> float:
    node = rope.at(key)
    value = default if node.value is None and default is not None else number(node)
    if not (math.isfinite(value) and value > 0):
        raise node.fault(f"is {value:g}; it must be finite and positive")
    return value
