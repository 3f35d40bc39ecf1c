"""attention in Triton: flash-decoding over the cache (Dao et al. 2023), new keys straight from the step's own tensors.

    o_t = Σ_p softmax_p(scale · q_t · k_p) v_p   over the positions p that token t sees

The rows of one program are the queries that share a KV head: (token, group) pairs, so that a key is
read once for all of them. The cached positions are shared out over up to 64 programs, the splits;
split 0 also attends to the new tokens. Those are read from `key` and `value` and stored in the cache
by their own row's program: no program reads what another one writes, and no launch of its own
stores them.

`start` is read on the device and the grid follows from shapes alone, so one recorded launch serves
every position. Each split leaves its online softmax (peak, total, mixed) and `_combine_kernel` adds
the splits in one fixed order. Positions that no token has filled are never read: they may hold NaN.

All is float32 in registers, prompts included, which go in tiles of 8 rows. `tl.dot` does not pay here:
in float32 ("ieee", tiles of 32 x 16 over 8 warps) each FMA needs 1.5 numbers from shared memory, and
tensor cores round to tf32.
Torch's fused attention, good at prompts, takes slices of the cache: the host would wait for `start`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import FLOATS, LONGS, Build
from pinfer.kernels.attention.reference import check_inputs
from pinfer.kernels.softcap.gpu import hyperbolic_tangent

LOG2_E = 1.4426950408889634  # goes into the scale, as exp2 is one instruction and exp two
NO_WINDOW = 2**31 - 1
PROGRAMS_PER_SM, MOST_SPLITS = 4, 64
PROGRAMS_INTERPRETED = 8  # without a device: few, as each costs the interpreter 0.3 ms
MOST_ROWS = 8
NUM_WARPS = 4


@triton.jit
def _shares(start_ptr, tokens, context, window, splits, BLOCK_P: tl.constexpr):
    """Whether the tokens fit the cache, where they start, the first cached position they see, and a split's share."""
    start = tl.load(start_ptr)
    fits = (start >= 0) & (start + tokens <= context)
    start = tl.where(fits, start, 0).to(tl.int32)
    first = tl.maximum(start - window + 1, 0)
    share = tl.cdiv(tl.cdiv(start - first, splits), BLOCK_P) * BLOCK_P
    return fits, start, first, tl.maximum(share, BLOCK_P)


@triton.jit
def _attend(
    q, place, keys_ptr, values_ptr, stride, first, end, window, peak, total, mixed,
    softcap, CAPPED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax of rows at `place` [R] over places first to end - 1, whose keys lie `stride` apart.

    CAPPED: q · k becomes softcap · tanh(q · k), to base 2 only then.

    Every BLOCK_P-th place has a softmax of its own (peak, total [R, P], mixed [R, P, D]): only q · k is
    summed over threads here, and no warp waits for another.
    """
    offset, column = tl.arange(0, BLOCK_P)[None, :, None], tl.arange(0, BLOCK_D)[None, None, :]
    at = offset * stride + column  # one block of rows: 32 bits are enough
    keys_ptr += first.to(tl.int64) * stride
    values_ptr += first.to(tl.int64) * stride
    # Two tiles are copied to shared memory ahead of the one in use: left to the compiler, loads wait for each other.
    for begin in tl.range(first, end, BLOCK_P, num_stages=3):
        mask = (begin + offset < end) & (column < HEAD_DIM)
        k = tl.load(keys_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [1, P, D]
        v = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [1, P, D]
        keys_ptr += BLOCK_P * stride
        values_ptr += BLOCK_P * stride
        p = (begin + tl.arange(0, BLOCK_P))[None, :]
        age = place[:, None] - p
        visible = (p < end) & (age >= 0) & (age < window)
        scores = tl.sum(q * k, axis=2)  # [R, P]
        if CAPPED:
            scores = softcap * hyperbolic_tangent(scores)
        scores = tl.where(visible, scores, float("-inf"))
        top = tl.maximum(peak, scores)
        base = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet: -inf - -inf would be NaN
        weight, keep = tl.exp2(scores - base), tl.exp2(peak - base)
        total = total * keep + weight
        mixed = mixed * keep[:, :, None] + weight[:, :, None] * v
        peak = top
    return peak, total, mixed


@triton.jit
def _store(cache_ptr, new_ptr, token, kv_heads, column, mask, HEAD_DIM: tl.constexpr):
    """Copy rows of tokens [R] of one KV head from [T, kv_heads, HEAD_DIM] to the cache's [T, HEAD_DIM]."""
    token = token.to(tl.int64)[:, None]
    new = tl.load(new_ptr + token * kv_heads * HEAD_DIM + column[None, :], mask=mask)  # [R, D]
    tl.store(cache_ptr + token * HEAD_DIM + column[None, :], new, mask=mask)


@triton.jit
def _attention_kernel(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, start_ptr, mixed_ptr, peak_ptr, total_ptr,
    tokens, context, window, scale, softcap,
    CAPPED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    kv_head, split = tl.program_id(1), tl.program_id(2)
    kv_heads = tl.num_programs(1)
    fits, start, first, share = _shares(start_ptr, tokens, context, window, tl.num_programs(2), BLOCK_P)
    begin = first + split * share
    if (split > 0) & (begin >= start):
        return
    # Rows of this KV head: row r is token r // GROUP, head kv_head · GROUP + r % GROUP. 64-bit bases, 32-bit tiles.
    first_row = tl.program_id(0) * BLOCK_R
    row, column = first_row + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    token, first_token = row // GROUP, first_row // GROUP
    inside = (token < tokens)[:, None] & (column < HEAD_DIM)[None, :]
    head = (first_token.to(tl.int64) * kv_heads + kv_head) * GROUP  # of [T · heads]
    local = (token - first_token) * kv_heads * GROUP + row % GROUP  # [R], from `head` on
    at = local[:, None] * HEAD_DIM + column[None, :]
    cache = kv_head.to(tl.int64) * context * HEAD_DIM
    key_ptr += kv_head * HEAD_DIM
    value_ptr += kv_head * HEAD_DIM
    if fits & (split == 0):
        stored = inside & (row % GROUP == 0)[:, None]
        new = cache + start.to(tl.int64) * HEAD_DIM
        _store(keys_ptr + new, key_ptr, token, kv_heads, column, stored, HEAD_DIM)
        _store(values_ptr + new, value_ptr, token, kv_heads, column, stored, HEAD_DIM)

    q = tl.load(query_ptr + head * HEAD_DIM + at, mask=inside, other=0.0).to(tl.float32)
    q = (q * scale)[:, None, :]  # [R, 1, D]
    peak = tl.full([BLOCK_R, BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_P], tl.float32)
    mixed = tl.zeros([BLOCK_R, BLOCK_P, BLOCK_D], tl.float32)
    oldest = first_token - window + 1  # place, from `start` on, of the oldest key that a row of this tile sees
    peak, total, mixed = _attend(
        q, start + token, keys_ptr + cache, values_ptr + cache, HEAD_DIM,
        tl.maximum(begin, start + oldest), tl.minimum(begin + share, start), window, peak, total, mixed,
        softcap, CAPPED, HEAD_DIM, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    if fits & (split == 0):
        end = tl.minimum((first_row + BLOCK_R - 1) // GROUP + 1, tokens)
        peak, total, mixed = _attend(
            q, token, key_ptr, value_ptr, kv_heads * HEAD_DIM, tl.maximum(oldest, 0), end, window,
            peak, total, mixed, softcap, CAPPED, HEAD_DIM, BLOCK_P, BLOCK_D,
        )  # fmt: skip
    top = tl.max(peak, axis=1)
    weight = tl.exp2(peak - tl.where(top == float("-inf"), 0.0, top)[:, None])
    head += split.to(tl.int64) * tokens * kv_heads * GROUP
    tl.store(mixed_ptr + head * HEAD_DIM + at, tl.sum(mixed * weight[:, :, None], axis=1), mask=inside)
    tl.store(peak_ptr + head + local, top, mask=token < tokens)
    tl.store(total_ptr + head + local, tl.sum(total * weight, axis=1), mask=token < tokens)


@triton.jit
def _combine_kernel(
    mixed_ptr, peak_ptr, total_ptr, start_ptr, out_ptr, tokens, context, window,
    HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0).to(tl.int64)  # of [T · heads]
    fits, start, first, share = _shares(start_ptr, tokens, context, window, SPLITS, BLOCK_P)
    split, column = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    used = (split == 0) | (first + split * share < start)  # the others left nothing
    at = split.to(tl.int64) * tl.num_programs(0) + head
    peak = tl.load(peak_ptr + at, mask=used, other=float("-inf"))  # [S]
    total = tl.load(total_ptr + at, mask=used, other=0.0)  # [S]
    mask = used[:, None] & (column < HEAD_DIM)[None, :]
    mixed = tl.load(mixed_ptr + at[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)  # [S, D]
    weight = tl.exp2(peak - tl.max(peak, axis=0))
    out = tl.sum(mixed * weight[:, None], axis=0) / tl.sum(total * weight, axis=0)
    tl.store(out_ptr + head * HEAD_DIM + column, tl.where(fits, out, float("nan")), mask=column < HEAD_DIM)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """As the reference; on a GPU, tokens that do not fit the context leave the cache alone and give NaN."""
    check_inputs(query, key, value, keys, values, start, softcap)
    if not (keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype == torch.float32):
        raise ValueError("the cache must be contiguous float32")
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    tokens, heads, head_dim = query.shape
    kv_heads, context, _ = keys.shape
    group = heads // kv_heads
    blocks = _blocks(tokens * group, head_dim, softcap is not None)
    tiles = triton.cdiv(tokens * group, blocks["BLOCK_R"])
    splits = _splits(_programs(query.device) // (kv_heads * tiles), triton.cdiv(context, blocks["BLOCK_P"]))
    limits = (tokens, context, NO_WINDOW if window is None else window)
    mixed = torch.empty(splits, tokens, heads, head_dim, dtype=torch.float32, device=query.device)
    peak = torch.empty(splits, tokens, heads, dtype=torch.float32, device=query.device)
    total = torch.empty_like(peak)
    _attention_kernel[(tiles, kv_heads, splits)](
        query, key, value, keys, values, start, mixed, peak, total, *limits,
        scale * LOG2_E if softcap is None else scale / softcap, 0.0 if softcap is None else softcap * LOG2_E,
        CAPPED=softcap is not None, GROUP=group, HEAD_DIM=head_dim, **blocks, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    out = torch.empty(tokens, heads, head_dim, dtype=torch.float32, device=query.device)
    _combine_kernel[(tokens * heads,)](
        mixed, peak, total, start, out, *limits, HEAD_DIM=head_dim, SPLITS=splits,
        BLOCK_P=blocks["BLOCK_P"], BLOCK_D=blocks["BLOCK_D"], num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def _blocks(rows: int, head_dim: int, capped: bool = False) -> dict[str, int]:
    """The tile: of `rows` queries that share a KV head up to 8, and as many positions as registers hold.

    4,096 sums are 32 registers a thread of 48 (one row) to 128 (8 rows), so that 4 programs fit an SM. Beside a
    tanh, 8 rows of 256 numbers do not fit without spills.
    """
    block_d = triton.next_power_of_2(head_dim)
    most = MOST_ROWS // 2 if capped and block_d > 128 else MOST_ROWS
    block_r = min(most, triton.next_power_of_2(rows))
    block_p = max(1, min(16, 2048 // block_d, 4096 // (block_r * block_d)))
    return {"BLOCK_R": block_r, "BLOCK_P": block_p, "BLOCK_D": block_d}


def _splits(programs: int, blocks: int) -> int:
    """A power of two: enough to fill the device, and no more than there are blocks of positions."""
    return 1 << (max(1, min(programs, blocks, MOST_SPLITS)).bit_length() - 1)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def builds() -> list[Build]:
    """Decode (T = 1) and prompts, at the head sizes and groups of Llama, Mistral, Qwen and Gemma."""
    names = ("query_ptr", "key_ptr", "value_ptr", "keys_ptr", "values_ptr", "mixed_ptr", "peak_ptr", "total_ptr")
    shared = {"start_ptr": LONGS, "tokens": "i32", "context": "i32", "window": "i32"}

    def build(tokens: int, group: int, head_dim: int, capped: bool = False) -> Build:
        arguments = {**dict.fromkeys(names, FLOATS), **shared, **dict.fromkeys(("scale", "softcap"), "fp32")}
        constants = {
            "CAPPED": capped,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            **_blocks(tokens * group, head_dim, capped),
        }
        if tokens == 1:  # as the JIT does: an argument of 1 is a constant
            del arguments["tokens"]
            constants["tokens"] = 1
        label = f"attention T={tokens} {' '.join(f'{name}={value}' for name, value in constants.items())}"
        # The cache is read 16 bytes at a time; narrow are `start` and a program's queries (64 numbers over 128
        # threads). But AMD's 256 threads have 8 bytes each of a tile for 8 rows (512 numbers).
        wide = 0.85 if constants["BLOCK_R"] < MOST_ROWS else None
        return Build(label, _attention_kernel, arguments, constants, NUM_WARPS, wide_share=wide)

    def combine(splits: int, head_dim: int) -> Build:
        pointers = dict.fromkeys(("mixed_ptr", "peak_ptr", "total_ptr", "out_ptr"), FLOATS)
        constants = {"HEAD_DIM": head_dim, "SPLITS": splits, "BLOCK_P": _blocks(1, head_dim)["BLOCK_P"]}
        constants["BLOCK_D"] = head_dim
        return Build(f"combine S={splits} D={head_dim}", _combine_kernel, pointers | shared, constants, NUM_WARPS)

    sizes = [(tokens, group) for tokens, groups in ((1, (1, 2, 4, 8)), (512, (1, 4))) for group in groups]
    return [
        *(build(tokens, group, head_dim) for head_dim in (64, 128, 256) for tokens, group in sizes),
        *(build(tokens, 1, head_dim) for head_dim in (80, 96) for tokens in (1, 512)),
        *(build(tokens, 2, head_dim, capped=True) for head_dim in (128, 256) for tokens in (1, 512)),
        *(combine(splits, head_dim) for splits, head_dim in ((1, 128), (16, 128), (64, 64), (64, 256))),
    ]
