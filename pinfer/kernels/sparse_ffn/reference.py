"""The sparse FFN: y = Σ over active neurons i of act(g_i · x) · (u_i · x) · d_i, in plain torch.

Any subset of the neurons is exact for the neurons it keeps (PowerInfer §5.2, Deja Vu §4). dReLU
clamps u_i · x at 0 as well (TurboSparse).
"""

from __future__ import annotations

import torch

from pinfer.kernels.activation import check_activation, hidden_of
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.quant_matmul.reference import check_per_row
from pinfer.kernels.rounding import rounded_for
from pinfer.kernels.select_active.reference import Active
from pinfer.quant import QuantTensor


def sparse_ffn(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    *,
    activation: str,
    mask: torch.Tensor | None = None,
    gate_values: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    cutoff: float = 0.0,
    int8: bool = False,
) -> torch.Tensor:
    """Compute the listed neurons of an FFN.

    x:           float [T, D].
    gate, up:    QuantTensor [N, D], row i being neuron i. An ungated FFN passes its up matrix as
                 `gate` and None as `up`: y = Σ act(g_i · x) · d_i.
    down:        QuantTensor [N, D], transposed from the file so that row i is neuron i's output.
    active:      Active, the union over tokens of the neurons to compute: of `select_active`, or of
                 `select_active.reference.listed(flags)`. Its numbers are not checked on a GPU.
    mask:        bool [T, N] or None: which of them each token uses.
    gate_values: float32 [T, N] or None: what the activation is applied to where the predictor has it, g_i · x with
                 its bias; gate rows and `gate_bias` stay unread.
    shift:       float32 [N] or None: taken off act(g_i · x).
    gate_bias:   float32 [N] or None: added to g_i · x where it is computed here.
    cutoff:      of FATReLU, for relu alone (see `activation`).
    int8:        round x in blocks before the products with gate and up (see `rounding`).

    Returns float32 [T, D].
    """
    check_inputs(x, gate, up, down, active, activation, mask, gate_values, shift, gate_bias, cutoff)
    check_list(active, gate.rows)
    listed = active.indices[: int(active.count)].long()
    x = x.float()
    seen_by = (lambda weight: rounded_for(x, weight)) if int8 else (lambda weight: x)
    if gate_values is not None:
        pre = gate_values[:, listed]
    else:
        pre = seen_by(gate) @ dequantize(gate[listed]).T + (0.0 if gate_bias is None else gate_bias[listed])
    up_values = None if up is None else seen_by(up) @ dequantize(up[listed]).T
    hidden = hidden_of(activation, pre, up_values, None if shift is None else shift[listed], cutoff)  # [T, K]
    if mask is not None:
        hidden = torch.where(mask[:, listed], hidden, 0.0)
    return hidden @ dequantize(down[listed])


def check_inputs(
    x: torch.Tensor,
    gate: QuantTensor,
    up: QuantTensor | None,
    down: QuantTensor,
    active: Active,
    activation: str,
    mask: torch.Tensor | None,
    gate_values: torch.Tensor | None,
    shift: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    cutoff: float,
) -> None:
    """ValueError for shapes or types that do not belong together; every implementation calls it."""
    check_activation(activation, cutoff)
    if not isinstance(active, Active):
        raise ValueError(f"active is a {type(active).__name__}, expected an Active, such as listed(flags) makes")
    if x.dim() != 2 or x.shape[1] != gate.columns:
        raise ValueError(f"x is {list(x.shape)}, expected [T, {gate.columns}]")
    for name, weight in (("up", up), ("down", down)):
        if weight is not None and weight.shape != gate.shape:
            raise ValueError(f"{name} is {list(weight.shape)}, expected gate's {list(gate.shape)}")
    per_token = [x.shape[0], gate.rows]
    for name, values, dtype in (("mask", mask, torch.bool), ("gate_values", gate_values, torch.float32)):
        if values is not None and (list(values.shape) != per_token or values.dtype != dtype):
            raise ValueError(f"{name} is {values.dtype} {list(values.shape)}, expected {dtype} {per_token}")
    check_per_row("shift", shift, gate.rows)
    check_per_row("gate_bias", gate_bias, gate.rows)
    if active.indices.dtype != torch.int32 or not active.indices.is_contiguous() or active.count.dtype != torch.int32:
        raise ValueError("the active list must be contiguous int32 indices with an int32 count")
    if active.indices.numel() != gate.rows:
        raise ValueError(f"the active list is made for {active.indices.numel()} neurons, expected gate's {gate.rows}")


def check_list(active: Active, neurons: int) -> None:
    """ValueError for a list that names what is not there: a kernel would read past the weights.

    It waits for the count, so on a GPU, where nothing waits, such a list is the caller's fault.
    """
    count = int(active.count)
    if not 0 <= count <= neurons:
        raise ValueError(f"the active list counts {count} neurons, expected 0 to {neurons}")
    listed = active.indices[:count]
    if count and not (int(listed.min()) >= 0 and int(listed.max()) < neurons):
        raise ValueError(f"the active list names neurons {int(listed.min())} to {int(listed.max())} of {neurons}")
