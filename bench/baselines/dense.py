"""The dense FFN, down(silu(gate · x) * (up · x)): three cuBLAS products, or the same chain under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

Chain = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# gate and up as two products, or as one over the stacked matrix: the quicker of the two is reported.
VARIANTS: tuple[dict[str, Any], ...] = ({"stacked": False}, {"stacked": True})


def make_inputs(
    generator: torch.Generator, *, tokens: int, neurons: int, width: int, dtype: torch.dtype
) -> dict[str, Any]:
    """x [T, D], gate_up [2N, D] (gate above up) and down [D, N], all of `dtype`."""
    device = generator.device

    def weights(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=generator, device=device) / columns**0.5).to(dtype)

    x = torch.randn(tokens, width, generator=generator, device=device).to(dtype)
    return {"x": x, "gate_up": weights(2 * neurons, width), "down": weights(width, neurons)}


def chain(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, *, stacked: bool = False) -> torch.Tensor:
    """The FFN [T, D] -> [T, D] in the weights' dtype; `stacked` multiplies gate and up in one product."""
    if stacked:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    else:
        gate, up = (F.linear(x, half) for half in gate_up.chunk(2))
    return F.linear(F.silu(gate) * up, down)


def reference(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The same in fp32, rounded once at the end."""
    return chain(x.float(), gate_up.float(), down.float()).to(x.dtype)


def bytes_moved(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> int:
    return x.element_size() * (gate_up.numel() + down.numel() + 2 * x.numel())


def forgotten(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, after torch.compile has dropped other shapes: beyond eight it would refuse another."""
    torch.compiler.reset()
    return inputs


def compiled(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """`chain` under torch.compile, compiled at the first call; raises where Inductor cannot compile."""
    return _compiled_chain()(x, gate_up, down)


@cache
def _compiled_chain() -> Chain:
    """The stacked form, the quicker one for a matrix-vector product, with a search over block sizes as gpt-fast has it.

    It is captured in our own graph, so Inductor's are off.
    """
    options: dict[str, Any] = {"coordinate_descent_tuning": True, "triton.cudagraphs": False}

    def stacked(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return chain(x, gate_up, down, stacked=True)

    return torch.compile(stacked, dynamic=False, fullgraph=True, options=options)
