"""dequantize: GGUF blocks [rows, row_bytes] to float32 [rows, columns]."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.dequantize.reference import dequantize as reference
from pinfer.kernels.registry import Op
from pinfer.quant import BY_NAME, QuantTensor


def _make_inputs(generator: torch.Generator, *, type: str, rows: int, columns: int) -> dict[str, Any]:
    return {"weight": cases.random_blocks(generator, BY_NAME[type], rows, columns)}


def _bytes_moved(weight: QuantTensor) -> int:
    return weight.nbytes + 4 * weight.rows * weight.columns


OP = Op(
    name="dequantize",
    reference=reference,
    triton="pinfer.kernels.dequantize.gpu:dequantize",
    cpu="pinfer.kernels.dequantize.cpu:dequantize",
    make_inputs=_make_inputs,
    cases=tuple(
        {"type": name, "rows": rows, "columns": columns}
        for name in BY_NAME
        for rows, columns in ((3, cases.columns_for(name)), (1, 2 * cases.columns_for(name)))
    ),
    bench_cases=tuple({"type": name, "rows": 4096, "columns": 4096} for name in cases.BENCH_TYPES),
    bytes_moved=_bytes_moved,
    tolerance=1e-6,
)
