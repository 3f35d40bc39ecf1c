"""Rotary embedding (Su et al. 2021), in plain torch."""

from __future__ import annotations

import torch


def rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Rotate heads by the angles of positions start, start + 1, …

    x:           float32 [T, heads, head_dim].
    cos, sin:    float32 [positions, dim / 2]; the first `dim` of head_dim turn, the rest stays.
    start:       int64 [1], on the device: a recorded program reads it anew.
    interleaved: pairs are (2i, 2i + 1) and not (i, i + dim / 2).

    Returns float32 [T, heads, head_dim].
    """
    check_inputs(x, cos, sin, start)
    first = int(start)
    dim = 2 * cos.shape[1]
    c, s = cos[first : first + x.shape[0], None], sin[first : first + x.shape[0], None]  # [T, 1, dim / 2]
    rotated, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)
    else:
        a, b = rotated.chunk(2, dim=-1)
        turned = torch.cat([a * c - b * s, a * s + b * c], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def check_inputs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: torch.Tensor) -> None:
    """ValueError unless the table covers the positions and the heads; every implementation calls it.

    Only a start in CPU memory is looked at: a GPU's would have to be waited for.
    """
    if x.dim() != 3 or cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[2]:
        raise ValueError(f"x {list(x.shape)} and tables {list(cos.shape)}, {list(sin.shape)} do not belong together")
    if start.dtype != torch.int64 or start.numel() != 1:
        raise ValueError(f"start is {start.dtype} {list(start.shape)}, expected torch.int64 [1]")
    if start.device.type != "cpu":
        return
    if not 0 <= int(start) <= cos.shape[0] - x.shape[0]:
        raise ValueError(f"positions {int(start)} to {int(start) + x.shape[0] - 1} pass the table of {cos.shape[0]}")
