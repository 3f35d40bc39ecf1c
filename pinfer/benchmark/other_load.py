"""How busy other programs kept the machine meanwhile: on a shared one, a figure means little without it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

BUSY_CORES = 0.1  # kept by others: above it figures are not to be quoted
BUSY_FIELDS = (0, 1, 2, 5, 6, 7)  # of /proc/stat's first line: user, nice, system, irq, softirq, steal


class OtherLoad:
    """Counts from its making on. pids: processes that are the measurement's own, besides this one."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = list(pids)
        self._began = time.monotonic()
        self._others_s = self._now_s()

    def cores(self) -> float | None:
        """Cores that others kept busy on average, time stolen by a host included; None where /proc does not say."""
        now_s, wall_s = self._now_s(), time.monotonic() - self._began
        if now_s is None or self._others_s is None or not wall_s:
            return None
        return max(0.0, (now_s - self._others_s) / wall_s)

    def _now_s(self) -> float | None:
        """CPU seconds of everything on the machine but this process and its workers, since some fixed time."""
        own = os.times()
        try:
            total = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
            # What follows the name in brackets starts with field 3; user and system time are 14 and 15.
            workers = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13] for pid in self._pids]
            ticks = sum(int(total[i]) for i in BUSY_FIELDS) - sum(int(field) for worker in workers for field in worker)
        except (OSError, ValueError, IndexError):
            return None
        return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system
