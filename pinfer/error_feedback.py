"""Rounds a matrix to few bits so that its products with given inputs change least, not its weights.

With H = E[x xᵀ] of the inputs, the products of W - Ŵ have the mean square tr((W - Ŵ) H (W - Ŵ)ᵀ). Let H = U D Uᵀ,
U unit upper triangular and D diagonal. Columns are rounded one after another, each having gained what the
columns before it lost, as U says:

    Ŵ_k = round(W_k + Σ_{j<k} (W_j - Ŵ_j) U_jk)

so that the mean square is Σ_k D_k · (the k-th rounding error)². That is GPTQ (Frantar et al. 2023; OBQ, Frantar
and Alistarh 2022) without an inverse, as LDLQ (Chee et al. 2023) writes it. The columns that carry most come
first. Scales are then fitted to the levels, one group after another by least squares, and the columns rounded anew.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from pinfer.quant import Q4_0, Q5_0, QuantTensor, QuantType
from pinfer.quantize import pack_levels

SHARES = 33  # scales tried for a group before anything is rounded, from a quarter of the largest weight upwards
ROUNDS = 2  # of rounding and fitting scales
BLOCK = 64  # columns whose errors are passed on at once
DAMPINGS = (0.01, 0.1, 1.0)  # of the mean squared input, added to every squared input: the first that makes H definite
CHUNK_WEIGHTS = 1 << 24  # rounded at a time: 64 MB
FP16_MAX = torch.finfo(torch.float16).max


class Grid(NamedTuple):
    """The levels that weights are rounded to: low, low + 1, … high, times a scale."""

    low: float
    high: float

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        return (values - self.low).round_().clamp_(0, self.high - self.low).add_(self.low)


GRIDS = {Q4_0: Grid(-8, 7), Q5_0: Grid(-16, 15)}


def error_feedback(weights: torch.Tensor, moment: torch.Tensor, kind: QuantType) -> QuantTensor:
    """`weights` float32 [N, D] in blocks of `kind`, Q4_0 or Q5_0, for inputs whose second moment is `moment`.

    moment: float32 [D, D], E[x xᵀ] of inputs x; it may have any rank, as it is damped. Beside the result it takes a few
    matrices [D, D] and some of CHUNK_WEIGHTS floats. ValueError for another type, dtype or shape, for columns that
    fill no whole blocks, for a moment that cannot be one, and for what is not finite or exceeds 65504.
    """
    if weights.dtype != torch.float32 or weights.dim() != 2:
        raise ValueError(f"expected float32 [rows, columns], not {weights.dtype} {list(weights.shape)}")
    if kind not in GRIDS:
        raise ValueError(f"error feedback rounds to {' or '.join(map(str, GRIDS))}, not to {kind}")
    kind.row_bytes(weights.shape[1])
    if not bool((weights.abs() <= FP16_MAX).all()):  # so that NaN fails
        raise ValueError(f"a weight is not finite or too large for {kind}")
    levels, scales = levels_and_scales(weights, moment, kind.block_size, GRIDS[kind])
    return pack_levels(levels, scales, kind)


def levels_and_scales(
    weights: torch.Tensor, moment: torch.Tensor, group: int, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels float32 [N, D] and, exact in fp16, a scale for each `group` of a row's columns, float32 [N, D / group].

    As `error_feedback`, for any levels. A scale that fp16 stores as 0 has levels of 0, or the smallest magnitude there is.
    """
    width = weights.shape[1]
    if width % group:
        raise ValueError(f"{width} columns are no multiple of groups of {group}")
    if moment.shape != (width, width) or not bool(moment.isfinite().all()):
        raise ValueError(f"the moment of inputs is {list(moment.shape)}, expected finite [{width}, {width}]")
    order = moment.diagonal().argsort(descending=True)
    damping, passed = _passed_on(moment[order][:, order])
    moment = moment + damping * torch.eye(width, device=moment.device)
    levels, step = torch.empty_like(weights), max(1, CHUNK_WEIGHTS // width)
    scales = weights.new_empty(len(weights), width // group)
    for start in range(0, len(weights), step):
        rows = slice(start, start + step)
        columns = weights[rows].T.contiguous()  # [D, n], where a column of the matrix is contiguous
        scale = _searched(columns, moment.diagonal(), group, grid)
        for _ in range(ROUNDS):
            rounded = _rounded(columns, scale, group, passed, order, grid)
            scale = _fitted(columns, rounded, scale, group, moment)
        levels[rows], scales[rows] = rounded.T, scale.T
    return levels, scales


def _passed_on(moment: torch.Tensor) -> tuple[float, torch.Tensor]:
    """What is added to the squared inputs, and U of H = U D Uᵀ, unit upper triangular [D, D], H so damped.

    By Cholesky's factor of the reversed matrix.
    """
    mean = float(moment.diagonal().mean())
    for share in DAMPINGS:
        damped, damping = moment.flip(0, 1), share * mean if mean > 0 else 1.0
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            upper = factor.flip(0, 1)
            return damping, upper.div_(upper.diagonal().clone())
    raise ValueError("the moment of inputs is not positive semi-definite")


def _storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.clamp_(-FP16_MAX, FP16_MAX).half().float()


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0, 1 / scale)


def _searched(columns: torch.Tensor, importance: torch.Tensor, group: int, grid: Grid) -> torch.Tensor:
    """Of some shares of a group's largest weight the scale that rounds it best on its own: float32 [D / group, n]."""
    found = []
    for piece, counts in zip(columns.split(group), importance.split(group), strict=True):
        largest = piece.abs().amax(dim=0) * (2 / (grid.high - grid.low))
        best, least = _storable(largest.clone()), torch.full_like(largest, torch.inf)
        for share in torch.linspace(0.25, 1.05, SHARES).tolist():
            scale = _storable(share * largest)
            error = counts @ grid.nearest(piece * _inverse(scale)).mul_(scale).sub_(piece).square_()
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        found.append(best)
    return torch.stack(found)


def _rounded(
    columns: torch.Tensor, scale: torch.Tensor, group: int, passed: torch.Tensor, order: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Levels [D, n] of the columns, rounded in `order`; `passed` is in that order too."""
    levels, errors = torch.empty_like(columns), torch.empty_like(columns)
    places, inverse = order.tolist(), _inverse(scale)
    for start in range(0, len(places), BLOCK):
        block = places[start : start + BLOCK]
        stop = start + len(block)
        wanted = torch.addmm(columns[block], passed[:start, start:stop].T, errors[:start])
        for j, place in enumerate(block):
            of = place // group
            torch.mul(wanted[j], inverse[of], out=levels[place])
            levels[place] = grid.nearest(levels[place])
            errors[start + j] = columns[place] - levels[place] * scale[of]
            wanted[j + 1 :].addr_(passed[start + j, start + j + 1 : stop], errors[start + j])
    return levels


def _fitted(
    columns: torch.Tensor, levels: torch.Tensor, scale: torch.Tensor, group: int, moment: torch.Tensor
) -> torch.Tensor:
    """Scales [D / group, n] that bring the products nearest under those levels, each in turn, the others held."""
    left = columns - levels * scale.repeat_interleave(group, dim=0)
    fitted = torch.empty_like(scale)
    for i, start in enumerate(range(0, len(columns), group)):
        rows = slice(start, start + group)
        own = levels[rows]
        gained = (own * (moment[rows] @ left)).sum(dim=0)
        size = (own * (moment[rows, rows] @ own)).sum(dim=0)
        better = _storable(scale[i] + torch.where(size > 0, gained / size, 0))
        left[rows] -= own * (better - scale[i])
        fitted[i] = better
    return fitted
