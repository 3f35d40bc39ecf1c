"""embed in Triton: the rows that token ids name, unpacked and scaled in one launch; ids are read on the device.

out[t] = scale · table[ids[t]]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, LONGS, Build
from pinfer.kernels.dequantize.gpu import weights_at
from pinfer.kernels.embed.reference import check_inputs
from pinfer.kernels.tiles import add_rows, groups_of, load_raw, no_sums, store_sums
from pinfer.quant import BY_NAME, QuantTensor

BLOCK_K, NUM_WARPS = 1024, 4
BLOCK_G, PLANES_WARPS = 32, 1  # a group of 32 weights a thread


@triton.jit
def _embed_kernel(
    ids_ptr, blocks_ptr, row_stride, out_ptr, rows, columns, scale, TYPE: tl.constexpr, BLOCK_K: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.load(ids_ptr + token)
    mask = column < columns
    known = (row >= 0) & (row < rows)  # the host does not wait for the ids to refuse one: its row is NaN
    weight = weights_at(blocks_ptr + row * row_stride, column, mask & known, TYPE)  # [K]
    tl.store(out_ptr + token * columns + column, tl.where(known, weight * scale, float("nan")), mask=mask)


@triton.jit
def _embed_planes_kernel(
    ids_ptr, rows_ptr, row_stride, out_ptr, rows, scale,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    row = tl.load(ids_ptr + token)  # [1]
    known = (row >= 0) & (row < rows)
    raw = load_raw(rows_ptr + row * row_stride, known, g, GROUPS, TYPE)
    sums, minima = no_sums(1, BLOCK_G)
    sums, minima = add_rows(sums, minima, raw, tl.where(known, scale, float("nan")), TYPE)
    store_sums(out_ptr + tl.program_id(0).to(tl.int64) * WIDTH, sums, minima, g, WIDTH, GROUPS, TYPE)


def embed(ids: torch.Tensor, table: QuantTensor, *, scale: float = 1.0) -> torch.Tensor:
    """As the reference, of a table in either layout; on a GPU, ids that name no row give rows of NaN."""
    check_inputs(ids, table)
    ids = ids.contiguous()
    out = torch.empty(len(ids), table.columns, dtype=torch.float32, device=ids.device)
    arguments = (ids, table.blocks, table.blocks.stride(0), out, table.rows)
    if table.layout == "planes":
        _embed_planes_kernel[(len(ids), triton.cdiv(groups_of(table), BLOCK_G))](
            *arguments, scale, WIDTH=table.columns, GROUPS=groups_of(table), TYPE=table.type.name, BLOCK_G=BLOCK_G,
            num_warps=PLANES_WARPS,
        )  # fmt: skip
    else:
        _embed_kernel[(len(ids), triton.cdiv(table.columns, BLOCK_K))](
            *arguments, table.columns, scale, TYPE=table.type.name, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS
        )
    return out


def builds() -> list[Build]:
    """Both layouts of every type, as wide as 7B, 13B and 70B models are."""
    shared = {"ids_ptr": LONGS, "row_stride": "i64", "out_ptr": FLOATS, "rows": "i32", "scale": "fp32"}
    of_blocks = {**shared, "blocks_ptr": BYTES, "columns": "i32"}
    of_planes = {**shared, "rows_ptr": BYTES}

    def planes(kind: str, width: int) -> Build:
        constants = {"WIDTH": width, "GROUPS": width // 32, "TYPE": kind, "BLOCK_G": BLOCK_G}
        label = f"embed planes {kind} D={width}"
        return Build(label, _embed_planes_kernel, of_planes, constants, PLANES_WARPS, multiples_of_16=("row_stride",))

    return [
        *(
            Build(f"embed blocks {kind}", _embed_kernel, of_blocks, {"TYPE": kind, "BLOCK_K": BLOCK_K}, NUM_WARPS)
            for kind in BY_NAME
        ),
        *(planes(kind, 4096) for kind in BY_NAME),
        *(planes("Q4_K", width) for width in (5120, 8192)),
    ]
