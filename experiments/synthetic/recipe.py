"""What to build: the shapes of real models, the types of a file's tensors, and the list of those tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from gguf import LlamaFileType

from pinfer.quant import BY_NAME, F32, Q4_K, Q5_K, Q6_K, QuantType

LEAST_VOCAB, MOST_VOCAB = 512, 1 << 19
CONSTANT = 32  # channels of the constant direction: one block of the types with blocks of 32
DENSITIES = (0.01, 0.95)
MOST_LAYERS = 1024


@dataclass(frozen=True)
class Shape:
    """One published model's dimensions; `n_heads` times the head's size is `d_model`."""

    n_layers: int
    d_model: int
    d_ffn: int
    n_heads: int
    n_kv_heads: int
    vocab_size: int
    context: int
    rope_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


SHAPES = {
    "llama-2-7b": Shape(32, 4096, 11008, 32, 32, 32000, 4096),
    "llama-2-13b": Shape(40, 5120, 13824, 40, 40, 32000, 4096),
    "llama-2-70b": Shape(80, 8192, 28672, 64, 8, 32000, 4096),
    "llama-3-8b": Shape(32, 4096, 14336, 32, 8, 128256, 8192, 500000.0),
    "mistral-7b": Shape(32, 4096, 14336, 32, 8, 32000, 32768, 1e6),
    "tiny": Shape(2, 256, 1024, 4, 2, 512, 1024),
}

# The base type of each mix, whose more important tensors are Q6_K.
MIXES = {"q4_k_m": Q4_K, "q5_k_m": Q5_K}
TYPES = (*(name.lower() for name in BY_NAME), *MIXES)
_FILE_TYPES = {"f32": "ALL_F32", "q3_k": "MOSTLY_Q3_K_S", "q4_k": "MOSTLY_Q4_K_S", "q5_k": "MOSTLY_Q5_K_S"}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the file: a matrix `[rows, columns]`, or a vector with no rows."""

    name: str
    rows: int
    columns: int
    type: QuantType

    @property
    def nbytes(self) -> int:
        return max(1, self.rows) * self.type.row_bytes(self.columns)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the file's bytes; ValueError names the first value out of range."""

    shape_name: str
    n_layers: int
    type_name: str
    density: float
    skew: str
    activation: str
    vocab_size: int
    gate_rank: int
    seed: int

    def __post_init__(self) -> None:
        low, high = DENSITIES
        most_rank = self.shape.d_model - CONSTANT
        _check("--layers", self.n_layers, 1, MOST_LAYERS)
        _check("--density", self.density, low, high)
        _check("--vocab", self.vocab_size, LEAST_VOCAB, MOST_VOCAB)
        _check("--gate-rank", self.gate_rank, 1, most_rank)
        _check("--seed", self.seed, 0, 2**63 - 1)

    @property
    def shape(self) -> Shape:
        return SHAPES[self.shape_name]

    @property
    def file_name(self) -> str:
        return f"{self.shape_name}-{self.n_layers}l-{self.type_name}-{self.activation}.gguf"

    @property
    def file_type(self) -> LlamaFileType:
        return LlamaFileType[_FILE_TYPES.get(self.type_name, f"MOSTLY_{self.type_name.upper()}")]

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by name, in the order of the file."""
        shape = self.shape
        width, key_width, neurons = shape.d_model, shape.n_kv_heads * shape.head_dim, shape.d_ffn
        matrices = {
            "attn_q": (width, width),
            "attn_k": (key_width, width),
            "attn_v": (key_width, width),
            "attn_output": (width, width),
            "ffn_gate": (neurons, width),
            "ffn_up": (neurons, width),
            "ffn_down": (width, neurons),
        }
        specs = [self._matrix("token_embd", self.vocab_size, width)]
        for layer in range(self.n_layers):
            block = [self._matrix(f"blk.{layer}.{name}", *size, layer) for name, size in matrices.items()]
            specs += [_vector(f"blk.{layer}.attn_norm", width), *block[:4]]
            specs += [_vector(f"blk.{layer}.ffn_norm", width), *block[4:]]
        specs += [_vector("output_norm", width), self._matrix("output", self.vocab_size, width)]
        return {spec.name: spec for spec in specs}

    def _matrix(self, name: str, rows: int, columns: int, layer: int = 0) -> TensorSpec:
        return TensorSpec(f"{name}.weight", rows, columns, self._type(name.rsplit(".", 1)[-1], layer))

    def _type(self, part: str, layer: int) -> QuantType:
        """As llama.cpp mixes Q4_K_M and Q5_K_M, but for its exceptions by the size of a whole model."""
        if self.type_name not in MIXES:
            return BY_NAME[self.type_name.upper()]
        important = part in ("attn_v", "ffn_down") and _use_more_bits(layer, self.n_layers)
        return Q6_K if important or part == "output" else MIXES[self.type_name]


def default_vocab(shape: Shape, n_layers: int) -> int:
    """The real vocabulary cut as the layers are, so that the head keeps its share of the bytes."""
    return max(LEAST_VOCAB, 32 * ceil(shape.vocab_size * n_layers / shape.n_layers / 32))


def _vector(name: str, columns: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", 0, columns, F32)


def _use_more_bits(layer: int, n_layers: int) -> bool:
    """llama.cpp's choice of layers: the first and the last eighth, and every third in between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # so that NaN fails
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], not {value:g}")
