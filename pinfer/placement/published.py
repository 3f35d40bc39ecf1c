"""Published models by name, so that a placement can be studied without their weights.

Dimensions are those of the models' configuration files; the type mixes are llama.cpp's (`formats.type_mix`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from pinfer.formats.type_mix import LAYERS_OF_70B, MIXES, Facts, base_type, mixed_type
from pinfer.kernels.transpose import transposed_type
from pinfer.placement.shape import FLOAT_BYTES, ModelShape, PredictorShape, layer_shape
from pinfer.quant import Q4_0, QuantType, planes_row_bytes


@dataclass(frozen=True)
class Dimensions:
    """One published model's dimensions; `n_heads` times the head's size is `d_model`."""

    n_layers: int
    d_model: int
    d_ffn: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context: int
    rope_base: float = 10000.0
    gated: bool = True
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


PUBLISHED = {
    "llama-2-7b": Dimensions(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": Dimensions(40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-2-70b": Dimensions(80, 8192, 28672, 64, 8, 32000, 4096),
    "llama-3-8b": Dimensions(32, 4096, 14336, 32, 8, 128256, 8192, 500000.0),
    "llama-3-70b": Dimensions(80, 8192, 28672, 64, 8, 128256, 8192, 500000.0),
    "mistral-7b": Dimensions(32, 4096, 14336, 32, 8, 32000, 32768, 1e6),
    "codellama-34b": Dimensions(48, 8192, 22016, 64, 8, 32000, 16384, 1e6),
    "yi-34b": Dimensions(60, 7168, 20480, 56, 8, 64000, 4096, 5e6),
    "opt-6.7b": Dimensions(32, 4096, 16384, 32, 32, 50272, 2048, gated=False, tied=True),
    "opt-13b": Dimensions(40, 5120, 20480, 40, 40, 50272, 2048, gated=False, tied=True),
    "opt-30b": Dimensions(48, 7168, 28672, 56, 56, 50272, 2048, gated=False, tied=True),
    "opt-66b": Dimensions(64, 9216, 36864, 72, 72, 50272, 2048, gated=False, tied=True),
    "falcon-40b": Dimensions(60, 8192, 32768, 128, 8, 65024, 2048, gated=False, tied=True),
}
PUBLISHED |= {
    f"relullama-{size}": PUBLISHED[f"llama-2-{size}"] for size in ("7b", "13b", "70b")
}  # SparseLLM's ReLU models keep Llama 2's dimensions

Down = Literal["rows", "file"]


class Stored(NamedTuple):
    """A matrix's type and size."""

    type: QuantType
    rows: int
    columns: int


def tensor_type(type_name: str, part: str, layer: int, n_layers: int, *, is_70b: bool = False) -> QuantType:
    """The type of a layer's matrix ("attn_v", "ffn_down", …), of "token_embd" or of "output" in a file of that type or
    mix. ValueError for a name that is neither."""
    if type_name not in MIXES:
        return base_type(type_name)
    return mixed_type(type_name, part, layer, Facts(n_layers, is_70b=is_70b))


def attention_matrices(dims: Dimensions) -> dict[str, tuple[int, int]]:
    """Rows and columns of a layer's attention matrices by their names in a GGUF file."""
    width, key_width = dims.d_model, dims.n_kv_heads * dims.head_dim
    return {
        "attn_q": (width, width),
        "attn_k": (key_width, width),
        "attn_v": (key_width, width),
        "attn_output": (width, width),
    }


def published_shape(
    name: str,
    type_name: str,
    predictor: PredictorShape | None = None,
    *,
    down: Down = "rows",
    rearranged: bool = True,
) -> ModelShape:
    """The shape of a named model in a weight type or mix.

    predictor:  None is dense.
    down:       "rows": neuron-major as the sparse path has it, requantised to Q8_0 (`kernels.transpose`); "file": in the
                file's own type, as the dense path reads it and as published figures count it.
    rearranged: whether a GPU has rows in padded planes.
    ValueError for an unknown name or type.
    """
    if name not in PUBLISHED:
        raise ValueError(f"shape {name!r} is none of {', '.join(PUBLISHED)}")
    dims, predictor = PUBLISHED[name], predictor or PredictorShape.dense()
    is_70b = dims.n_layers == LAYERS_OF_70B and dims.n_heads != dims.n_kv_heads

    def kind(part: str, layer: int = 0) -> QuantType:
        return tensor_type(type_name, part, layer, dims.n_layers, is_70b=is_70b)

    def one(layer: int) -> Stored:
        stored = kind("ffn_down", layer)
        return Stored(transposed_type(stored, dims.d_model) if down == "rows" else stored, dims.d_ffn, dims.d_model)

    parts = ("ffn_gate", "ffn_up") if dims.gated else ("ffn_up",)
    layers = tuple(
        layer_shape(
            [Stored(kind(part, layer), *size) for part, size in attention_matrices(dims).items()],
            2 * dims.d_model,
            [*(Stored(kind(part, layer), dims.d_ffn, dims.d_model) for part in parts), one(layer)],
            predictor,
            2 * dims.n_kv_heads * dims.head_dim * FLOAT_BYTES,
            rearranged=rearranged,
        )
        for layer in range(dims.n_layers)
    )
    head, norm = kind("output"), FLOAT_BYTES * dims.d_model
    return ModelShape(
        name=f"{name} {type_name}",
        layers=layers,
        head_bytes=dims.vocab_size * head.row_bytes(dims.d_model) + norm,
        embedding_bytes=0 if dims.tied else dims.vocab_size * kind("token_embd").row_bytes(dims.d_model),
        d_model=dims.d_model,
        vocab_size=dims.vocab_size,
        gpu_head_bytes=dims.vocab_size * planes_row_bytes(head, dims.d_model) + norm if rearranged else None,
    )


def predictor_shape(kind: str, name: str, *, rank: int = 256, total_bytes: int = 0) -> PredictorShape:
    """A predictor for a named model: dense, exact, gate_threshold, weighted_threshold, shift_threshold, low_rank (of
    that rank, Q4_0), sign_bits, or bytes (`total_bytes` over all layers). ValueError for another kind."""
    dims = PUBLISHED[name]
    makers = {
        "dense": PredictorShape.dense,
        "exact": PredictorShape.of_gate,
        "gate_threshold": PredictorShape.of_gate,
        "weighted_threshold": PredictorShape.of_gate,
        "shift_threshold": lambda: PredictorShape.of_gate(dims.d_model),
        "low_rank": lambda: PredictorShape.low_rank(rank, dims.d_model, Q4_0),
        "sign_bits": lambda: PredictorShape.sign_bits(dims.d_model),
        "bytes": lambda: PredictorShape.of_bytes(total_bytes // dims.n_layers, dims.d_ffn),
    }
    if kind not in makers:
        raise ValueError(f"predictor {kind!r} is none of {', '.join(makers)}")
    return makers[kind]()
