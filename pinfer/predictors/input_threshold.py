"""input_threshold (TEAL, Liu et al. 2024): skips small inputs instead of naming neurons.

    h = act(G x̂) · (U x̂)        x̂: x with |x_j| ≤ t_x set to zero
    y = Σ_i ĥ_i d_i              ĥ: h with |h_i| ≤ t_h set to zero

so that a skipped input saves a column of G and of U, and a skipped hidden value a row of `down`. No
activation has to be zero anywhere: it works for GELU and SiLU as for ReLU. It is no `Predictor`, as what
is skipped of `down` is known once gate and up are computed; `pinfer.input_sparse_ffn` computes it.

TEAL searches for a sparsity of its own for each matrix and block; here all have the one asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pinfer.kernels.ops import glu, quant_matmul
from pinfer.predictors.cuts import KEPT_VALUES
from pinfer.quant import QuantTensor

KEEP_ALL = -1.0  # no magnitude is below it


class InputThreshold(NamedTuple):
    """What an FFN keeps: inputs and hidden values above these magnitudes, t_x and t_h; below 0 for all of them."""

    inputs: float
    hidden: float


def fit_input_threshold(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    activation: str,
    sparsity: float,
    *,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
) -> InputThreshold:
    """Thresholds that skip a share `sparsity` of inputs, and of what hidden values these leave, over x float32 [T, D].

    gate, up: QuantTensor [N, D] as a file has them, up None for an FFN without; gate_bias float32 [N] or
    None, added to the gate product; cutoff FATReLU's. Leave first tokens out of x. More
    is skipped where more are zero than that share. ValueError unless sparsity lies in [0, 1) and x is finite.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} must lie in [0, 1)")
    if not bool(x.isfinite().all()):
        raise ValueError("an FFN's inputs are not finite: the weights are damaged")
    of_inputs = quantile(x.abs(), sparsity)
    some = x[:: max(1, -(-x.shape[0] * gate.rows // KEPT_VALUES))]
    kept = torch.where(some.abs() <= of_inputs, 0.0, some)
    up_values = None if up is None else quant_matmul(kept, up)
    hidden = glu(quant_matmul(kept, gate, gate_bias), up_values, activation=activation, cutoff=cutoff)
    return InputThreshold(float(of_inputs), float(quantile(hidden.abs(), sparsity)))


def quantile(sizes: torch.Tensor, share: float) -> torch.Tensor:
    """What a share of the sizes does not exceed; below all of them for 0."""
    if share == 0:
        return sizes.new_tensor(KEEP_ALL)
    return sizes.flatten().kthvalue(max(1, round(share * sizes.numel()))).values
