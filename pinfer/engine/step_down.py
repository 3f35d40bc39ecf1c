"""What happens when GPU memory runs out while a model is placed, for all estimates: one smaller placement, or a clean end."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from pinfer.engine.plans import Placement, Placer

MESSAGE_LENGTH = 200  # of torch's report, which goes on for a page
Find = Callable[[Placer], Placement]
Made = TypeVar("Made")


class MemoryRanOut(Exception):
    """A placement that did not fit its device."""

    def __init__(self, problem: torch.OutOfMemoryError, placer: Placer, found: Placement) -> None:
        super().__init__(" ".join(str(problem).split())[:MESSAGE_LENGTH])
        self.smaller = placer.smaller(found, found.device.account.used)


def within_memory(make: Callable[[Find], Made], tell: Callable[[str], None]) -> Made:
    """What `make` builds with the placement that the run asks for, or, where memory runs out, with a smaller one.

    `make` starts anew at each call, on an empty device, and raises MemoryRanOut. RuntimeError where the smaller
    placement does not fit either, or there is none.
    """
    try:
        return make(Placer.find)
    except MemoryRanOut as full:
        smaller, said = full.smaller, str(full)
    if smaller is None:
        raise RuntimeError(f"{said}: nothing smaller is left to place")
    gc.collect()  # what was placed goes before the next
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tell(f"{said}: going on with a smaller placement")
    try:
        return make(lambda placer: dataclasses.replace(smaller, device=placer.device))
    except MemoryRanOut as full:
        raise RuntimeError(f"{full}, twice: give a smaller --gpu-memory-gb or --gpu-layers") from full
