"""glu in Triton: act(gate) · up in one pass, where torch takes a launch for each of the two.

out = act(gate) · up, act(gate) or |act(gate)|        (Shazeer 2020; the magnitude: CATS, Lee et al. 2024)
dReLU: out = relu(gate) · relu(up)                    (TurboSparse, Song et al. 2024)
FATReLU: relu's with zero up to a cutoff              (ProSparse, Song et al. 2024)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pinfer.kernels.activation import ACTIVATIONS, check_activation
from pinfer.kernels.aot import FLOATS, Build
from pinfer.kernels.glu.reference import check_inputs

BLOCK, NUM_WARPS = 1024, 4


@triton.jit
def activate(g, ACTIVATION: tl.constexpr, CUTOFF: tl.constexpr):
    if ACTIVATION == "silu":
        h = g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu_tanh":
        # g / 2 · (1 + tanh z) = g · sigmoid(2 z), z = sqrt(2 / π) (g + 0.044715 g³)
        h = g / (1.0 + tl.exp(-2 * 0.7978845608028654 * (g + 0.044715 * g * g * g)))
    elif ACTIVATION == "gelu":
        # g · Φ(g) by erfc(z), z = |g| / sqrt(2), to 1.2e-7 of it (Press et al., Numerical Recipes, erfcc)
        z = tl.abs(g) * 0.7071067811865476
        t = 1.0 / (1.0 + 0.5 * z)
        p = ((0.17087277 * t - 0.82215223) * t + 1.48851587) * t - 1.13520398
        p = (((p * t + 0.27886807) * t - 0.18628806) * t + 0.09678418) * t + 0.37409196
        p = (p * t + 1.00002368) * t - 1.26551223
        beyond = 0.5 * g * t * tl.exp(p - z * z)
        h = tl.where(g < 0.0, beyond, g - beyond)
    else:
        known: tl.constexpr = ACTIVATION == "relu" or ACTIVATION == "relu2" or ACTIVATION == "drelu"
        tl.static_assert(known, "unknown activation")
        below = g <= CUTOFF if CUTOFF > 0.0 else g < 0.0
        h = tl.where(below, 0.0, g)  # as in torch, NaN stays NaN
        if ACTIVATION == "relu2":
            h = h * h
    return h


@triton.jit
def activate_up(u, ACTIVATION: tl.constexpr):
    """What the up product contributes: dReLU clamps it, others take it as it is."""
    if ACTIVATION == "drelu":
        u = tl.where(u < 0.0, 0.0, u)
    return u


@triton.jit
def _glu_kernel(
    gate_ptr, up_ptr, shift_ptr, bias_ptr, out_ptr, size, neurons,
    ACTIVATION: tl.constexpr, CUTOFF: tl.constexpr, HAS_UP: tl.constexpr, MAGNITUDE: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    g = tl.load(gate_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_BIAS:
        g += tl.load(bias_ptr + at % neurons, mask=mask, other=0.0)
    h = activate(g, ACTIVATION, CUTOFF)
    if HAS_SHIFT:
        h -= tl.load(shift_ptr + at % neurons, mask=mask, other=0.0)
    if HAS_UP:
        h *= activate_up(tl.load(up_ptr + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)  # [BLOCK]
    if MAGNITUDE:
        h = tl.abs(h)
    tl.store(out_ptr + at, h, mask=mask)


def glu(
    gate: torch.Tensor,
    up: torch.Tensor | None = None,
    *,
    activation: str,
    magnitude: bool = False,
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> torch.Tensor:
    check_inputs(gate, up, magnitude, shift, gate_bias)
    check_activation(activation, cutoff)
    gate = gate.contiguous()
    out = torch.empty(gate.shape, dtype=torch.float32, device=gate.device)
    _glu_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
        gate, gate if up is None else up.contiguous(), gate if shift is None else shift.contiguous(),
        gate if gate_bias is None else gate_bias.contiguous(), out, gate.numel(), gate.shape[-1],
        ACTIVATION=activation, CUTOFF=float(cutoff), HAS_UP=up is not None, MAGNITUDE=magnitude,
        HAS_SHIFT=shift is not None, HAS_BIAS=gate_bias is not None, BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1,
    )  # fmt: skip
    return out


def builds() -> list[Build]:
    pointers = ("gate_ptr", "up_ptr", "shift_ptr", "bias_ptr", "out_ptr")
    arguments = {**dict.fromkeys(pointers, FLOATS), "size": "i32", "neurons": "i32"}

    def build(activation: str, has_up: bool, magnitude: bool = False, cutoff: float = 0.0, **switches: bool) -> Build:
        switches = {"HAS_SHIFT": False, "HAS_BIAS": False, **switches}
        constants = {
            "ACTIVATION": activation, "CUTOFF": cutoff, "HAS_UP": has_up, "MAGNITUDE": magnitude, **switches,
            "BLOCK": BLOCK,
        }  # fmt: skip
        on = [name.lower() for name in ("HAS_UP", "MAGNITUDE", *switches) if constants[name]]
        return Build(
            " ".join(("glu", activation, *([f"cutoff {cutoff:g}"] if cutoff else []), *on)),
            _glu_kernel,
            arguments,
            constants,
            NUM_WARPS,
            multiples_of_16=("size", "neurons"),
            wide_share=0.5 if any(switches.values()) else 1.0,
        )

    pairs = [build(activation, has_up) for activation in ACTIVATIONS for has_up in (True, False)]
    return [
        *pairs,
        build("silu", False, magnitude=True),
        build("silu", False, magnitude=True, HAS_SHIFT=True),
        build("relu", True, cutoff=0.01),
        build("relu", False, HAS_BIAS=True),
    ]
