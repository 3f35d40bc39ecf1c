"""select_active: scores [T, N] over thresholds to an ascending index list and its count."""

from typing import Any

import torch

from pinfer.kernels.registry import Op
from pinfer.kernels.select_active.reference import Active, Selection, passes
from pinfer.kernels.select_active.reference import select_active as reference


def _make_inputs(
    generator: torch.Generator, *, tokens: int, neurons: int, density: float, per_neuron: bool = False
) -> dict[str, Any]:
    scores = torch.rand(tokens, neurons, generator=generator, device=generator.device)
    scores[:, ::7] = scores[:, ::7].round(decimals=1)  # ties with the threshold must stay inactive
    threshold = torch.full((neurons if per_neuron else 1,), 1 - density, device=generator.device)
    if 0 < density < 1:
        threshold[0] = threshold[0].round(decimals=1)
    elif density == 1:
        threshold -= 1
    return {"scores": scores, "threshold": threshold}


def _bytes_moved(scores: torch.Tensor, threshold: torch.Tensor) -> int:
    return 4 * (scores.numel() + threshold.numel() + scores.shape[1] + 1)


OP = Op(
    name="select_active",
    reference=reference,
    triton="pinfer.kernels.select_active.gpu:select_active",
    cpu="pinfer.kernels.select_active.cpu:select_active",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "neurons": 431, "density": 0.1},
        {"tokens": 1, "neurons": 2500, "density": 0.3},
        {"tokens": 1, "neurons": 96, "density": 0.0},
        {"tokens": 1, "neurons": 431, "density": 1.0},
        {"tokens": 1, "neurons": 1, "density": 1.0},
        {"tokens": 5, "neurons": 431, "density": 0.1, "per_neuron": True},
        {"tokens": 16, "neurons": 512, "density": 0.02},
    ),
    bench_cases=({"tokens": 1, "neurons": 11008, "density": 0.1}, {"tokens": 1, "neurons": 28672, "density": 0.1}),
    bytes_moved=_bytes_moved,
    tolerance=0,
)

__all__ = ["OP", "Active", "Selection", "passes"]
