"""embed in Triton: the rows that token ids name, unpacked and scaled in one launch; ids are read on the device.

out[t] = scale · table[ids[t]]
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.aot import BYTES, FLOATS, LONGS, Build
from pinfer.kernels.embed.reference import check_inputs
from pinfer.kernels.planes import repack
from pinfer.kernels.tiles import groups_of, store_row
from pinfer.quant import BY_NAME, QuantTensor

BLOCK_G, NUM_WARPS = 32, 1  # a group of 32 weights a thread


@triton.jit
def _embed_kernel(
    ids_ptr, rows_ptr, row_stride, out_ptr, rows, scale,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, TYPE: tl.constexpr, GATHERED: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    g = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    row = tl.load(ids_ptr + token)  # [1]
    known = (row >= 0) & (row < rows)  # the host does not wait for the ids to refuse one: its row is NaN
    row_ptr = rows_ptr + (token if GATHERED else row) * row_stride
    out_ptr += tl.program_id(0).to(tl.int64) * WIDTH
    store_row(row_ptr, known, tl.where(known, scale, float("nan")), out_ptr, g, WIDTH, GROUPS, TYPE)


def embed(ids: torch.Tensor, table: QuantTensor, *, scale: float = 1.0) -> torch.Tensor:
    """As the reference; on a GPU, ids that name no row give rows of NaN. Of blocks, the named rows are repacked."""
    check_inputs(ids, table)
    ids, n_rows, gathered = ids.contiguous(), table.rows, table.layout == "blocks"
    if gathered:
        table = repack(table[ids.clamp(0, n_rows - 1)])
    out = torch.empty(len(ids), table.columns, dtype=torch.float32, device=ids.device)
    _embed_kernel[(len(ids), triton.cdiv(groups_of(table), BLOCK_G))](
        ids, table.blocks, table.blocks.stride(0), out, n_rows, scale,
        WIDTH=table.columns, GROUPS=groups_of(table), TYPE=table.type.name, GATHERED=gathered, BLOCK_G=BLOCK_G,
        num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    """Every type at 7B's width, and 13B's and 70B's."""
    arguments = {"ids_ptr": LONGS, "rows_ptr": BYTES, "row_stride": "i64", "out_ptr": FLOATS, "rows": "i32"}
    arguments |= {"scale": "fp32"}

    def build(kind: str, width: int, gathered: bool = False) -> Build:
        constants = {"WIDTH": width, "GROUPS": width // 32, "TYPE": kind, "GATHERED": gathered, "BLOCK_G": BLOCK_G}
        label = f"embed {kind} D={width}{' gathered' if gathered else ''}"
        return Build(label, _embed_kernel, arguments, constants, NUM_WARPS, multiples_of_16=("row_stride",))

    return [
        *(build(kind, 4096) for kind in BY_NAME),
        *(build("Q4_K", width) for width in (5120, 8192)),
        build("Q4_K", 4096, gathered=True),
    ]
