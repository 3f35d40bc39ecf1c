"""Correctness before speed: error against the fp32 reference, bitwise repeats, and replay of a CUDA graph."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu.timing import capture
from bench.gpu.trees import clone, held_bytes, map_tensors, poisoned_memory, relative_error, restore, same_bits, tensors

REFERENCE_ON_CPU_BELOW = 64_000_000  # bytes of inputs: larger ones take the CPU seconds


@dataclass(frozen=True)
class Outcome:
    """What a check found; `replays` is None where there is no device to capture a graph on."""

    error: float | None
    tolerance: float
    repeats: bool | None = None
    replays: bool | None = None
    reason: str | None = None

    @property
    def passed(self) -> bool:
        return self.reason is None

    def record(self) -> dict[str, Any]:
        error = self.error if self.error is not None and math.isfinite(self.error) else None  # JSON knows no NaN
        return {
            "error": error, "tolerance": self.tolerance, "repeats_bitwise": self.repeats,
            "graph_replays": self.replays, "passed": self.passed, "reason": self.reason,
        }  # fmt: skip


def check(
    run: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: dict[str, Any],
    original: dict[str, Any],
    tolerance: float,
    *,
    repeatable: bool = True,
    poison: bool = True,
) -> Outcome:
    """Run on `inputs` against the reference on `original`, the same weights as they were before repacking.

    `repeatable` False (atomics) asks for graph results within the tolerance instead of bitwise ones;
    `poison` fills fresh memory with NaN for the first run, which torch.compile cannot trace through.
    Never raises for what the implementation does: the reason stands in the outcome.
    """
    try:
        expected = expected_from(reference, original)
        with poisoned_memory() if poison else contextlib.nullcontext():
            first = run(**clone(inputs))
        second = run(**clone(inputs))
        error = relative_error(first, expected)
        repeats = same_bits(first, second)
        replays = None
        if all(tensor.is_cuda for tensor in tensors(inputs)):
            replayed = replay(run, inputs)
            replays = same_bits(first, replayed) if repeatable else relative_error(replayed, expected) <= tolerance
    except Exception as problem:
        return Outcome(None, tolerance, reason=said(problem))
    reason = None
    if not error <= tolerance:
        reason = f"error {error:.3g} above {tolerance:g}"
    elif repeatable and not repeats:
        reason = "two runs differ"
    elif replays is False:
        reason = "a CUDA graph's replay differs from eager"
    return Outcome(error, tolerance, repeats, replays, reason)


def expected_from(reference: Callable[..., Any], original: dict[str, Any]) -> Any:
    """The reference's result, on the CPU for small inputs, else where they are, in true fp32."""
    torch.set_float32_matmul_precision("highest")
    if held_bytes(original) < REFERENCE_ON_CPU_BELOW:
        return reference(**map_tensors(lambda tensor: tensor.to("cpu", copy=True), original))
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels sum in another precision
        return reference(**clone(original))


def replay(run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """The result of a captured run over inputs that were put back to what they were."""
    mine = clone(inputs)
    results: list[Any] = []
    graph = capture([lambda: run(**mine)], results)
    for tensor in tensors(results[0]):
        tensor.fill_(0)  # an answer left over from before would pass for the replay's
    restore(mine, inputs)
    graph.replay()
    torch.cuda.synchronize()
    return clone(results[0])


def said(problem: BaseException) -> str:
    """One line of an error: its type, what it says, and the line of this repository that raised it."""
    frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if "site-packages" not in frame.filename]
    where = f" at {frames[-1].filename.rsplit('/', 2)[-1]}:{frames[-1].lineno}" if frames else ""
    text = " ".join(str(problem).split())
    return f"{type(problem).__name__}: {text[:300]}{where}"
