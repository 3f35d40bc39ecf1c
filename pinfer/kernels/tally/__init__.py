"""tally: adds up the neurons that were computed."""

from typing import Any

import torch

from pinfer.kernels.registry import Op
from pinfer.kernels.select_active.reference import Active
from pinfer.kernels.tally.reference import tally as reference


def _make_inputs(
    generator: torch.Generator, *, tokens: int, neurons: int, count: int, masked: bool = False
) -> dict[str, Any]:
    device = generator.device
    indices = torch.arange(neurons, dtype=torch.int32, device=device)
    return {
        "active": Active(indices, torch.tensor([count], dtype=torch.int32, device=device)),
        "totals": torch.zeros(2, dtype=torch.int64, device=device),
        "tokens": tokens,
        "mask": torch.rand(tokens, neurons, generator=generator, device=device) < 0.3 if masked else None,
    }


def _bytes_moved(active: Active, totals: torch.Tensor, *, mask: torch.Tensor | None = None, **_: Any) -> int:
    return 4 + 8 * totals.numel() + (0 if mask is None else mask.numel())


OP = Op(
    name="tally",
    reference=reference,
    triton="pinfer.kernels.tally.gpu:tally",
    cpu="pinfer.kernels.tally.cpu:tally",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "neurons": 31, "count": 5},
        {"tokens": 3, "neurons": 31, "count": 5},
        {"tokens": 2, "neurons": 31, "count": 0},
        {"tokens": 3, "neurons": 31, "count": 20, "masked": True},
    ),
    bench_cases=({"tokens": 1, "neurons": 11008, "count": 1100},),
    bytes_moved=_bytes_moved,
    tolerance=0,
)
