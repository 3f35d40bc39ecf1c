"""Prompts: whether cold neurons are computed on the CPU, or their weights brought to the device for this batch."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class PrefillCosts:
    """What a batch costs in either place: bytes/s of reading on the CPU and of copying to the device, and float
    operations/s of products over many tokens; None where a rate is known not to limit."""

    cpu_bandwidth: float
    to_gpu_bandwidth: float
    cpu_flops: float | None = None
    gpu_flops: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"{field.name} must be above 0, not {value}")

    def cpu_s(self, tokens: int, weights: int, nbytes: int) -> float:
        """Seconds on the CPU for so many weights in so many bytes; a batch lists nearly all of its neurons."""
        return max(nbytes / self.cpu_bandwidth, _product_s(tokens, weights, self.cpu_flops))

    def streamed_s(self, tokens: int, weights: int, nbytes: int) -> float:
        """The same on the device, which computes a piece while the next one is copied."""
        return max(nbytes / self.to_gpu_bandwidth, _product_s(tokens, weights, self.gpu_flops))

    def streams(self, tokens: int, weights: int, nbytes: int) -> bool:
        """Whether bringing the weights is faster. Never for one token, whose few neurons the CPU has at hand."""
        return tokens > 1 and self.streamed_s(tokens, weights, nbytes) < self.cpu_s(tokens, weights, nbytes)


def _product_s(tokens: int, weights: int, flops: float | None) -> float:
    return 2 * tokens * weights / flops if flops else 0.0
