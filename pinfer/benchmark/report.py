"""From the turns of all rounds to the figures that are shown: medians, spreads, ratios, shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pinfer.benchmark.weight_bytes import StepBytes


@dataclass(frozen=True)
class Turn:
    """One contestant's figures of one round; density is that of decode, vram_bytes the most it held on a GPU."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    density: float
    peak_rss_bytes: int
    vram_bytes: int = 0


@dataclass(frozen=True)
class Spread:
    """Median and the band that holds the middle 60 % of the rounds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(*(float(value) for value in np.percentile(values, (20, 50, 80))))


@dataclass(frozen=True)
class ContestantReport:
    """One contestant's figures. Ratios are taken round by round against the baseline's turn of the same round.

    step_bytes: weights a decode step needs (an estimate where the method is sparse, see StepBytes).
    bandwidth_share: decode_bytes_per_s over the measured read bandwidth; above 1 where the caches
    hold the weights, None where the bandwidth was not measured.
    """

    name: str
    version: str
    prefill_tokens_per_s: Spread
    decode_tokens_per_s: Spread
    step_bytes: float
    decode_bytes_per_s: float
    bandwidth_share: float | None
    density: float
    peak_rss_bytes: int
    vram_bytes: int
    prefill_ratio: Spread
    decode_ratio: Spread


@dataclass(frozen=True)
class Report:
    """All of one benchmark.

    other_cores: cores that other programs kept busy meanwhile, on average; None where that is unknown.
    """

    model: str
    method: str
    threads: int
    prompt_tokens: int
    opening_tokens: int
    decode_tokens: int
    rounds: int
    dense_step_bytes: int
    read_bandwidth_bytes_per_s: Spread | None
    other_cores: float | None
    baseline: str
    contestants: tuple[ContestantReport, ...]
    environment: Mapping[str, str | None]

    def as_json(self) -> dict[str, Any]:
        """Plain data, nested as the classes are."""
        return dataclasses.asdict(self)


def contestant_report(
    name: str,
    about: Mapping[str, Any],
    turns: Sequence[Turn],
    baseline: Sequence[Turn],
    step: StepBytes,
    bandwidth: Spread | None,
) -> ContestantReport:
    """Figures of one contestant from its `turns` and the baseline's, one a round.

    about: what its worker says of itself: version, and method and predictor_bytes where it is not dense by nature.
    """
    prefill = [turn.prefill_tokens_per_s for turn in turns]
    decode = [turn.decode_tokens_per_s for turn in turns]
    density = float(np.median([turn.density for turn in turns]))
    step_bytes = step.needed(about.get("method", "dense"), density, about.get("predictor_bytes", 0))
    decode_bytes_per_s = step_bytes * Spread.of(decode).p50
    return ContestantReport(
        name=name,
        version=about["version"],
        prefill_tokens_per_s=Spread.of(prefill),
        decode_tokens_per_s=Spread.of(decode),
        step_bytes=step_bytes,
        decode_bytes_per_s=decode_bytes_per_s,
        bandwidth_share=None if bandwidth is None else decode_bytes_per_s / bandwidth.p50,
        density=density,
        peak_rss_bytes=max(turn.peak_rss_bytes for turn in turns),
        vram_bytes=max(turn.vram_bytes for turn in turns),
        prefill_ratio=Spread.of(
            [ours / other.prefill_tokens_per_s for ours, other in zip(prefill, baseline, strict=True)]
        ),
        decode_ratio=Spread.of(
            [ours / other.decode_tokens_per_s for ours, other in zip(decode, baseline, strict=True)]
        ),
    )
