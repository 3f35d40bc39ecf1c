"""select_active in Triton: flags and a count per tile, then compaction; no atomics and no program waits for another.

    slot(i) = Σ counts of the tiles before i's + the flags before i in its tile       (exclusive scan of integers)

The two-pass scan of Blelloch ("Prefix Sums and Their Applications", 1990), its middle pass left
out: a layer has so few tiles that every program adds up the counts before its own. Sums are of
integers in a fixed order, so the list is the same bits every time.

The halves are apart because other kernels end in flags too: they call `store_flags` and then the
launcher `compact`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, INTS, Build
from pinfer.kernels.select_active.reference import Active, check_flags, check_inputs

# 256 neurons a program: 112 of them at N = 28,672, about one for each SM of an H100. In one warp, so
# that the count needs no barrier and gfx942's 64 lanes load 16 bytes each as well.
TILE, TILE_WARPS, MAX_BLOCK_T = 256, 1, 4
# A flag a thread, and no wider: flag, scan and slot then share one layout. With 16 flags a thread, loaded
# at once, sm_90 code moved flags and addresses through shared memory: 560 instructions and 32 stores
# there, against 208 and 3.
COMPACT_BLOCK, COMPACT_WARPS = 256, 8
# Tile counts a program adds at a time, 4 a thread: one step for 262,144 neurons in tiles of 256.
MAX_COUNTS_BLOCK = 1024


@triton.jit
def store_flags(flags_ptr, tile_counts_ptr, n, active, neurons):
    """Write one tile's flags and their count; called once by program `i` of axis 0, which has tile `i`.

    n: int32 [tile], its neurons; active: int32 [tile] of 0 and 1, and 0 for every n >= neurons.
    """
    tl.store(flags_ptr + n, active.to(tl.uint8), mask=n < neurons)
    tl.store(tile_counts_ptr + tl.program_id(0), tl.sum(active, axis=0))


@triton.jit
def load_threshold(threshold_ptr, n, neurons, PER_NEURON: tl.constexpr):
    """The thresholds of neurons n, in one load for all of them where they share it."""
    if PER_NEURON:
        threshold = tl.load(threshold_ptr + n, mask=n < neurons, other=0)
    else:
        threshold = tl.broadcast_to(tl.load(threshold_ptr), n.shape)
    return threshold


@triton.jit
def _threshold_kernel(
    scores_ptr, threshold_ptr, flags_ptr, tile_counts_ptr, mask_ptr, tokens, neurons,
    PER_NEURON: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    threshold = load_threshold(threshold_ptr, n, neurons, PER_NEURON).to(tl.float32)  # [BLOCK_N]
    active = tl.zeros([BLOCK_N], tl.int32)
    for first in range(0, tokens, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        at = token.to(tl.int64)[:, None] * neurons + n[None, :]
        inside = (token < tokens)[:, None] & (n < neurons)[None, :]
        score = tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_N]
        used = tl.where(score <= threshold[None, :], 0, tl.where(inside, 1, 0))  # NaN is used
        if HAS_MASK:
            tl.store(mask_ptr + at, used.to(tl.uint8), mask=inside)
        active |= tl.max(used, axis=0)
    store_flags(flags_ptr, tile_counts_ptr, n, active, neurons)


@triton.jit
def _compact_kernel(
    flags_ptr, tile_counts_ptr, indices_ptr, count_ptr, neurons,
    TILES_A_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    flag = tl.load(flags_ptr + n, mask=n < neurons, other=0)  # [BLOCK_N]
    active = tl.where(flag != 0, 1, 0)
    tiles_before = block * TILES_A_BLOCK
    counts = tl.zeros([BLOCK_TILES], tl.int32)
    for first in range(0, tiles_before, BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        counts += tl.load(tile_counts_ptr + tile, mask=tile < tiles_before, other=0)  # [BLOCK_TILES]
    before = tl.sum(counts, axis=0)
    slot = before + tl.cumsum(active, axis=0) - active
    tl.store(indices_ptr + slot, n, mask=active != 0)
    if block == tl.num_programs(0) - 1:
        tl.store(count_ptr, before + tl.sum(active, axis=0))


def compact(flags: torch.Tensor, tile_counts: torch.Tensor, tile: int) -> Active:
    """List the neurons whose flag is not zero, without waiting for the device.

    flags: uint8 [N], contiguous; tile_counts: int32 [ceil(N / tile)], contiguous, how many flags of
    neurons tile·i to tile·i + tile - 1 are not zero (`store_flags` writes both); tile: a power of two.

    Counts that do not belong to the flags give a wrong list, or writes outside it.
    Raises ValueError for other shapes and types.
    """
    check_flags(flags, tile_counts, tile)
    neurons, device = flags.numel(), flags.device
    if neurons == 0:
        return Active(torch.empty(0, dtype=torch.int32, device=device), flags.new_zeros(1, dtype=torch.int32))
    active = Active(
        torch.empty(neurons, dtype=torch.int32, device=device), torch.empty(1, dtype=torch.int32, device=device)
    )
    constants = _compact_constants(tile, tile_counts.numel())
    _compact_kernel[(triton.cdiv(neurons, constants["BLOCK_N"]),)](
        flags, tile_counts, active.indices, active.count, neurons, **constants, num_warps=COMPACT_WARPS, num_stages=1
    )
    return active


def select_active(scores: torch.Tensor, threshold: torch.Tensor) -> Active:
    check_inputs(scores, threshold)
    return _select(scores, threshold, None)


def select_with_mask(scores: torch.Tensor, threshold: torch.Tensor) -> tuple[Active, torch.Tensor]:
    """`select_active` and, out of the same pass, the mask bool [T, N] of which token uses which neuron.

    scores: float32 [T, N]; threshold: float32 [1] or [N]. Raises ValueError for other shapes.
    """
    check_inputs(scores, threshold)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    return _select(scores, threshold, mask), mask


def _select(scores: torch.Tensor, threshold: torch.Tensor, mask: torch.Tensor | None) -> Active:
    tokens, neurons = scores.shape
    tiles = triton.cdiv(neurons, TILE)
    flags = torch.empty(neurons, dtype=torch.uint8, device=scores.device)
    tile_counts = torch.empty(tiles, dtype=torch.int32, device=scores.device)
    if neurons:
        _threshold_kernel[(tiles,)](
            scores.contiguous(), threshold.contiguous(), flags, tile_counts,
            flags if mask is None else mask.view(torch.uint8), tokens, neurons,
            **_threshold_constants(tokens, threshold.numel() > 1, mask is not None), num_warps=TILE_WARPS, num_stages=1,
        )  # fmt: skip
    return compact(flags, tile_counts, TILE)


def _threshold_constants(tokens: int, per_neuron: bool, has_mask: bool) -> dict[str, int]:
    block_t = min(MAX_BLOCK_T, triton.next_power_of_2(max(1, tokens)))
    return {"PER_NEURON": per_neuron, "HAS_MASK": has_mask, "BLOCK_T": block_t, "BLOCK_N": TILE}


def _compact_constants(tile: int, tiles: int) -> dict[str, int]:
    block = max(tile, COMPACT_BLOCK)
    counts = min(MAX_COUNTS_BLOCK, max(32, triton.next_power_of_2(tiles)))
    return {"TILES_A_BLOCK": block // tile, "BLOCK_N": block, "BLOCK_TILES": counts}


def builds() -> list[Build]:
    to_flags = {"scores_ptr": FLOATS, "threshold_ptr": FLOATS, "flags_ptr": BYTES, "tile_counts_ptr": INTS}
    to_flags |= {"mask_ptr": BYTES, "neurons": "i32"}
    to_list = {"flags_ptr": BYTES, "tile_counts_ptr": INTS, "indices_ptr": INTS, "count_ptr": INTS, "neurons": "i32"}
    return [
        *(
            Build(
                f"select_active threshold, 1 token, {'a threshold each' if per_neuron else 'one threshold'}",
                _threshold_kernel, to_flags, {**_threshold_constants(1, per_neuron, has_mask=False), "tokens": 1},
                TILE_WARPS, multiples_of_16=("neurons",), wide_share=0.8,
            )  # the JIT makes a constant of an argument of 1
            for per_neuron in (False, True)
        ),
        Build(
            "select_active threshold, many tokens", _threshold_kernel, {**to_flags, "tokens": "i32"},
            _threshold_constants(16, per_neuron=True, has_mask=True),
            TILE_WARPS, multiples_of_16=("neurons",), wide_share=0.8,
        ),
        *(
            Build(
                f"select_active compact, {tiles} tiles of {tile}", _compact_kernel, to_list,
                _compact_constants(tile, tiles), COMPACT_WARPS, multiples_of_16=("neurons",),
            )
            for tile, tiles in ((TILE, 112), (64, 448), (8, 3584))
        ),
    ]  # fmt: skip
