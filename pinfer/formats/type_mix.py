"""Which type a matrix gets in a file of a weight type or of one of llama.cpp's mixes.

The rules are those of llama.cpp's quantiser (`llama_tensor_get_type` and what surrounds it, src/llama-quant.cpp), so
that a file of ours has the types that its users know: of attn_v and ffn_down, a mix has the layers of `use_more_bits`
in Q6_K; a 70B model has the rest of attn_v in Q5_K, as eight heads share it; the output matrix is Q6_K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pinfer.formats.model_file import ModelFile
from pinfer.quant import BY_NAME, F16, Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, WRITTEN_TYPES, QuantType

# The base type of each mix, whose more important tensors are Q6_K.
MIXES = {"q4_k_m": Q4_K, "q5_k_m": Q5_K}
TYPES = (*(kind.name.lower() for kind in WRITTEN_TYPES), *MIXES)
# llama.cpp's numbers of whole files (general.file_type).
FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k": 11,
    "q4_k": 14, "q4_k_m": 15, "q5_k": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32,
}  # fmt: skip
QUANTIZATION_VERSION = 2  # of ggml's blocks

LAYERS_OF_70B = 80  # llama.cpp knows a 70B by its layers and its shared keys
_SPARE_EXPERTS = 8  # of a mixture whose attention is small beside its experts
# What takes the place of blocks of 256 where a row has no whole number of them.
_SMALLER_BLOCKS = {"Q2_K": Q4_0, "Q3_K": Q4_0, "Q4_K": Q5_0, "Q5_K": Q5_1, "Q6_K": Q8_0}
# Matrices that are small, or that nothing is gained by rounding: kept as they are.
_KEPT = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "token_types.weight", "rope_freqs.weight")


@dataclass(frozen=True)
class Facts:
    """What the rules look at beside a matrix's name."""

    n_layers: int
    falcon: bool = False
    is_70b: bool = False
    n_experts: int = 1
    tied: bool = False  # the embedding is the output matrix as well

    @classmethod
    def of(cls, file: ModelFile) -> Facts:
        """Those of a model. FormatError where its metadata lack them."""
        architecture = file.architecture
        layers, heads = (file.get(f"{architecture}.{key}", int) for key in ("block_count", "attention.head_count"))
        kv_heads: Any = file.metadata.get(f"{architecture}.attention.head_count_kv", heads)
        return cls(
            layers,
            architecture == "falcon",
            layers == LAYERS_OF_70B and kv_heads != heads,
            max(1, file.get(f"{architecture}.expert_count", int, 1)),
            not file.has("output.weight"),
        )


def use_more_bits(layer: int, n_layers: int) -> bool:
    """llama.cpp's choice of layers: the first and the last eighth, and every third in between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def mixed_type(mix: str, part: str, layer: int, facts: Facts) -> QuantType:
    """The type of a layer's matrix ("attn_v", "ffn_down", …), of "token_embd" or of "output" in a file of that mix."""
    base = MIXES[mix]
    if part == "output":
        return Q6_K
    if part in ("attn_v", "attn_qkv"):
        if facts.n_experts == _SPARE_EXPERTS:
            return Q8_0
        if use_more_bits(layer, facts.n_layers):
            return Q6_K
        return Q5_K if facts.is_70b and base is Q4_K else base
    if facts.n_experts == _SPARE_EXPERTS and part in ("attn_k", "attn_output"):
        return Q8_0 if part == "attn_k" else Q5_K
    if part == "ffn_down" and use_more_bits(layer, facts.n_layers):
        if facts.falcon and base is Q4_K:
            return Q6_K if layer < facts.n_layers // 16 else Q5_K
        return Q6_K
    return base


def base_type(type_name: str) -> QuantType:
    """What most matrices of such a file are. ValueError for a name that is neither a type nor a mix."""
    if type_name not in TYPES:
        raise ValueError(f"type {type_name!r} is none of {', '.join(TYPES)}")
    return MIXES.get(type_name) or BY_NAME[type_name.upper()]


def tensor_type(type_name: str, name: str, shape: tuple[int, ...], stored: QuantType, facts: Facts) -> QuantType:
    """`wanted_type`, or what rows of that length can have instead (`fitting_type`)."""
    wanted = wanted_type(type_name, name, shape, stored, facts)
    return wanted if wanted is stored else fitting_type(wanted, shape[-1])


def wanted_type(type_name: str, name: str, shape: tuple[int, ...], stored: QuantType, facts: Facts) -> QuantType:
    """The type of a tensor, by its name and shape, in a file of that type or mix; `stored` where it is left as it is."""
    base = base_type(type_name)
    if len(shape) < 2 or not name.endswith(".weight") or name.endswith(_KEPT):
        return stored
    part, layer = part_of(name)
    is_output = name == "output.weight" or (facts.tied and name == "token_embd.weight")
    if is_output and base.block_size > 1:
        odd = facts.falcon or shape[-1] % base.block_size
        return Q8_0 if odd or base is Q8_0 else Q6_K
    return mixed_type(type_name, part, layer, facts) if type_name in MIXES else base


def part_of(name: str) -> tuple[str, int]:
    """The matrix's name within its layer ("ffn_down", whatever its experts or layout) and the layer's number, or 0."""
    if not name.startswith("blk."):
        return name.removesuffix(".weight"), 0
    _, layer, part, *_ = name.split(".")
    for whole in ("ffn_down", "ffn_gate", "ffn_up"):
        if part.startswith(whole):
            return whole, int(layer)
    return part, int(layer)


def fitting_type(wanted: QuantType, columns: int) -> QuantType:
    """`wanted`, or what llama.cpp takes where rows of that length are no whole blocks: blocks of 32, at last F16."""
    for kind in (wanted, _SMALLER_BLOCKS.get(wanted.name, F16)):
        if columns % kind.block_size == 0:
            return kind
    return F16
