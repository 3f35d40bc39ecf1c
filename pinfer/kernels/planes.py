"""Rearranges GGUF rows for a GPU: quants, higher bits and scales in planes of their own, nothing lost.

GGUF's blocks of 34, 18 or 210 bytes cannot be read 16 bytes at a time. In the planes layout a row is

    quants | higher bits | scales of 32 weights | scales of 256 weights

with every plane at a multiple of 16 bytes, so that a thread takes the 16 bytes of one group of 32
weights in one load. Sizes are GGUF's own, but that the 6-bit scales of Q4_K and Q5_K get a byte each
(4.625 bits a weight instead of 4.5), that K-quants with one fp16 scale get room for two, and that the
levels of IQ4_NL and IQ4_XS are stored for their numbers, in a byte each (8.5 and 8.6 bits).

| plane | in 32 weights |
|---|---|
| quants | Q8_0, IQ4: bytes q + 128, all first halves of the groups, then all second halves. Four bits and more: 16 bytes, byte j holding weights j (low half) and 16 + j. Q2_K, Q3_K: as higher bits of two |
| two higher bits (Q6_K) | four uint16 words; plane i of word w at bits 4 (i mod 4) + 2 (i div 4) and the next |
| one higher bit (Q5, Q3_K) | four bytes; plane i of byte w at bit i |
| scales | fp16 d (Q8_0, Q4_0, Q5_0, IQ4_NL), with fp16 m (Q4_1, Q5_1); uint8 scale and minimum (Q4_K, Q5_K); int8 for each 16 weights (Q3_K, Q6_K); int8 and a zero (IQ4_XS); the byte of two nibbles for each 16 weights (Q2_K) |
| of 256 | fp16 d and dmin |

Weight 4w + k of a group is number w of plane 2k, weight 16 + 4w + k of plane 2k + 1 (w, k in 0..3):
the nibbles of a 32-bit word of quants, from the lowest, are its planes 0 to 7. Floats stay in their
order; their rows grow to a multiple of 32 columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pinfer import quant
from pinfer.kernels import blocks as ggml
from pinfer.quant import PLANE_BYTES, QuantTensor, QuantType, planes_row_bytes

Tensor = torch.Tensor
GROUP = 32  # weights
CHUNK_WEIGHTS = 1 << 24  # rearranged at a time: the integers in between take a few bytes each
_FLOATS = (quant.F32, quant.F16, quant.BF16)


@dataclass(frozen=True)
class _Form:
    """How a type's groups of 32 are stored.

    quants: finds the unsigned quants uint8 [blocks, block_size] in blocks uint8 [blocks, block_bytes].
    bits: of them, low bits first; offset: what a quant loses before it is scaled.
    scales: finds the bytes [blocks, groups, n] that scale a group, and `supers` those that scale 256.
    """

    quants: Callable[[Tensor], Tensor]
    bits: tuple[int, ...]
    offset: int
    scales: Callable[[Tensor], Tensor]
    supers: Callable[[Tensor], Tensor] | None = None


def repack(weight: QuantTensor) -> QuantTensor:
    """The same weights in the planes layout, on the same device; itself if it is laid out so already.

    Costs one pass over the weights, once at load. Float rows of whole groups are not copied.
    """
    if weight.layout == "planes":
        return weight
    row_bytes = planes_row_bytes(weight.type, weight.columns)
    if weight.type in _FLOATS and row_bytes == weight.blocks.shape[1] and weight.blocks.stride(0) % 16 == 0:
        return QuantTensor(weight.blocks, weight.type, weight.columns, "planes")
    out = torch.zeros(weight.rows, row_bytes, dtype=torch.uint8, device=weight.device)
    chunk = max(1, CHUNK_WEIGHTS // max(1, weight.columns))
    for first in range(0, weight.rows, chunk):
        _rearrange(weight.blocks[first : first + chunk], weight.type, out[first : first + chunk])
    return QuantTensor(out, weight.type, weight.columns, "planes")


def planes_to_float(weight: QuantTensor) -> Tensor:
    """Expand a QuantTensor of the planes layout to float32 [rows, columns]: the formulas of `blocks`, bit for bit."""
    rows, columns = weight.shape
    if weight.type in _FLOATS:
        raw = weight.blocks[:, : weight.type.row_bytes(columns)].reshape(-1, weight.type.block_bytes)
        return ggml.blocks_to_float(raw, weight.type).reshape(rows, columns)
    planes, form = _Planes.of(weight), _FORMS[weight.type]
    quants = planes.join_quants().float().reshape(rows, columns // GROUP, 2, GROUP // 2)  # [rows, groups, halves, 16]
    scale, minimum = planes.scales_and_minima()  # [rows, groups, 1 or 2, 1]
    value = scale * (quants - form.offset)
    return (value if minimum is None else value - minimum).reshape(rows, columns)


def _rearrange(blocks: Tensor, kind: QuantType, out: Tensor) -> None:
    """Fill `out`, rows of zeros in the planes layout, from the same rows in blocks."""
    if kind in _FLOATS:
        out[:, : blocks.shape[1]] = blocks
        return
    form, rows = _FORMS[kind], blocks.shape[0]
    flat = blocks.reshape(-1, kind.block_bytes)
    quants = form.quants(flat).reshape(rows, -1, GROUP)
    planes = _Planes(out, kind, quants.shape[1])
    planes.split_quants(quants)
    planes.scales[:] = form.scales(flat).reshape(rows, quants.shape[1], -1)
    if form.supers is not None:
        planes.supers[:] = form.supers(flat).reshape(rows, -1, 4)


class _Planes:
    """Views of the planes of some rows: quants [rows, (2,) groups, n], higher bits, scales, supers."""

    def __init__(self, rows: Tensor, kind: QuantType, groups: int) -> None:
        self.rows, self.kind, self.groups = rows, kind, groups
        self.form = _FORMS[kind]
        room = -(-groups // 8) * 8
        self._at = 0
        self.parts = [self._take(4 * bits, room) for bits in self.form.bits]  # 32 quants of b bits: 4 b bytes
        group_bytes, super_bytes = PLANE_BYTES[kind.name]
        self.scales = self._take(group_bytes - 4 * sum(self.form.bits), room)
        self.supers = self._take(super_bytes, room // 8)[:, : groups // 8]

    @classmethod
    def of(cls, weight: QuantTensor) -> _Planes:
        return cls(weight.blocks, weight.type, weight.columns // GROUP)

    def _take(self, n_bytes: int, room: int) -> Tensor:
        """The next plane, [rows, groups, n_bytes]; eight-bit quants are [rows, 2, groups, 16] in memory."""
        plane = self.rows[:, self._at : self._at + n_bytes * room]
        self._at += n_bytes * room
        if n_bytes == GROUP:
            return plane.unflatten(1, (2, room, 16))[:, :, : self.groups].transpose(1, 2)
        return plane.unflatten(1, (room, n_bytes))[:, : self.groups]

    def split_quants(self, quants: Tensor) -> None:
        """Store unsigned quants uint8 [rows, groups, 32]."""
        for part, bits in zip(self.parts, self.form.bits, strict=True):
            part[:] = _PACK[bits](quants & ((1 << bits) - 1)).reshape(part.shape)
            quants = quants >> bits if bits < 8 else quants

    def join_quants(self) -> Tensor:
        """Unsigned quants uint8 [rows, groups, 32]."""
        joined, at = torch.zeros_like(self.rows[:, :1, None]), 0
        for part, bits in zip(self.parts, self.form.bits, strict=True):
            joined = joined | _UNPACK[bits](part.reshape(self.rows.shape[0], self.groups, 4 * bits)) << at
            at += bits
        return joined

    def scales_and_minima(self) -> tuple[Tensor, Tensor | None]:
        """What multiplies and what is taken off, float32 [rows, groups, 1 or 2, 1]."""
        name, scales = self.kind.name, self.scales
        if self.form.supers is None:
            halves = scales.contiguous().view(torch.float16).float()[..., None]
            return halves[:, :, :1], -halves[:, :, 1:] if name in ("Q4_1", "Q5_1") else None
        supers = self.supers.contiguous().view(torch.float16).float().repeat_interleave(8, dim=1)[..., None]
        d, dmin = supers[:, :, :1], supers[:, :, 1:]
        if name in ("Q4_K", "Q5_K"):
            return d * scales[:, :, :1, None], dmin * scales[:, :, 1:, None]
        if name == "IQ4_XS":
            return d * scales[:, :, :1].view(torch.int8)[..., None], None
        if name == "Q2_K":
            return d * (scales & 15)[..., None], dmin * (scales >> 4)[..., None]
        return d * scales.view(torch.int8)[..., None], None


def _pack_nibbles(quants: Tensor) -> Tensor:
    return quants[..., :16] | quants[..., 16:] << 4


def _by_word(quants: Tensor) -> Tensor:
    """[..., 32] in the order of weights to [..., 4 words, 8 planes]."""
    return quants.unflatten(-1, (2, 4, 4)).permute(0, 1, 3, 4, 2).flatten(-2)


def _by_weight(words: Tensor) -> Tensor:
    """The inverse of `_by_word`."""
    return words.unflatten(-1, (4, 2)).permute(0, 1, 4, 2, 3).flatten(-3)


def _small_shifts(bits: int, device: torch.device) -> Tensor:
    """Where plane i = 0..7 lies in its word of 8 · bits: two-bit quants four bits apart, as nibbles are."""
    planes = torch.arange(8, device=device)
    return planes if bits == 1 else 4 * (planes % 4) + 2 * (planes // 4)


def _pack_small(bits: int) -> Callable[[Tensor], Tensor]:
    """Quants of 1 or 2 bits [rows, groups, 32] to four words of 8 · bits bits: uint8 [rows, groups, 4 · bits]."""

    def pack(quants: Tensor) -> Tensor:
        words = (_by_word(quants).int() << _small_shifts(bits, quants.device)).sum(dim=-1)
        if bits == 1:
            return words.to(torch.uint8)
        return torch.stack([words & 255, words >> 8], dim=-1).flatten(-2).to(torch.uint8)

    return pack


def _unpack_small(bits: int) -> Callable[[Tensor], Tensor]:
    def unpack(packed: Tensor) -> Tensor:
        words = packed.int().unflatten(-1, (4, bits))
        words = words[..., 0] if bits == 1 else words[..., 0] | words[..., 1] << 8
        fields = (words[..., None] >> _small_shifts(bits, packed.device)) & ((1 << bits) - 1)
        return _by_weight(fields.to(torch.uint8))

    return unpack


_PACK: dict[int, Callable[[Tensor], Tensor]] = {
    8: lambda quants: quants.unflatten(-1, (2, 16)),
    4: _pack_nibbles,
    2: _pack_small(2),
    1: _pack_small(1),
}
_UNPACK: dict[int, Callable[[Tensor], Tensor]] = {
    8: lambda packed: packed,
    4: ggml.nibbles,
    2: _unpack_small(2),
    1: _unpack_small(1),
}


def _head(at: int, n_bytes: int) -> Callable[[Tensor], Tensor]:
    """The bytes that a block keeps at `at`."""
    return lambda blocks: blocks[:, at : at + n_bytes]


def _scale_and_minimum(blocks: Tensor) -> Tensor:
    return torch.stack(ggml.six_bit_scales(blocks), dim=-1)


def _one_half(at: int) -> Callable[[Tensor], Tensor]:
    """An fp16 number, and zero for the one that is not there."""
    return lambda blocks: torch.nn.functional.pad(blocks[:, at : at + 2], (0, 2))


def _raised(levels: Tensor) -> Tensor:
    """int8 as uint8, 128 more."""
    return levels.view(torch.uint8) ^ 128


def _signed_byte(blocks: Tensor) -> Tensor:
    scales = ggml.iq4_xs_scales(blocks).view(torch.uint8)
    return torch.stack([scales, torch.zeros_like(scales)], dim=-1)


_FORMS: dict[QuantType, _Form] = {
    quant.Q8_0: _Form(lambda blocks: blocks[:, 2:] ^ 128, (8,), 128, _head(0, 2)),
    quant.Q4_0: _Form(lambda blocks: ggml.q4_quants(blocks, 2), (4,), 8, _head(0, 2)),
    quant.Q4_1: _Form(lambda blocks: ggml.q4_quants(blocks, 4), (4,), 0, _head(0, 4)),
    quant.Q5_0: _Form(lambda blocks: ggml.q5_quants(blocks, 2), (4, 1), 16, _head(0, 2)),
    quant.Q5_1: _Form(lambda blocks: ggml.q5_quants(blocks, 4), (4, 1), 0, _head(0, 4)),
    quant.Q2_K: _Form(ggml.q2_k_quants, (2,), 0, _head(0, 16), _head(80, 4)),
    quant.Q3_K: _Form(
        ggml.q3_k_quants, (2, 1), 4, lambda blocks: ggml.q3_k_scales(blocks).view(torch.uint8), _one_half(108)
    ),
    quant.Q4_K: _Form(ggml.q4_k_quants, (4,), 0, _scale_and_minimum, _head(0, 4)),
    quant.Q5_K: _Form(ggml.q5_k_quants, (4, 1), 0, _scale_and_minimum, _head(0, 4)),
    quant.Q6_K: _Form(ggml.q6_k_quants, (4, 2), 32, _head(192, 16), _one_half(208)),
    quant.IQ4_NL: _Form(lambda blocks: _raised(ggml.iq4_quants(blocks, 2)), (8,), 128, _head(0, 2)),
    quant.IQ4_XS: _Form(lambda blocks: _raised(ggml.iq4_quants(blocks, 8)), (8,), 128, _signed_byte, _one_half(0)),
}
