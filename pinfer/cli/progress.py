"""How far a long run is: a bar with the time left on a terminal, else a line a layer, or a tenth of a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pinfer.cli.console import note, size
from pinfer.engine.watcher import Watcher

WITHIN_S = 15.0  # between two lines on what happens inside a layer


class Layers:
    """Lines on stderr: one a layer, with the time left."""

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        """The walk starts after so many layers, each to be passed by so many sequences."""
        self._n_layers, self._first, self._started = n_layers, layers_done, time.perf_counter()
        self._told, self._layer = self._started, layers_done

    def sequence(self) -> None:
        """One more sequence has passed the present layer."""

    def within(self, text: str) -> None:
        """What happens inside the present layer; told now and then."""
        now = time.perf_counter()
        if now - self._told > WITHIN_S:
            self._told = now
            note(f"layer {self._layer}, {text}")

    def layer(self, number: int, text: str) -> None:
        """A layer is done, which the text tells of."""
        self._layer = number + 1
        each_s = (time.perf_counter() - self._started) / (number + 1 - self._first)
        left = duration(each_s * (self._n_layers - number - 1))
        note(f"layer {number}, {number + 1} of {self._n_layers}: {text}; {left} left")

    def note(self, text: str) -> None:
        """A remark, one line."""
        note(text)


class _Bar(Layers):
    """A bar, whose speed is that of this run: what an earlier one did is not counted."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        self._n_layers, self._layer = n_layers, layers_done
        self._task = self._progress.add_task(self._title(), total=(n_layers - layers_done) * n_sequences)

    def _title(self, within: str = "") -> str:
        return f"layer {min(self._layer + 1, self._n_layers)} of {self._n_layers}{within}"

    def sequence(self) -> None:
        self._progress.advance(self._task)

    def within(self, text: str) -> None:
        self._progress.update(self._task, description=self._title(f", {text}"))

    def layer(self, number: int, text: str) -> None:
        self._layer = number + 1
        self._progress.update(self._task, description=self._title())

    def note(self, text: str) -> None:
        self._progress.console.print(f"pinfer: {text}", markup=False, highlight=False, soft_wrap=True)


class Told(Watcher):
    """A watcher that passes on what every run tells; what a layer tells is left to those that know it."""

    def __init__(self, progress: Layers) -> None:
        self.progress = progress

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        self.progress.begin(n_layers, n_sequences, layers_done)

    def sequence(self) -> None:
        self.progress.sequence()

    def note(self, text: str) -> None:
        self.progress.note(text)


@contextmanager
def layers() -> Iterator[Layers]:
    """What suits stderr."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield Layers()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("sequences"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), transient=True) as progress:
        yield _Bar(progress)


def duration(seconds: float) -> str:
    """Time as people say it."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def written(n_bytes: int) -> Iterator[Callable[[int], None]]:
    """How much of a file is written: a function that is told of bytes, behind it a bar, or a line for every tenth."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield _Tenths(n_bytes)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task("", total=n_bytes)
        yield lambda more: progress.advance(task, more)


class _Tenths:
    """A line whenever another tenth is done and the last line is some seconds old."""

    def __init__(self, n_bytes: int) -> None:
        self._total, self._done, self._told, self._started = n_bytes, 0, 0, time.perf_counter()

    def __call__(self, more: int) -> None:
        self._done += more
        tenths, passed_s = 10 * self._done // max(1, self._total), time.perf_counter() - self._started
        if tenths > self._told and passed_s > WITHIN_S and self._done < self._total:
            self._told = tenths
            left_s = passed_s * (self._total - self._done) / self._done
            note(f"{size(self._done)} of {size(self._total)} written, {duration(left_s)} left")
