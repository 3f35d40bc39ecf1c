"""sign_select in Triton: XOR of packed signs, popcount, threshold, flags and tile counts in one launch; then compaction.

    score[t, i] = D - 2 · popcount(x_bits[t] ^ w_bits[i])          (SparseInfer, Shin et al. 2024)

A layer's signs are 5.6 MB at 7B and 29 MB at 70B: 1.7 and 8.8 µs of an H100's 3.35 TB/s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, INTS, Build
from pinfer.kernels.select_active.gpu import compact, load_threshold, store_flags
from pinfer.kernels.select_active.reference import Selection
from pinfer.kernels.sign_select.reference import check_inputs, words_for

# 64 neurons are 172 programs at N = 11,008, one wave on an H100. For one token every program packs
# x's signs itself: 16 KB of x, out of L2, beside its 32 KB of signs (D = 4096), in the shadow of
# whose loads it should stay, where a launch of its own costs about 2 µs (both estimates, not measured).
BLOCK_N, NUM_WARPS = 64, 8
# Words of one program's signs, 64 registers a thread. Many tokens get half: x is packed before, and
# with 16,384 they take 217 registers on sm_90 at D = 8192, which leaves one program an SM, against 99.
MAX_TILE_WORDS, MAX_TILE_WORDS_MANY = 16384, 8192
PACK_WORDS, PACK_WARPS = 16, 2  # x's words a program of the packing launch, by 16-byte loads on gfx942 too


@triton.jit
def _popcount(bits):
    """How many of 32 bits are set. LLVM knows this form: it becomes one POPC in SASS, v_bcnt on gfx942."""
    bits = bits.to(tl.uint32, bitcast=True)
    bits -= (bits >> 1) & 0x55555555
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _sign_words(x_ptr, word, columns):
    """The words of one token's signs that `word` names; bits past its columns are 0."""
    bit = tl.arange(0, 32)
    column = word[:, None] * 32 + bit[None, :]
    x = tl.load(x_ptr + column, mask=column < columns, other=0.0).to(tl.float32)  # [words, 32]
    return tl.sum(tl.where(x < 0.0, 1, 0) << bit[None, :], axis=1)


@triton.jit
def _pack_kernel(x_ptr, x_words_ptr, columns, words, BLOCK_W: tl.constexpr):
    word = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    token = tl.program_id(1).to(tl.int64)
    tl.store(x_words_ptr + token * words + word, _sign_words(x_ptr + token * columns, word, columns), mask=word < words)


@triton.jit
def _sign_select_kernel(
    x_ptr, signs_ptr, threshold_ptr, flags_ptr, tile_counts_ptr, mask_ptr, tokens, neurons, columns, words,
    ONE_TOKEN: tl.constexpr, PER_NEURON: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    word = tl.arange(0, BLOCK_W)
    inside = (n < neurons)[:, None] & (word < words)[None, :]
    signs = tl.load(signs_ptr + n.to(tl.int64)[:, None] * words + word[None, :], mask=inside, other=0)  # [BLOCK_N, W]
    threshold = load_threshold(threshold_ptr, n, neurons, PER_NEURON)  # [BLOCK_N]
    if ONE_TOKEN:  # x itself
        differing = tl.sum(_popcount(signs ^ _sign_words(x_ptr, word, columns)[None, :]), axis=1)
        active = _above(columns - 2 * differing, threshold, n, neurons)
    else:  # its words, packed by _pack_kernel
        active = tl.zeros([BLOCK_N], tl.int32)
        for _ in range(tokens):
            x_words = tl.load(x_ptr + word, mask=word < words, other=0)  # [W]
            differing = tl.sum(_popcount(signs ^ x_words[None, :]), axis=1)
            used = _above(columns - 2 * differing, threshold, n, neurons)
            tl.store(mask_ptr + n, used.to(tl.uint8), mask=n < neurons)
            active |= used
            x_ptr += words
            mask_ptr += neurons
    store_flags(flags_ptr, tile_counts_ptr, n, active, neurons)


@triton.jit
def _above(score, threshold, n, neurons):
    return tl.where((score > threshold) & (n < neurons), 1, 0)


def sign_select(x: torch.Tensor, signs: torch.Tensor, threshold: torch.Tensor) -> Selection:
    check_inputs(x, signs, threshold)
    (tokens, columns), (neurons, words) = x.shape, signs.shape
    x, constants = x.contiguous(), _constants(tokens, words, threshold.numel() > 1)
    tile = constants["BLOCK_N"]
    tiles = triton.cdiv(neurons, tile)
    flags = torch.empty(neurons, dtype=torch.uint8, device=x.device)
    tile_counts = torch.empty(tiles, dtype=torch.int32, device=x.device)
    mask = None if tokens == 1 else torch.empty(tokens, neurons, dtype=torch.bool, device=x.device)
    if tokens != 1:
        x = _packed(x, words)
    if neurons:
        _sign_select_kernel[(tiles,)](
            x, signs.contiguous(), threshold.contiguous(), flags, tile_counts,
            flags if mask is None else mask.view(torch.uint8), tokens, neurons, columns, words,
            **constants, num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
    return Selection(compact(flags, tile_counts, tile), mask)


def _packed(x: torch.Tensor, words: int) -> torch.Tensor:
    """int32 [T, words] of contiguous x."""
    x_words = torch.empty(x.shape[0], words, dtype=torch.int32, device=x.device)
    _pack_kernel[(triton.cdiv(words, PACK_WORDS), x.shape[0])](
        x, x_words, x.shape[1], words, BLOCK_W=PACK_WORDS, num_warps=PACK_WARPS, num_stages=1
    )
    return x_words


def _constants(tokens: int, words: int, per_neuron: bool) -> dict[str, int]:
    block_w = triton.next_power_of_2(max(1, words))
    block_n = min(BLOCK_N, max(1, (MAX_TILE_WORDS if tokens == 1 else MAX_TILE_WORDS_MANY) // block_w))
    return {"ONE_TOKEN": tokens == 1, "PER_NEURON": per_neuron, "BLOCK_N": block_n, "BLOCK_W": block_w}


def builds() -> list[Build]:
    arguments = {"signs_ptr": INTS, "threshold_ptr": INTS, "flags_ptr": BYTES, "tile_counts_ptr": INTS}
    arguments |= {"mask_ptr": BYTES, **dict.fromkeys(("tokens", "neurons", "columns", "words"), "i32")}
    sixteens = ("neurons", "columns", "words")
    pack = {"x_ptr": FLOATS, "x_words_ptr": INTS, "columns": "i32", "words": "i32"}
    return [
        Build(
            "sign_select pack", _pack_kernel, pack, {"BLOCK_W": PACK_WORDS}, PACK_WARPS,
            multiples_of_16=("columns", "words"), wide_share=1.0,
        ),
        *(
            Build(
                f"sign_select {'1 token' if tokens == 1 else 'many tokens'}, D = {width}",
                _sign_select_kernel, {"x_ptr": FLOATS if tokens == 1 else INTS} | arguments,
                _constants(tokens, words_for(width), per_neuron=True), NUM_WARPS,
                multiples_of_16=sixteens, wide_share=0.75,
            )
            for tokens in (1, 16)
            for width in (4096, 5120, 8192, 16384)
        ),
    ]  # fmt: skip
