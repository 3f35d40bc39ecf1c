"""What to build: the shapes of real models, the types of a file's tensors, and the list of those tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from gguf import LlamaFileType

from pinfer.placement.published import PUBLISHED, Dimensions, attention_matrices, tensor_type
from pinfer.quant import F32, QuantType

LEAST_VOCAB, MOST_VOCAB = 512, 1 << 19
CONSTANT = 32  # channels of the constant direction: one block of the types with blocks of 32
DENSITIES = (0.01, 0.95)
MOST_LAYERS = 1024


SHAPES = {
    name: PUBLISHED[name] for name in ("llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b", "mistral-7b")
} | {"tiny": Dimensions(2, 256, 1024, 4, 2, 512, 1024)}

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
    def shape(self) -> Dimensions:
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
        width, neurons = shape.d_model, shape.d_ffn
        matrices = {
            **attention_matrices(shape),
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
        """As llama.cpp mixes types, but for its exceptions by the size of a whole model."""
        return tensor_type(self.type_name, part, layer, self.n_layers)


def default_vocab(shape: Dimensions, n_layers: int) -> int:
    """The real vocabulary cut as the layers are, so that the head keeps its share of the bytes."""
    return max(LEAST_VOCAB, 32 * ceil(shape.vocab_size * n_layers / shape.n_layers / 32))


def _vector(name: str, columns: int) -> TensorSpec:
    return TensorSpec(f"{name}.weight", 0, columns, F32)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # so that NaN fails
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], not {value:g}")
