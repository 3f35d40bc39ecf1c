"""threshold_matmul: a predictor's last product with its threshold and its list of neurons."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.registry import Op
from pinfer.kernels.threshold_matmul.reference import Thresholded
from pinfer.kernels.threshold_matmul.reference import threshold_matmul as reference
from pinfer.quant import BY_NAME, QuantTensor


def _make_inputs(
    generator: torch.Generator,
    *,
    type: str,
    tokens: int,
    rows: int,
    columns: int,
    threshold: float = 0.1,
    per_neuron: bool = False,
    magnitude_of: str | None = None,
    shifted: bool = False,
    biased: bool = False,
    cutoff: float = 0.0,
    int8: bool = False,
) -> dict[str, Any]:
    device = generator.device
    spread = torch.rand(rows, generator=generator, device=device) if per_neuron else torch.ones(1, device=device)
    return {
        "x": cases.random_floats(generator, tokens, columns),
        "weight": cases.random_blocks(generator, BY_NAME[type], rows, columns),
        "threshold": threshold * spread,
        "magnitude_of": magnitude_of,
        "shift": 0.1 * cases.random_floats(generator, rows) if shifted else None,
        "gate_bias": cases.random_floats(generator, rows) if biased else None,
        "cutoff": cutoff,
        "int8": int8,
    }


def _bytes_moved(x: torch.Tensor, weight: QuantTensor, threshold: torch.Tensor, **_: Any) -> int:
    return weight.nbytes + 4 * (x.numel() + threshold.numel() + x.shape[0] * weight.rows + weight.rows + 1)


OP = Op(
    name="threshold_matmul",
    reference=reference,
    triton="pinfer.kernels.threshold_matmul.gpu:threshold_matmul",
    cpu="pinfer.kernels.threshold_matmul.cpu:threshold_matmul",
    make_inputs=_make_inputs,
    cases=(
        *({"type": name, "tokens": 1, "rows": 37, "columns": cases.columns_for(name)} for name in BY_NAME),
        {"type": "F32", "tokens": 1, "rows": 431, "columns": 123, "magnitude_of": "silu"},
        {"type": "Q8_0", "tokens": 1, "rows": 70, "columns": 32, "per_neuron": True},
        {"type": "Q8_0", "tokens": 3, "rows": 37, "columns": 96, "magnitude_of": "gelu_tanh"},
        {"type": "Q4_0", "tokens": 1, "rows": 33, "columns": 96, "threshold": 1e9},
        {"type": "Q4_0", "tokens": 1, "rows": 33, "columns": 96, "threshold": -1e9},
        {"type": "Q4_K", "tokens": 1, "rows": 33, "columns": 256, "magnitude_of": "relu", "int8": True},
        {"type": "F16", "tokens": 1, "rows": 37, "columns": 96, "magnitude_of": "drelu"},
        *(
            {
                "type": "Q4_K",
                "tokens": tokens,
                "rows": 37,
                "columns": 256,
                "magnitude_of": "silu",
                "per_neuron": True,
                "shifted": True,
            }
            for tokens in (1, 4)
        ),
        {"type": "Q8_0", "tokens": 2, "rows": 37, "columns": 96, "magnitude_of": "drelu", "int8": True},
        *(
            {"type": "Q8_0", "tokens": tokens, "rows": 37, "columns": 96, "biased": True, "int8": tokens == 3}
            for tokens in (1, 3)
        ),
        *(
            {
                "type": "F16",
                "tokens": tokens,
                "rows": 37,
                "columns": 33,
                "biased": True,
                "magnitude_of": "relu",
                "cutoff": 0.4,
            }
            for tokens in (1, 3)
        ),
        {
            "type": "Q4_K",
            "tokens": 1,
            "rows": 37,
            "columns": 256,
            "magnitude_of": "silu",
            "biased": True,
            "shifted": True,
        },
    ),
    bench_cases=(
        {"type": "Q4_K", "tokens": 1, "rows": 11008, "columns": 4096, "magnitude_of": "silu", "threshold": 0.5},
        {"type": "Q8_0", "tokens": 1, "rows": 11008, "columns": 256, "threshold": 1.3},
        {"type": "Q4_0", "tokens": 1, "rows": 28672, "columns": 256, "threshold": 1.3},
    ),
    takes_int8=True,
    bytes_moved=_bytes_moved,
    tolerance=1e-5,
)

__all__ = ["OP", "Thresholded"]
