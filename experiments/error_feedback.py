"""Rounding to any few bits by `pinfer.error_feedback`, for studies of formats that no file has."""

from __future__ import annotations

import torch

from pinfer.error_feedback import Grid, levels_and_scales


def bits_per_weight(bits: int, group: int) -> float:
    """With one fp16 scale for every `group` weights of a row."""
    return bits + 16 / group


def grid(bits: int) -> Grid:
    """Whole numbers from -2^(bits - 1) as in Q4_0, or for two and three bits ±1/2, ±3/2, …"""
    if bits >= 4:
        return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    top = (2**bits - 1) / 2
    return Grid(-top, top)


def rounded(weights: torch.Tensor, moment: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """`weights` [N, D] rounded for inputs of second moment `moment` [D, D] = E[x xᵀ], all float32; as float32 [N, D].

    ValueError unless groups of columns fill the rows.
    """
    levels, scales = levels_and_scales(weights, moment, group, grid(bits))
    return levels * scales.repeat_interleave(group, dim=1)
