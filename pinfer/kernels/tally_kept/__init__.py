"""tally_kept: adds up the inputs that input_sparse_matmul does not skip."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.registry import Op
from pinfer.kernels.tally_kept.reference import tally_kept as reference


def _make_inputs(generator: torch.Generator, *, tokens: int, inputs: int, threshold: float) -> dict[str, Any]:
    x = cases.random_floats(generator, tokens, inputs)
    x[:, ::7] = 0.5  # ties with the threshold are not kept
    x[:, 3::29] = float("nan")
    return {
        "x": x,
        "threshold": torch.tensor([threshold], device=generator.device),
        "totals": torch.tensor([5, 2], device=generator.device),
    }


def _bytes_moved(x: torch.Tensor, threshold: torch.Tensor, totals: torch.Tensor) -> int:
    return 4 * (x.numel() + threshold.numel()) + 8 * totals.numel()


OP = Op(
    name="tally_kept",
    reference=reference,
    triton=None,  # torch's few launches wait for nothing
    cpu="pinfer.kernels.tally_kept.cpu:tally_kept",
    make_inputs=_make_inputs,
    cases=(
        {"tokens": 1, "inputs": 431, "threshold": 0.5},
        {"tokens": 3, "inputs": 31, "threshold": -1.0},
        {"tokens": 2, "inputs": 123, "threshold": 99.0},
        {"tokens": 5, "inputs": 1, "threshold": 0.5},
    ),
    bench_cases=({"tokens": 1, "inputs": 11008, "threshold": 0.67},),
    bytes_moved=_bytes_moved,
    tolerance=0,
)
