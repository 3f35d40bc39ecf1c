"""Block formats of GGUF weights: their names, ids and geometry, and the tensor that carries them.

The lowest layer, shared by `pinfer.formats` (which finds the blocks in a file) and
`pinfer.kernels` (which computes on them), so that neither has to import the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

# How a row's blocks lie in memory: "blocks", as in a GGUF file, or "planes", rearranged for a GPU's
# 16-byte loads (`pinfer.kernels.planes`).
Layout = Literal["blocks", "planes"]


@dataclass(frozen=True)
class QuantType:
    """One way to store a row of weights.

    `block_size` weights share one block of `block_bytes` bytes; unquantised types have blocks of
    one weight. `ggml_id` is the type's number in a GGUF file.
    """

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int

    def __str__(self) -> str:
        return self.name

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; ValueError unless whole blocks fill it."""
        if columns % self.block_size:
            raise ValueError(f"{columns} columns are no multiple of {self}'s block of {self.block_size} weights")
        return columns // self.block_size * self.block_bytes


F32 = QuantType("F32", 0, 1, 4)
F16 = QuantType("F16", 1, 1, 2)
Q4_0 = QuantType("Q4_0", 2, 32, 18)
Q4_1 = QuantType("Q4_1", 3, 32, 20)
Q5_0 = QuantType("Q5_0", 6, 32, 22)
Q5_1 = QuantType("Q5_1", 7, 32, 24)
Q8_0 = QuantType("Q8_0", 8, 32, 34)
Q2_K = QuantType("Q2_K", 10, 256, 84)
Q3_K = QuantType("Q3_K", 11, 256, 110)
Q4_K = QuantType("Q4_K", 12, 256, 144)
Q5_K = QuantType("Q5_K", 13, 256, 176)
Q6_K = QuantType("Q6_K", 14, 256, 210)
IQ4_NL = QuantType("IQ4_NL", 20, 32, 18)
IQ4_XS = QuantType("IQ4_XS", 23, 256, 136)
BF16 = QuantType("BF16", 30, 1, 2)

# Those that `quantize` makes, and those that are read alone.
WRITTEN_TYPES: tuple[QuantType, ...] = (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)
QUANT_TYPES: tuple[QuantType, ...] = (*WRITTEN_TYPES, IQ4_NL, IQ4_XS)
BY_ID: dict[int, QuantType] = {t.ggml_id: t for t in QUANT_TYPES}
BY_NAME: dict[str, QuantType] = {t.name: t for t in QUANT_TYPES}

_OF_DTYPE = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


# Bytes that 32 weights take in the planes layout: quants, higher bits, scales; and those of the
# scales that 256 weights share.
PLANE_BYTES: dict[str, tuple[int, int]] = {
    "F32": (128, 0), "F16": (64, 0), "BF16": (64, 0),
    "Q8_0": (32 + 2, 0), "Q4_0": (16 + 2, 0), "Q4_1": (16 + 4, 0), "Q5_0": (16 + 4 + 2, 0), "Q5_1": (16 + 4 + 4, 0),
    "Q2_K": (8 + 2, 4), "Q3_K": (8 + 4 + 2, 4), "Q4_K": (16 + 2, 4), "Q5_K": (16 + 4 + 2, 4), "Q6_K": (16 + 8 + 2, 4),
    "IQ4_NL": (32 + 2, 0), "IQ4_XS": (32 + 2, 4),
}  # fmt: skip


def planes_row_bytes(kind: QuantType, columns: int) -> int:
    """Bytes of a row in the planes layout, a multiple of 32.

    Floats fill up groups of 32 columns; the planes of quantised types have room for a multiple of 8
    such groups, so that each starts at a multiple of 16 bytes.
    """
    kind.row_bytes(columns)  # whole blocks, or ValueError
    group_bytes, super_bytes = PLANE_BYTES[kind.name]
    groups = -(-columns // 32)
    if kind.block_size > 1:
        groups = -(-groups // 8) * 8
    return -(-(group_bytes * groups + super_bytes * groups // 8) // 32) * 32


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix of weights kept in its stored blocks.

    `blocks` is uint8 `[rows, row_bytes]`, each row contiguous (rows may be strided apart); it is
    often a view of a memory-mapped file and must not be written to. `columns` counts weights.
    `layout` says how the bytes of a row lie; kernels on the CPU read "blocks", those on a GPU "planes".
    """

    blocks: torch.Tensor
    type: QuantType
    columns: int
    layout: Layout = "blocks"

    def __post_init__(self) -> None:
        in_planes = self.layout == "planes"
        expected = planes_row_bytes(self.type, self.columns) if in_planes else self.type.row_bytes(self.columns)
        if self.blocks.dtype != torch.uint8 or self.blocks.dim() != 2 or self.blocks.shape[1] != expected:
            raise ValueError(
                f"blocks must be uint8 [rows, {expected}] for {self.columns} columns of {self.type}, "
                f"not {self.blocks.dtype} {list(self.blocks.shape)}"
            )

    @staticmethod
    def from_dense(weight: torch.Tensor) -> QuantTensor:
        """View a float32, float16 or bfloat16 matrix `[rows, columns]` as blocks of one weight."""
        if weight.dtype not in _OF_DTYPE or weight.dim() != 2:
            raise ValueError(f"expected a 2-D float tensor, not {weight.dtype} {list(weight.shape)}")
        if not weight.is_contiguous() or weight.stride(1) != 1:  # a width of 1 may have any stride
            weight = weight.clone(memory_format=torch.contiguous_format)
        return QuantTensor(weight.view(torch.uint8), _OF_DTYPE[weight.dtype], weight.shape[1])

    @property
    def rows(self) -> int:
        return self.blocks.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def device(self) -> torch.device:
        return self.blocks.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored blocks."""
        return self.blocks.numel()

    def to(self, device: torch.device | str) -> QuantTensor:
        return replace(self, blocks=self.blocks.to(device))

    def __getitem__(self, rows: slice | torch.Tensor) -> QuantTensor:
        """Some rows, still as blocks: a slice is a view, an index tensor copies."""
        return replace(self, blocks=self.blocks[rows])

    def __repr__(self) -> str:
        layout = "" if self.layout == "blocks" else f", {self.layout}"
        return f"QuantTensor({self.type}, {self.rows}x{self.columns}, {self.device}{layout})"
