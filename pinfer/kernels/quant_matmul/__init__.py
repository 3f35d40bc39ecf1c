"""quant_matmul: x [T, columns] times quantised rows, float32 [T, rows]; a matvec at T = 1."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.quant_matmul.reference import quant_matmul as reference
from pinfer.kernels.registry import Op
from pinfer.quant import BY_NAME, QuantTensor


def _make_inputs(
    generator: torch.Generator,
    *,
    type: str,
    tokens: int,
    rows: int,
    columns: int,
    biased: bool = False,
    int8: bool = False,
) -> dict[str, Any]:
    return {
        "x": cases.random_floats(generator, tokens, columns),
        "weight": cases.random_blocks(generator, BY_NAME[type], rows, columns),
        "bias": cases.random_floats(generator, rows) if biased else None,
        "int8": int8,
    }


def _bytes_moved(x: torch.Tensor, weight: QuantTensor, bias: torch.Tensor | None = None, **_: Any) -> int:
    return weight.nbytes + (0 if bias is None else bias.nbytes) + 4 * x.shape[0] * (weight.columns + weight.rows)


OP = Op(
    name="quant_matmul",
    reference=reference,
    triton="pinfer.kernels.quant_matmul.gpu:quant_matmul",
    cpu="pinfer.kernels.quant_matmul.cpu:quant_matmul",
    make_inputs=_make_inputs,
    cases=(
        *({"type": name, "tokens": 1, "rows": 37, "columns": cases.columns_for(name)} for name in BY_NAME),
        *({"type": name, "tokens": 3, "rows": 17, "columns": 512} for name in ("F16", "Q8_0", "Q4_K")),
        {"type": "Q5_0", "tokens": 13, "rows": 5, "columns": 64},
        {"type": "BF16", "tokens": 17, "rows": 70, "columns": 1100},
        {"type": "Q6_K", "tokens": 5, "rows": 70, "columns": 1280},
        {"type": "F32", "tokens": 1, "rows": 1, "columns": 1},
        *(
            {"type": name, "tokens": tokens, "rows": 37, "columns": cases.columns_for(name), "int8": True}
            for name in BY_NAME
            for tokens in (1, 3, 13)
        ),
        {"type": "Q8_0", "tokens": 21, "rows": 50, "columns": 1120, "int8": True},
        {"type": "Q4_0", "tokens": 1, "rows": 3, "columns": 32, "int8": True},
        *(
            {"type": "Q8_0", "tokens": tokens, "rows": 37, "columns": 96, "biased": True, "int8": int8}
            for tokens in (1, 3, 13)
            for int8 in (False, True)
        ),
        {"type": "F16", "tokens": 1, "rows": 33, "columns": 8224, "biased": True},
        {"type": "F32", "tokens": 2, "rows": 5, "columns": 33, "biased": True},
    ),
    bench_cases=tuple(
        {"type": name, "tokens": 1, "rows": 4096, "columns": 4096, "int8": int8}
        for name in cases.BENCH_TYPES
        for int8 in ((False, True) if BY_NAME[name].block_size > 1 else (False,))
    ),
    takes_int8=True,
    bytes_moved=_bytes_moved,
    tolerance=1e-5,
)
