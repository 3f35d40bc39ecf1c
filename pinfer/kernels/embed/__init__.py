"""embed: token ids [T] to float32 rows [T, D] of a quantised table."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.embed.reference import embed as reference
from pinfer.kernels.registry import Op
from pinfer.quant import BY_NAME, QuantTensor


def _make_inputs(generator: torch.Generator, *, type: str, tokens: int, rows: int, columns: int) -> dict[str, Any]:
    return {
        "ids": torch.randint(rows, (tokens,), generator=generator, device=generator.device),
        "table": cases.random_blocks(generator, BY_NAME[type], rows, columns),
        "scale": 1.5,
    }


def _bytes_moved(ids: torch.Tensor, table: QuantTensor, **_: Any) -> int:
    return len(ids) * (table.nbytes // table.rows + 4 * table.columns)


OP = Op(
    name="embed",
    reference=reference,
    triton="pinfer.kernels.embed.gpu:embed",
    cpu="pinfer.kernels.embed.cpu:embed",
    make_inputs=_make_inputs,
    cases=(
        {"type": "Q8_0", "tokens": 1, "rows": 7, "columns": 96},
        {"type": "Q6_K", "tokens": 5, "rows": 7, "columns": 512},
        {"type": "F16", "tokens": 3, "rows": 1, "columns": 31},
        {"type": "Q4_0", "tokens": 2, "rows": 5, "columns": 1056},
    ),
    bench_cases=({"type": "Q8_0", "tokens": 1, "rows": 32000, "columns": 4096},),
    bytes_moved=_bytes_moved,
    tolerance=1e-6,
)
