"""sign_select: x [T, D] and packed weight signs to an ascending index list, its count and a mask."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.registry import Op
from pinfer.kernels.select_active import Selection
from pinfer.kernels.sign_select.pack import pack_signs
from pinfer.kernels.sign_select.reference import pack_bits, sign_scores
from pinfer.kernels.sign_select.reference import sign_select as reference


def _make_inputs(
    generator: torch.Generator, *, tokens: int, neurons: int, width: int, density: float, per_neuron: bool = False
) -> dict[str, Any]:
    x = cases.random_floats(generator, tokens, width)
    x[:, ::11] = 0  # counts as positive
    signs = pack_bits(torch.rand(neurons, width, generator=generator, device=generator.device) < 0.5)
    scores = sign_scores(x[:1], signs)[0].sort(descending=True).values
    kept = round(density * neurons)
    bar = scores[kept] if kept < neurons else scores[-1] - 1  # a score of its own: ties must stay inactive
    threshold = bar.repeat(neurons if per_neuron else 1)
    if per_neuron:
        threshold += torch.arange(neurons, dtype=torch.int32, device=generator.device) % 5 - 2
    return {"x": x, "signs": signs, "threshold": threshold}


def _bytes_moved(x: torch.Tensor, signs: torch.Tensor, threshold: torch.Tensor) -> int:
    tokens, neurons = x.shape[0], signs.shape[0]
    mask_bytes = tokens * neurons if tokens > 1 else 0
    return x.element_size() * x.numel() + 4 * (signs.numel() + threshold.numel() + neurons + 1) + mask_bytes


OP = Op(
    name="sign_select",
    reference=reference,
    triton="pinfer.kernels.sign_select.gpu:sign_select",
    cpu="pinfer.kernels.sign_select.cpu:sign_select",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "neurons": 431, "width": 123, "density": 0.1},
        {"tokens": 1, "neurons": 431, "width": 512, "density": 0.3, "per_neuron": True},
        {"tokens": 3, "neurons": 431, "width": 123, "density": 0.1, "per_neuron": True},
        {"tokens": 3, "neurons": 96, "width": 256, "density": 0.1},
        {"tokens": 1, "neurons": 64, "width": 32, "density": 0.0},
        {"tokens": 1, "neurons": 130, "width": 500, "density": 1.0},
        {"tokens": 1, "neurons": 1, "width": 1, "density": 1.0},
    ),
    bench_cases=(
        *({"tokens": tokens, "neurons": 11008, "width": 4096, "density": 0.1} for tokens in (1, 16)),
        *({"tokens": tokens, "neurons": 28672, "width": 8192, "density": 0.1} for tokens in (1, 16)),
    ),
    bytes_moved=_bytes_moved,
    tolerance=0,
)

__all__ = ["OP", "Selection", "pack_signs"]
