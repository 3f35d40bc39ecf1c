"""input_sparse_matmul: x [T, inputs] times input-major rows, skipping inputs of small magnitude."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.input_sparse_matmul.reference import input_sparse_matmul as reference
from pinfer.kernels.registry import Op
from pinfer.quant import BY_NAME, QuantTensor


def _make_inputs(
    generator: torch.Generator, *, type: str, tokens: int, inputs: int, outputs: int, density: float
) -> dict[str, Any]:
    x = cases.random_floats(generator, tokens, inputs)
    # The threshold that keeps about a share `density` of normal inputs.
    threshold = {0.0: 9.0, 1.0: -1.0}.get(density, float(2**0.5 * torch.erfinv(torch.tensor(1 - density))))
    return {
        "x": x,
        "weight": cases.random_blocks(generator, BY_NAME[type], inputs, outputs),
        "threshold": torch.tensor([threshold], device=generator.device),
    }


def _bytes_moved(x: torch.Tensor, weight: QuantTensor, threshold: torch.Tensor) -> int:
    read = int((x.abs() > threshold).any(dim=0).sum())
    return read * (weight.nbytes // weight.rows) + 4 * x.shape[0] * (weight.rows + weight.columns)


OP = Op(
    name="input_sparse_matmul",
    reference=reference,
    triton="pinfer.kernels.input_sparse_matmul.gpu:input_sparse_matmul",
    cpu="pinfer.kernels.input_sparse_matmul.cpu:input_sparse_matmul",
    make_inputs=_make_inputs,
    cases=(
        *(
            {"type": name, "tokens": 1, "inputs": 23, "outputs": cases.columns_for(name), "density": 0.5}
            for name in BY_NAME
        ),
        {"type": "Q8_0", "tokens": 3, "inputs": 131, "outputs": 1056, "density": 0.3},
        {"type": "Q8_0", "tokens": 19, "inputs": 7, "outputs": 32, "density": 0.5},
        {"type": "Q5_K", "tokens": 16, "inputs": 70, "outputs": 768, "density": 0.1},
        {"type": "F16", "tokens": 1, "inputs": 9, "outputs": 31, "density": 0.0},
        {"type": "F32", "tokens": 2, "inputs": 9, "outputs": 123, "density": 1.0},
    ),
    bench_cases=tuple(
        {"type": name, "tokens": 1, "inputs": 4096, "outputs": 4096, "density": density}
        for name in ("F16", "Q8_0")
        for density in (0.5, 1.0)
    ),
    bytes_moved=_bytes_moved,
    tolerance=1e-5,
)
