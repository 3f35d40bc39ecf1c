"""sparse_ffn: the listed neurons of an FFN, fused from x [T, D] to y [T, D]."""

from typing import Any

import torch

from pinfer.kernels import cases
from pinfer.kernels.activation import ACTIVATIONS
from pinfer.kernels.registry import Op
from pinfer.kernels.select_active.reference import Active, select_active
from pinfer.kernels.sparse_ffn.reference import sparse_ffn as reference
from pinfer.quant import BY_NAME, QuantTensor


def _make_inputs(
    generator: torch.Generator,
    *,
    type: str,
    tokens: int,
    neurons: int,
    width: int,
    density: float,
    activation: str = "silu",
    gated: bool = True,
    masked: bool = False,
    with_gate_values: bool = False,
    shifted: bool = False,
    biased: bool = False,
    cutoff: float = 0.0,
    up_type: str | None = None,
    down_type: str | None = None,
    int8: bool = False,
) -> dict[str, Any]:
    scores = torch.rand(tokens, neurons, generator=generator, device=generator.device)
    threshold = torch.tensor([1 - density if density < 1 else -1.0], device=generator.device)
    x = cases.random_floats(generator, tokens, width)
    gate, up, down = (
        cases.random_blocks(generator, BY_NAME[name], neurons, width)
        for name in (type, up_type or type, down_type or type)
    )
    return {
        "x": x,
        "gate": gate,
        "up": up if gated else None,
        "down": down,
        "active": select_active(scores, threshold),
        "activation": activation,
        "mask": scores > threshold if masked else None,
        "gate_values": cases.random_floats(generator, tokens, neurons) if with_gate_values else None,
        "shift": 0.3 * cases.random_floats(generator, neurons) if shifted else None,
        "gate_bias": cases.random_floats(generator, neurons) if biased else None,
        "cutoff": cutoff,
        "int8": int8,
    }


def _bytes_moved(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    gate_values: torch.Tensor | None = None,
    **_: Any,
) -> int:
    rows = [weight for weight in (gate if gate_values is None else None, up, down) if weight is not None]
    per_neuron = sum(weight.nbytes // weight.rows for weight in rows)
    return int(active.count) * per_neuron + 4 * (2 * x.numel() + int(active.count))


_OTHERS = tuple(name for name in ACTIVATIONS if name != "silu")
_SMALL: dict[str, Any] = {"tokens": 1, "neurons": 23, "density": 0.4}

OP = Op(
    name="sparse_ffn",
    reference=reference,
    triton="pinfer.kernels.sparse_ffn.gpu:sparse_ffn",
    cpu="pinfer.kernels.sparse_ffn.cpu:sparse_ffn",
    make_inputs=_make_inputs,
    cases=(
        *({"type": name, "width": cases.columns_for(name), **_SMALL} for name in BY_NAME),
        *({"type": "Q8_0", "width": 96, "activation": name, **_SMALL} for name in _OTHERS),
        {"type": "F32", "tokens": 1, "neurons": 431, "width": 123, "density": 0.1, "activation": "relu"},
        {"type": "F16", "tokens": 1, "neurons": 23, "width": 123, "density": 0.0},
        {"type": "F32", "tokens": 1, "neurons": 23, "width": 123, "density": 1.0},
        {"type": "Q4_K", "tokens": 1, "neurons": 9, "width": 256, "density": 1.0, "down_type": "Q8_0"},
        {"type": "F32", "tokens": 1, "neurons": 23, "width": 31, "density": 0.4, "gated": False, "activation": "relu"},
        {"type": "Q8_0", "tokens": 1, "neurons": 23, "width": 64, "density": 0.4, "with_gate_values": True},
        {"type": "Q8_0", "tokens": 3, "neurons": 23, "width": 64, "density": 0.2, "masked": True},
        {"type": "Q5_0", "tokens": 13, "neurons": 9, "width": 32, "density": 0.2, "masked": True,
         "with_gate_values": True, "activation": "gelu_tanh"},
        *({"type": name, "width": cases.columns_for(name), **_SMALL, "int8": True} for name in BY_NAME),
        {"type": "Q8_0", "tokens": 16, "neurons": 97, "width": 96, "density": 0.1, "masked": True, "int8": True},
        {"type": "Q4_K", "tokens": 5, "neurons": 41, "width": 512, "density": 0.2, "down_type": "Q8_0", "int8": True,
         "activation": "relu"},
        {"type": "Q4_0", "tokens": 19, "neurons": 41, "width": 64, "density": 0.2, "masked": True, "int8": True},
        {"type": "F32", "width": 123, "activation": "drelu", "with_gate_values": True, **_SMALL},
        {"type": "F32", "width": 123, "activation": "relu", "shifted": True, **_SMALL},
        *(
            {"type": "Q8_0", "tokens": tokens, "neurons": 41, "width": 64, "density": 0.2, "masked": tokens > 1,
             "with_gate_values": tokens != 3, "shifted": True, "int8": tokens == 19}
            for tokens in (1, 3, 19)
        ),
        {"type": "F32", "width": 31, "activation": "drelu", "gated": False, **_SMALL},
        {"type": "Q4_K", "width": 256, "activation": "drelu", "int8": True, "down_type": "Q8_0", **_SMALL},
        *(
            {"type": "Q8_0", "tokens": tokens, "neurons": 41, "width": 64, "density": 0.2, "masked": True,
             "activation": "drelu", "int8": int8}
            for tokens in (3, 19) for int8 in (False, True)
        ),
        *({"type": name, "tokens": 2, "neurons": 23, "width": cases.columns_for(name), "density": 0.3, "masked": True}
          for name in BY_NAME),
        {"type": "Q4_K", "tokens": 16, "neurons": 130, "width": 1280, "density": 0.01, "masked": True,
         "down_type": "Q8_0"},
        *({"type": "Q4_K", "up_type": "Q5_0", "tokens": tokens, "neurons": 40, "width": 256, "density": 0.4}
          for tokens in (1, 3)),
        {"type": "Q8_0", "tokens": 0, "neurons": 23, "width": 64, "density": 0.4, "masked": True},
        {"type": "Q6_K", "tokens": 4, "neurons": 90, "width": 256, "density": 1.0, "down_type": "F16"},
        {"type": "BF16", "tokens": 7, "neurons": 23, "width": 64, "density": 0.0, "masked": True},
        {"type": "F16", "tokens": 3, "neurons": 40, "width": 31, "density": 0.3, "gated": False, "activation": "relu"},
        {"type": "Q5_K", "tokens": 9, "neurons": 40, "width": 256, "density": 0.3, "gated": False,
         "with_gate_values": True, "masked": True, "activation": "relu2"},
        *(
            {"type": "F16", "tokens": tokens, "neurons": 41, "width": 31, "density": 0.4, "biased": True,
             "with_gate_values": with_values, "activation": "relu", "cutoff": 0.5}
            for tokens in (1, 3, 19) for with_values in (False, True)
        ),
        {"type": "Q4_K", "width": 256, "activation": "relu", "cutoff": 0.3, "shifted": True, **_SMALL},
        {"type": "Q4_K", "width": 256, "activation": "gelu", "gated": False, "biased": True, **_SMALL},
        *(
            {"type": "Q8_0", "tokens": tokens, "neurons": 41, "width": 64, "density": 0.4, "masked": tokens > 1,
             "gated": False, "biased": True, "activation": "relu", "int8": int8}
            for tokens in (1, 3, 19) for int8 in (False, True)
        ),
    ),
    bench_cases=tuple(
        {"type": name, "tokens": 1, "neurons": 11008, "width": 4096, "density": density, "int8": True}
        for name in cases.BENCH_TYPES
        for density in (0.1, 0.5)
    ),
    takes_int8=True,
    bytes_moved=_bytes_moved,
    tolerance=2e-5,  # three products of 17-bit numbers on tensor cores
)  # fmt: skip
