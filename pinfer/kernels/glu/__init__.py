"""glu: act(gate) · up (both clamped for dReLU), or |act(gate)|."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.activation import ACTIVATIONS
from pinfer.kernels.glu.reference import glu as reference
from pinfer.kernels.registry import Op


def _make_inputs(
    generator: torch.Generator,
    *,
    tokens: int,
    neurons: int,
    activation: str,
    gated: bool = True,
    magnitude: bool = False,
    shifted: bool = False,
    biased: bool = False,
    cutoff: float = 0.0,
) -> dict[str, Any]:
    return {
        "gate": 3 * cases.random_floats(generator, tokens, neurons),
        "up": cases.random_floats(generator, tokens, neurons) if gated else None,
        "activation": activation,
        "magnitude": magnitude,
        "shift": cases.random_floats(generator, neurons) if shifted else None,
        "gate_bias": cases.random_floats(generator, neurons) if biased else None,
        "cutoff": cutoff,
    }


def _bytes_moved(gate: torch.Tensor, up: torch.Tensor | None = None, **_: Any) -> int:
    return 4 * (2 if up is None else 3) * gate.numel()


OP = Op(
    name="glu",
    reference=reference,
    triton="pinfer.kernels.glu.gpu:glu",
    cpu="pinfer.kernels.glu.cpu:glu",
    make_inputs=_make_inputs,
    cases=(
        *({"tokens": 2, "neurons": 123, "activation": name} for name in ACTIVATIONS),
        *({"tokens": 1, "neurons": 431, "activation": name, "gated": False} for name in ACTIVATIONS),
        {"tokens": 3, "neurons": 37, "activation": "silu", "gated": False, "magnitude": True},
        {"tokens": 3, "neurons": 431, "activation": "relu2"},
        {"tokens": 3, "neurons": 37, "activation": "silu", "gated": False, "magnitude": True, "shifted": True},
        {"tokens": 2, "neurons": 4111, "activation": "gelu_tanh", "shifted": True},
        {"tokens": 3, "neurons": 431, "activation": "drelu"},
        {"tokens": 1, "neurons": 123, "activation": "relu", "gated": False, "biased": True},
        {"tokens": 3, "neurons": 4111, "activation": "gelu_tanh", "biased": True, "shifted": True},
        {
            "tokens": 3,
            "neurons": 37,
            "activation": "relu",
            "gated": False,
            "biased": True,
            "cutoff": 0.7,
            "magnitude": True,
        },
        {"tokens": 2, "neurons": 431, "activation": "relu", "cutoff": 0.7},
        {"tokens": 3, "neurons": 37, "activation": "drelu", "gated": False, "magnitude": True},
    ),
    bench_cases=({"tokens": 1, "neurons": 11008, "activation": "silu"},),
    bytes_moved=_bytes_moved,
    tolerance=1e-6,
)
