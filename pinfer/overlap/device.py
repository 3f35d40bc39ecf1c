"""What a lane asks of a device: copies beside its kernels, and host functions in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from pinfer.kernels.cpp.worker import Job
from pinfer.kernels.select_active import Active
from pinfer.overlap.driver import Driver


class Device(ABC):
    """A device's stream of kernels and one beside it, in which what `aside` issues waits for what came before."""

    @abstractmethod
    def capturing(self) -> bool:
        """Whether what is issued now becomes part of a graph instead of being run."""

    @abstractmethod
    def aside(self) -> AbstractContextManager[None]:
        """Issue the block's work beside the kernels that follow, after those so far."""

    @abstractmethod
    def join(self) -> None:
        """Have kernels from here on wait for all that was issued aside."""

    @abstractmethod
    def wait_aside(self) -> None:
        """Wait, on the host, for all that was issued aside. Not while capturing."""

    @abstractmethod
    def host(self, like: torch.Tensor) -> torch.Tensor:
        """Zeros on the host of a tensor's shape and type, in memory that the device can copy from and to meanwhile."""

    @abstractmethod
    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Issue a copy."""

    @abstractmethod
    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Memory of the device."""

    @abstractmethod
    def launch(self, job: Job) -> None:
        """Issue the running of a job and those chained to it."""

    def publish(
        self,
        x: torch.Tensor,
        active: Active | None,
        to_x: torch.Tensor,
        to_active: Active | None,
        flag: torch.Tensor,
        epoch: torch.Tensor,
    ) -> None:
        """Issue `handover.publish`."""
        from pinfer.kernels import handover  # needs Triton

        handover.publish(x, active, to_x, to_active, flag, epoch)

    def collect(
        self, y: torch.Tensor, flag: torch.Tensor, epoch: torch.Tensor, failed: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Issue `handover.collect`."""
        from pinfer.kernels import handover

        handover.collect(y, flag, epoch, failed, out)


class CUDADevice(Device):
    """Streams of torch's CUDA device. It awaits its first run on a GPU.

    Memory that is used aside is of the kernels' own stream, which joins before it can be given away.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._driver = device, Driver()
        self._beside = torch.cuda.Stream(device)

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._beside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._beside):
            yield

    def join(self) -> None:
        torch.cuda.current_stream(self.device).wait_stream(self._beside)

    def wait_aside(self) -> None:
        self._beside.synchronize()

    def host(self, like: torch.Tensor) -> torch.Tensor:
        return torch.zeros(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    def launch(self, job: Job) -> None:
        self._driver.launch(torch.cuda.current_stream(self.device).cuda_stream, job)
