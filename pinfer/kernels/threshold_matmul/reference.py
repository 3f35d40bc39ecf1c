"""A product, a threshold and the list of rows above it, in plain torch.

What predictors end in: of the gate itself (CATS, Lee et al. 2024: |act(g · x)|; exact for ReLU) or of
a low-rank predictor's second matrix (Deja Vu, Liu et al. 2023; PowerInfer, Song et al. 2024).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pinfer.kernels.activation import check_activation, hidden_of
from pinfer.kernels.quant_matmul.reference import check_inputs as check_product
from pinfer.kernels.quant_matmul.reference import check_per_row, quant_matmul
from pinfer.kernels.select_active.reference import Active, passes, select_active
from pinfer.quant import QuantTensor


class Thresholded(NamedTuple):
    """active: union over the tokens; mask: bool [T, N], None for one token; values: float32 [T, N], the product with its bias."""

    active: Active
    mask: torch.Tensor | None
    values: torch.Tensor


def threshold_matmul(
    x: torch.Tensor,
    weight: QuantTensor,
    threshold: torch.Tensor,
    *,
    magnitude_of: str | None = None,
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
    int8: bool = False,
) -> Thresholded:
    """Multiply tokens by a quantised matrix and list the rows whose score passes a threshold.

    x:            float [T, columns]; weight: QuantTensor [N, columns].
    threshold:    float32 [1] or [N]; a score must exceed it, a NaN score always does.
    magnitude_of: the activation whose size |act(w_i · x)| is the score; None scores w_i · x itself.
    shift:        float32 [N] or None: what the activation is compared with, |act(w_i · x) - shift_i|.
    gate_bias:    float32 [N] or None: added to the product, so that scores and the values returned have it.
    cutoff:       of the activation, for relu alone (see `activation`).
    int8:         round x in blocks before the product (see `rounding`).

    Raises ValueError for shapes that do not belong together.
    """
    check_inputs(x, weight, threshold, magnitude_of, shift, gate_bias, cutoff)
    values = quant_matmul(x, weight, gate_bias, int8=int8)
    scores = values if magnitude_of is None else hidden_of(magnitude_of, values, None, shift, cutoff).abs()
    mask = None if x.shape[0] == 1 else passes(scores, threshold)
    return Thresholded(select_active(scores, threshold), mask, values)


def check_inputs(
    x: torch.Tensor,
    weight: QuantTensor,
    threshold: torch.Tensor,
    magnitude_of: str | None,
    shift: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    cutoff: float,
) -> None:
    """ValueError unless the shapes belong together; every implementation calls it."""
    check_product(x, weight)
    if threshold.dim() != 1 or threshold.numel() not in (1, weight.rows):
        raise ValueError(f"threshold is {list(threshold.shape)}, expected [1] or [{weight.rows}] for {weight!r}")
    if magnitude_of is not None:
        check_activation(magnitude_of, cutoff)
    elif shift is not None or cutoff:
        raise ValueError("a shift or a cutoff is of an activation: name it in magnitude_of")
    check_per_row("shift", shift, weight.rows)
    check_per_row("gate_bias", gate_bias, weight.rows)
