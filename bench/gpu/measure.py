"""One cell: inputs, check, rotating copies, the quickest variant, times. A failed check has no times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu import bandwidth as memory
from bench.gpu.candidates import Candidate
from bench.gpu.checks import Outcome, check
from bench.gpu.timing import Timer, Times
from bench.gpu.trees import clone, held_bytes

COPY_BYTES = 1 << 30  # of each buffer; 20 times an H100's L2 cache
DRY_BYTES, DRY_VARIANTS = 1 << 14, 2


def generator_for(label: str, device: torch.device) -> torch.Generator:
    """Seeded by the cell's name: the same inputs in every run."""
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "little")
    return torch.Generator(device=device).manual_seed(seed)


def measure_cell(candidate: Candidate, case: dict[str, Any], label: str, timer: Timer) -> dict[str, Any]:
    """The values of a cell's record: error beside microseconds and bytes, or the reason there are none."""
    original = candidate.make_inputs(generator_for(label, timer.device), **case)
    inputs = candidate.prepare(original)
    outcome = check(
        lambda **given: candidate.compared(candidate.run(**given)),
        lambda **given: candidate.compared(candidate.reference(**given)),
        inputs, original, candidate.tolerance, repeatable=candidate.repeatable, poison=candidate.jit,
    )  # fmt: skip
    if not outcome.passed:
        return outcome.record()
    touched, held = candidate.bytes_moved(**inputs), held_bytes(inputs)
    del original
    copies = timer.copies(touched, held)
    if copies < 1:
        return outcome.record() | {
            "passed": False,
            "skipped": True,
            "reason": f"{held / 1e9:.1f} GB of inputs do not fit",
        }
    rotating = [inputs, *(clone(inputs) for _ in range(copies - 1))]
    variant, times = quickest(candidate, rotating, timer)
    values = {
        **outcome.record(), "dense": candidate.dense, "variant": dict(variant), "copies": copies,
        "served_from_memory": timer.dry or copies * touched > 2 * timer.l2_bytes,
        "bytes": touched, "gb_per_s": touched / times.p50_us / 1e3, **recorded(times),
    }  # fmt: skip
    active = inputs.get("active")
    return values | ({} if active is None else {"active_neurons": int(active.count)})


def quickest(candidate: Candidate, rotating: list[dict[str, Any]], timer: Timer) -> tuple[Any, Times]:
    """The variant with the least median, and its full measurement."""

    def launches(variant: Any) -> list[Callable[[], object]]:
        return [partial(candidate.run, **inputs, **variant) for inputs in rotating]

    variants = candidate.variants[:DRY_VARIANTS] if timer.dry else candidate.variants
    variant = variants[0]
    if len(variants) > 1:
        quick = [timer.measure(launches(one), quick=True).p50_us for one in variants]
        variant = variants[quick.index(min(quick))]
    return variant, timer.measure(launches(variant))


def recorded(times: Times) -> dict[str, Any]:
    return {"us_p20": times.p20_us, "us_p50": times.p50_us, "us_p80": times.p80_us, "replays": times.replays}


def measure_bandwidth(timer: Timer) -> dict[str, dict[str, Any]]:
    """GB/s by way: copies count bytes read and written, `read` the bytes read. Each result is checked first."""
    size = DRY_BYTES if timer.dry else min(COPY_BYTES, timer.free_bytes() // 8)
    size -= size % (4 * memory.BLOCK)
    generator = torch.Generator(device=timer.device).manual_seed(1)
    source = torch.rand(size // 4, generator=generator, device=timer.device)
    target = torch.empty_like(source)
    sums = torch.empty(memory.read_programs(timer.device), device=timer.device)
    ways: dict[str, tuple[Callable[[], object], int, Callable[[], float]]] = {
        "copy (torch)": (lambda: target.copy_(source), 2, lambda: float((target - source).abs().max())),
        "copy (triton)": (lambda: memory.copy(source, target), 2, lambda: float((target - source).abs().max())),
        "read (triton)": (
            lambda: memory.read(source, sums), 1, lambda: abs(float(sums.double().sum() / source.double().sum()) - 1),
        ),
    }  # fmt: skip
    found = {}
    for name, (launch, passes, error_of) in ways.items():
        target.zero_()
        launch()
        outcome = Outcome(error := error_of(), 1e-5, reason=None if error <= 1e-5 else f"wrong result ({error:.3g})")
        times = timer.measure([launch])
        found[name] = {
            **outcome.record(), **recorded(times), "bytes": passes * size, "gb_per_s": passes * size / times.p50_us / 1e3,
        }  # fmt: skip
    return found
