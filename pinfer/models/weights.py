"""Where a model's weights come from."""

from __future__ import annotations

from typing import Protocol

import torch

from pinfer.quant import QuantTensor


class WeightSource(Protocol):
    """Weights under GGUF's tensor names: a GGUFFile, or anything that answers like one."""

    def has(self, name: str) -> bool: ...
    def tensor(self, name: str) -> QuantTensor: ...
    def vector(self, name: str) -> torch.Tensor: ...
