"""Soft capping (Gemma 2, Gemma Team 2024): numbers bent into ±cap, in plain torch."""

from __future__ import annotations

import math

import torch


def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap · tanh(x / cap). x: float32 of any shape; cap: above 0. Returns float32 as x; ValueError for another cap."""
    check_cap(cap)
    return cap * torch.tanh(x / cap)


def check_cap(cap: float) -> None:
    """ValueError unless the cap is finite and above 0; every implementation calls it."""
    if not 0 < cap < math.inf:
        raise ValueError(f"softcap is {cap}, expected a finite number above 0")
