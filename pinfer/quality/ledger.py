"""Keeps what a long search has measured, by name, and says how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Measured = Callable[[str, Any, float], None]  # told of a name, what was found, and the seconds left at most
V = TypeVar("V")


class Ledger:
    """What was measured, by name, and how long the rest will take by the work done and ahead (multiplications)."""

    def __init__(self, known: Mapping[str, Any], measured: Measured) -> None:
        self._known, self._measured = dict(known), measured
        self._spent_s = self._done = 0.0
        self.ahead = 0.0

    def find(self, names: Sequence[str], work: float, measure: Callable[[list[int]], list[V]]) -> list[V]:
        """What is known by these names; of those that are not, given by number, `measure` makes it. `work` is that of all."""
        missing = [number for number, name in enumerate(names) if name not in self._known]
        if missing:
            started = time.perf_counter()
            found = measure(missing)
            self._spent_s += time.perf_counter() - started
            self._done += work * len(missing) / len(names)
            self._known |= {names[number]: one for number, one in zip(missing, found, strict=True)}
        self.ahead -= work
        for number in missing:
            left_s = self._spent_s / self._done * max(0.0, self.ahead)
            self._measured(names[number], self._known[names[number]], left_s)
        return [self._known[name] for name in names]
