"""split_active: an active list over hot and cold neurons to one list for each of them."""

from typing import Any

import torch

from pinfer.kernels.registry import Op
from pinfer.kernels.select_active.reference import listed
from pinfer.kernels.split_active.reference import split_active as reference


def _make_inputs(generator: torch.Generator, *, sizes: tuple[int, ...], density: float) -> dict[str, Any]:
    flags = torch.rand(sum(sizes), generator=generator, device=generator.device) < density
    active = listed(flags)
    return {"indices": active.indices, "count": active.count, "sizes": sizes}


def _bytes_moved(indices: torch.Tensor, count: torch.Tensor, sizes: tuple[int, ...]) -> int:
    return 4 * (2 * int(count) + 1 + len(sizes))


OP = Op(
    name="split_active",
    reference=reference,
    triton="pinfer.kernels.split_active.gpu:split_active",
    cpu="pinfer.kernels.split_active.cpu:split_active",
    make_inputs=_make_inputs,
    cases=(
        {"sizes": (100, 331), "density": 0.1},
        {"sizes": (1, 1, 429), "density": 0.3},
        {"sizes": (0, 97), "density": 0.5},
        {"sizes": (97, 0), "density": 0.5},
        {"sizes": (2100, 900), "density": 1.0},
        {"sizes": (40, 57), "density": 0.0},
        {"sizes": (0, 0), "density": 0.0},
    ),
    bench_cases=({"sizes": (2752, 8256), "density": 0.1},),
    bytes_moved=_bytes_moved,
    tolerance=0,
)
