"""Muon for the block matrices, AdamW for embedding and norms, one schedule for both.

Muon: momentum, then the update is replaced by its nearest semi-orthogonal matrix, found with five
Newton-Schulz steps (Keller Jordan, 2024).
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

MUON_LR = 0.02
MUON_MOMENTUM = 0.95
ADAM_LR = 3e-3
ADAM_BETAS = (0.9, 0.95)
WARMUP_STEPS = 20
DECAY_START = 0.5  # share of the budget at the full rate
FINAL_RATE = 0.02  # of the peak, reached linearly at the end of the budget
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic tuned for slope at 0, not for exactness


def orthogonalise(update: Tensor) -> Tensor:
    """Return the approximate polar factor of each matrix of update [M, rows, cols]."""
    a, b, c = NEWTON_SCHULZ
    x = update
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates; parameters of one shape are treated as one batch."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": MUON_LR, "momentum": MUON_MOMENTUM})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, members in by_shape.items():
                self._step_shape(shape, members, group["lr"], group["momentum"])

    def _step_shape(self, shape: torch.Size, members: list[nn.Parameter], lr: float, momentum: float) -> None:
        updates = []
        for parameter in members:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            updates.append(parameter.grad.lerp(state["momentum"], momentum))
        directions = orthogonalise(torch.stack(updates))
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for parameter, direction in zip(members, directions, strict=True):
            parameter.add_(direction, alpha=-lr * scale)


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return [Muon over block matrices, AdamW over embedding and norms]."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim == 2 and not name.startswith("embedding")
        (matrices if is_matrix else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=ADAM_BETAS, weight_decay=0.0, fused=True)
    return [Muon(matrices), adam]


def rate_at(step: int, progress: float) -> float:
    """Return the learning rate as a share of its peak: warm-up, constant, linear decay.

    `progress` is the share of the budget already used, 0 to 1.
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decayed = max(0.0, (progress - DECAY_START) / (1 - DECAY_START))
    return warmup * (1 - (1 - FINAL_RATE) * min(1.0, decayed))


def set_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set every group's learning rate to `rate` times its peak."""
    for optimizer, peak in zip(optimizers, (MUON_LR, ADAM_LR), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
