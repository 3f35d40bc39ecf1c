"""Rounding a matrix to few bits so that its products with given inputs change least, not its weights.

Columns are rounded one after another, and what a column's rounding does to the products is made up for by the
columns still to come, as the inputs' second moment says (GPTQ, Frantar et al. 2023; OBQ, Frantar and
Alistarh 2022). Scales are then fitted to the rounded columns by least squares and the columns rounded anew.
"""

from __future__ import annotations

import torch

STEPS = 33  # scales tried for a group before anything is rounded, from a quarter of the largest weight upwards
ROUNDS = 2  # of rounding and fitting scales
BLOCK = 64  # columns whose errors are passed on at once
DAMPING = 0.01  # of the mean squared input, added to every squared input
ROWS = 256  # whose scales are solved for at a time


def bits_per_weight(bits: int, group: int) -> float:
    """With one fp16 scale for every `group` weights of a row."""
    return bits + 16 / group


def round_to(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest level: whole numbers from -2^(bits - 1) as in Q4_0, or for two and three bits ±1/2, ±3/2, …"""
    if bits >= 4:
        return values.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    top = (2**bits - 1) / 2
    return ((values - 0.5).round() + 0.5).clamp(-top, top)


def rounded(weights: torch.Tensor, moment: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """`weights` [N, D] rounded for inputs of second moment `moment` [D, D] = E[x xᵀ], all float32; as float32 [N, D].

    ValueError unless groups of columns fill the rows.
    """
    if weights.shape[1] % group:
        raise ValueError(f"{weights.shape[1]} columns are no multiple of groups of {group}")
    scales = _searched_scales(weights, moment.diagonal(), bits, group)
    for _ in range(ROUNDS):
        levels = _levels(weights, moment, bits, scales.repeat_interleave(group, dim=1))
        scales = _fitted_scales(weights, levels, moment, group)
    return levels * scales.repeat_interleave(group, dim=1)


def _searched_scales(weights: torch.Tensor, importance: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Per row and group, of some shares of the largest weight the scale that rounds it best on its own: [N, D / group]."""
    pieces = weights.unflatten(1, (-1, group))
    counts = importance.unflatten(0, (-1, group))
    largest = (pieces.abs().amax(dim=-1) / ((2**bits - 1) / 2)).clamp_min(1e-7)
    best, least = largest, torch.full_like(largest, torch.inf)
    for share in torch.linspace(0.25, 1.05, STEPS).tolist():
        scale = (share * largest)[..., None]
        error = ((pieces - round_to(pieces / scale, bits) * scale).square() * counts).sum(dim=-1)
        best, least = torch.where(error < least, scale[..., 0], best), torch.minimum(error, least)
    return best.half().float().clamp_min(1e-7)


def _levels(weights: torch.Tensor, moment: torch.Tensor, bits: int, scales: torch.Tensor) -> torch.Tensor:
    """Levels [N, D] of the weights under scales [N, D]; the columns that carry most are rounded first."""
    order = moment.diagonal().argsort(descending=True)
    left, scales, damped = weights[:, order].clone(), scales[:, order], moment[order][:, order].clone()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    passed = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    levels = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        stop = min(start + BLOCK, left.shape[1])
        errors = torch.empty(len(left), stop - start)
        for j in range(start, stop):
            levels[:, j] = round_to(left[:, j] / scales[:, j], bits)
            errors[:, j - start] = (left[:, j] - levels[:, j] * scales[:, j]) / passed[j, j]
            left[:, j + 1 : stop] -= errors[:, j - start, None] * passed[j, j + 1 : stop]
        left[:, stop:] -= errors @ passed[start:stop, stop:]
    return levels[:, order.argsort()]


def _fitted_scales(weights: torch.Tensor, levels: torch.Tensor, moment: torch.Tensor, group: int) -> torch.Tensor:
    """Per row and group, the scales with which products change least, given the levels: [N, D / group]."""
    groups = weights.shape[1] // group
    wanted = ((weights @ moment) * levels).unflatten(1, (groups, group)).sum(dim=-1)
    scales = torch.empty_like(wanted)
    for start in range(0, len(weights), ROWS):
        pieces = levels[start : start + ROWS].unflatten(1, (groups, group))  # [n, groups, group]
        seen = torch.einsum("ngi,gid->ngd", pieces, moment.unflatten(0, (groups, group)))
        system = (seen.unflatten(2, (groups, group)) * pieces[:, None]).sum(dim=-1)  # [n, groups, groups]
        diagonal = system.diagonal(dim1=1, dim2=2)
        diagonal += 1e-4 * diagonal.mean(dim=1, keepdim=True)
        scales[start : start + ROWS] = torch.linalg.solve(system, wanted[start : start + ROWS])
    return scales.half().float()
