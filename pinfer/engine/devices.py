"""Devices that a plan's GPU part is placed on: a CUDA card, or one that is emulated on the CPU; both account for it.

What is put on a device is counted before it is allocated, against a limit: going over it raises
torch.OutOfMemoryError, as a full card does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from pinfer.config import DeviceName
from pinfer.kernels.cpp import core_available
from pinfer.kernels.planes import repack
from pinfer.models import Transformer
from pinfer.overlap import Lane, Place, PrefillCosts, cuda, emulated
from pinfer.placement.memory import Reserves
from pinfer.quant import QuantTensor, planes_row_bytes

NO_CUDA = "torch finds no CUDA device here"
PREFILL_CHUNK = 512  # tokens: bounds the attention mask and the widest activation
CHUNK_WEIGHTS = 1 << 22  # of a matrix that is rearranged on its way: the integers in between take some 60 MB


class Account:
    """Bytes on a device: `used` now, `peak` at most so far, `limit` or None."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.used, self.peak = limit, 0, 0

    def take(self, n_bytes: int) -> None:
        """Count bytes; torch.OutOfMemoryError if they pass the limit, and they are not counted then."""
        if self.limit is not None and self.used + n_bytes > self.limit:
            raise torch.OutOfMemoryError(
                f"out of GPU memory: {n_bytes} bytes more than {self.used} would pass the limit of {self.limit}"
            )
        self.used += n_bytes
        self.peak = max(self.peak, self.used)


class Device(ABC):
    """Memory to place weights in, counted by `account`, and the lane that runs the CPU's part beside it.

    `budget` is what the process may take of it, None without a limit; `rearranged` says whether weights lie in planes.
    """

    name: str
    torch_device: torch.device
    rearranged: bool

    def __init__(self, limit: int | None = None) -> None:
        self.budget = limit
        self.account = Account(limit)

    @property
    def peak_bytes(self) -> int:
        return self.account.peak

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor there. torch.OutOfMemoryError where it does not fit."""
        self.account.take(tensor.nbytes)
        return tensor.to(self.torch_device)

    def put_weight(self, weight: QuantTensor) -> QuantTensor:
        """The matrix there, laid out for its kernels; as `put`."""
        self.account.take(weight.nbytes)
        return weight.to(self.torch_device)

    def probe(self, model: Transformer) -> None:
        """Run a placed model once as widely as it will be, so that memory runs out here or not at all."""
        tokens = torch.zeros(min(PREFILL_CHUNK, model.context), dtype=torch.int64)
        model(tokens, model.new_cache(), last_only=True).cpu()

    @abstractmethod
    def lane(self, places: int | Sequence[Place], prefill: PrefillCosts | None = None) -> Lane | None:
        """What runs cold shards while the device computes: a worker for each place, or one of so many threads.

        prefill: by which prompts choose between the CPU and bringing weights here; None: always the CPU.
        """


class Emulated(Device):
    """A device that is a second shard on the CPU: nothing is copied, everything is counted."""

    name, torch_device, rearranged = "emulated", torch.device("cpu"), False

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        self.account.take(tensor.nbytes)
        return tensor

    def put_weight(self, weight: QuantTensor) -> QuantTensor:
        self.account.take(weight.nbytes)
        return weight

    def probe(self, model: Transformer) -> None:
        """Activations are the CPU's: there is nothing to find out."""

    def lane(self, places: int | Sequence[Place], prefill: PrefillCosts | None = None) -> Lane | None:
        return emulated(places, prefill=prefill) if core_available() else None


class Cuda(Device):
    """The current CUDA card. With a limit, torch may not take more of it than that."""

    name, rearranged = "cuda", True

    def __init__(self, limit: int | None = None) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        free, total = torch.cuda.mem_get_info(self.torch_device)
        context = Reserves().context_bytes  # of this process, taken before `free` was read
        budget = free + context if limit is None else min(limit, free + context)
        super().__init__(budget)
        self.account.limit = max(0, budget - context)
        torch.cuda.set_per_process_memory_fraction(self.account.limit / total, self.torch_device)

    @property
    def peak_bytes(self) -> int:
        """All that torch has held, activations and caches included; the CUDA context is not torch's."""
        return torch.cuda.max_memory_reserved(self.torch_device)

    def put_weight(self, weight: QuantTensor) -> QuantTensor:
        """Copied and rearranged some rows at a time, so that no second copy is on the card."""
        row_bytes = planes_row_bytes(weight.type, weight.columns)
        self.account.take(weight.rows * row_bytes)
        blocks = torch.empty(weight.rows, row_bytes, dtype=torch.uint8, device=self.torch_device)
        step = max(1, CHUNK_WEIGHTS // weight.columns)
        for first in range(0, weight.rows, step):
            rows = slice(first, first + step)
            blocks[rows] = repack(weight[rows].to(self.torch_device)).blocks
        return QuantTensor(blocks, weight.type, weight.columns, "planes")

    def lane(self, places: int | Sequence[Place], prefill: PrefillCosts | None = None) -> Lane | None:
        return cuda(places, prefill=prefill)


def device_for(name: DeviceName, limit: int | None) -> Device | None:
    """The device of that name, of which at most `limit` bytes may be taken; None where all is computed on the CPU.

    ValueError for a CUDA card that is not there.
    """
    if name == "emulated":
        return Emulated(limit)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return None
    if not torch.cuda.is_available():
        raise ValueError(f"device {name}: {NO_CUDA}")
    return Cuda(limit)
