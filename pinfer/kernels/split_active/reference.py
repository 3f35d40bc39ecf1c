"""The parts of an active list, in plain torch: what hands a prediction for all neurons to their shards."""

from __future__ import annotations

from itertools import accumulate

import torch

from pinfer.kernels.select_active.reference import Active, listed


def split_active(indices: torch.Tensor, count: torch.Tensor, sizes: tuple[int, ...]) -> tuple[Active, ...]:
    """The list of the first sizes[0] neurons, of the next sizes[1] and so on, each numbered from 0.

    indices, count: an `Active` list of as many neurons as all sizes together. ValueError for other sizes.
    """
    check_inputs(indices, count, sizes)
    flags = torch.zeros(indices.numel(), dtype=torch.bool, device=indices.device)
    flags[indices[: int(count)].long()] = True
    return tuple(listed(part) for part in flags.split(sizes))


def check_inputs(indices: torch.Tensor, count: torch.Tensor, sizes: tuple[int, ...]) -> None:
    """ValueError unless the list is int32 and as long as the parts; every implementation calls it."""
    if indices.dtype != torch.int32 or count.dtype != torch.int32:
        raise ValueError("the active list must be int32 indices with an int32 count")
    if not sizes or min(sizes) < 0 or sum(sizes) != indices.numel():
        raise ValueError(f"parts of {list(sizes)} neurons do not make up the {indices.numel()} of the list")


def parts_of(indices: torch.Tensor, counts: torch.Tensor, sizes: tuple[int, ...]) -> tuple[Active, ...]:
    """Lists that lie one behind the other in int32 [N], each with room for all its neurons; counts int32 [parts]."""
    ends = list(accumulate(sizes))
    return tuple(
        Active(indices[end - size : end], counts[part : part + 1])
        for part, (size, end) in enumerate(zip(sizes, ends, strict=True))
    )
