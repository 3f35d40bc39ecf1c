"""Launch parameters found by measuring: looked up by kernel, shape, density and GPU, kept in a JSON file.

    launch = tuning.launch_for(
        "sparse_ffn", x.device, Launch.of(width), candidates=lambda: variants(width),
        width=width, gate="Q4_K", up="Q4_K", down="Q8_0", activation="silu", tokens=1,
    )

A launcher asks at every call and gets its default back unless `tune` has found better for this very
kernel, shape and GPU. The host never knows how many neurons are active (the count stays on the
device), so a caller states what it expects: `with expect_density(0.1)`.

    python -m pinfer.kernels.tuning            # what is known, as a table; --clear forgets it

The file is $PINFER_TUNING, else tuning.json in the cache folder, and is read once a process;
PINFER_NO_TUNING=1 leaves every launcher at its default.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from pinfer.files import write_atomically
from pinfer.kernels.cpp.build import cache_folder

FORMAT = 1
DENSITIES = (0.03, 0.1, 0.2, 0.3, 0.5, 1.0)
ANY = "any"  # what is tuned without a stated density
UNSTATED = 0.1  # the density whose result is taken where none is stated and none was tuned without one
LEAST_GAIN = 0.02  # a default is known to work elsewhere too: noise must not replace it

Launch = TypeVar("Launch")
Call = Callable[[], Any]
Entry = dict[str, Any]
Cache = dict[str, dict[str, dict[str, Entry]]]  # GPU, kernel with its shape, density


class Place(NamedTuple):
    """Where results are: a file, or None for defaults; the GPU's name, or None for the tensors' own."""

    path: Path | None
    gpu: str | None = None


class Request(NamedTuple):
    """What a launcher asked for, and what it could take instead."""

    place: Place
    density: str
    default: Any
    candidates: Callable[[], Iterable[Any]]


@dataclass
class Trial:
    """A run with parameters forced by key; notes what else it asks for that can be tuned."""

    forced: dict[str, Any] = field(default_factory=dict)
    asked: dict[str, Request] = field(default_factory=dict)


_place: ContextVar[Place | None] = ContextVar("pinfer_tuning_place", default=None)
_density: ContextVar[str] = ContextVar("pinfer_tuning_density", default=ANY)
_trial: ContextVar[Trial | None] = ContextVar("pinfer_tuning_trial", default=None)
_answers: dict[tuple[Any, ...], Any] = {}
_warned: set[Path] = set()


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def expect_density(density: float | None) -> contextlib.AbstractContextManager[None]:
    """In this block, launch for about this share of active neurons (0 to 1); None says nothing about it."""
    if density is not None and not 0 <= density <= 1:
        raise ValueError(f"density {density} is not in [0, 1]")
    return _set(_density, density_bucket(density))


def density_bucket(density: float | None) -> str:
    """The name under which results for a density are kept: of the nearest of DENSITIES, or `any` for None."""
    return ANY if density is None else _by_nearness(density)[0]


def _by_nearness(density: float) -> list[str]:
    """DENSITIES by their ratio to this one, the nearest first: a kernel's work goes with the density."""
    return [str(one) for one in sorted(DENSITIES, key=lambda one: abs(math.log(one / max(density, 1e-9))))]


def use_cache(path: Path | None, gpu: str | None = None) -> contextlib.AbstractContextManager[None]:
    """In this block, look up and keep results in this file; None stands for defaults everywhere.

    `gpu` names the device whatever the tensors are on: for runs in the interpreter, and tests.
    """
    return _set(_place, Place(path, gpu))


def launch_for(
    kernel: str,
    device: torch.device,
    default: Launch,
    /,
    *,
    candidates: Callable[[], Iterable[Launch]] | None = None,
    **shape: Any,
) -> Launch:
    """The launch parameters for a kernel at a shape: the tuned ones, else `default`.

    default:    a frozen dataclass of positive ints that follows from the shape.
    candidates: makes what `tune` is to choose from, of the default's class; None is never tuned.
    shape:      all that tells one specialisation or size from another, as ints and strings.

    A density without a result takes that of the nearest density, then that without one; no stated
    density takes that without one, then that of the density nearest UNSTATED. Off a GPU
    the default is returned unless `use_cache` names a device.
    """
    place, density, trial = _place.get() or _default_place(), _density.get(), _trial.get()
    gpu = place.gpu or gpu_key(device)
    if trial is not None:
        key = key_of(kernel, shape)
        if key in trial.forced:
            return trial.forced[key]
        if candidates is not None:
            trial.asked.setdefault(key, Request(Place(place.path, gpu), density, default, candidates))
    if gpu is None or place.path is None:
        return default
    question = (place.path, gpu, density, default, kernel, *shape.items())
    answer = _answers.get(question)
    if answer is None:
        answer = _answers[question] = _look_up(place.path, gpu, key_of(kernel, shape), density, default)
    return answer


def key_of(kernel: str, shape: dict[str, Any]) -> str:
    return " ".join((kernel, *(f"{name}={shape[name]}" for name in sorted(shape))))


@functools.cache
def gpu_key(device: torch.device) -> str | None:
    """What results depend on besides the kernel: GPU, capability, multiprocessors, Triton; None off a GPU."""
    if device.type != "cuda":
        return None
    import triton

    gpu = torch.cuda.get_device_properties(device)
    size = f"{gpu.major}.{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
    return f"{gpu.name}, {size}, Triton {triton.__version__}"


def cache_path() -> Path | None:
    """The file of results; None where PINFER_NO_TUNING is set or nothing names a folder."""
    if os.environ.get("PINFER_NO_TUNING"):
        return None
    if named := os.environ.get("PINFER_TUNING"):
        return Path(named).absolute()
    with contextlib.suppress(RuntimeError):  # a user without a home
        return cache_folder() / "tuning.json"
    return None


@functools.cache
def _default_place() -> Place:
    return Place(cache_path())


def forget() -> None:
    """Read the environment and the files anew at the next lookup."""
    _default_place.cache_clear()
    _load.cache_clear()
    _answers.clear()
    _warned.clear()


def _look_up(path: Path, gpu: str, key: str, density: str, default: Any) -> Any:
    entries = _load(path).get(gpu, {}).get(key, {})
    sparse = UNSTATED if density == ANY else float(density)
    for name in (*((ANY,) if density == ANY else ()), *_by_nearness(sparse), ANY):
        if name in entries:
            launch = _launch_of(entries[name], default)
            if launch is not None:
                return launch
            _warn(path, f"{key} has parameters that its launcher does not take")
    return default


def _launch_of(entry: Entry, default: Any) -> Any:
    """The parameters of an entry, or None if they are not those of the default's class.

    A default other than the one it was measured against tells of another kernel: None as well.
    """
    values = entry["launch"]
    fits = entry["default"] == asdict(default) and values.keys() == asdict(default).keys()
    if fits and all(type(value) is int and value > 0 for value in values.values()):
        return type(default)(**values)
    return None


def _warn(path: Path, problem: str) -> None:
    """Once a file, however much of it is unfit."""
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"tuned launch parameters in {path} are ignored: {problem}", RuntimeWarning, stacklevel=2)


@functools.cache
def _load(path: Path) -> Cache:
    """What a file holds; nothing, with a warning, if it is damaged or of another format."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        for entries in (entries for kernels in content["gpus"].values() for entries in kernels.values()):
            for entry in entries.values():
                entry["launch"].keys(), entry["default"].keys(), said(entry)
        return content["gpus"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        _warn(path, f"{type(problem).__name__}: {problem}")
        return {}


def _keep(path: Path, gpu: str, key: str, density: str, entry: Entry) -> None:
    """Add an entry to what the file holds by now; it is never seen half-written. OSError."""
    import fcntl  # where Triton runs, it exists

    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # an entry that another process adds before the replacement would be lost
        cache = _load.__wrapped__(path)
        cache.setdefault(gpu, {}).setdefault(key, {})[density] = entry
        write_atomically(path, json.dumps({"format": FORMAT, "gpus": cache}, indent=1).encode())
    _load.cache_clear()
    _answers.clear()


def tune(
    op_name: str,
    make_inputs: Callable[[], Sequence[dict[str, Any]]],
    *,
    run: Callable[..., Any] | None = None,
    timer: Callable[[Sequence[Call]], float] | None = None,
    prepare: Callable[[Iterable[Call]], object] | None = None,
    again: bool = False,
    at_most: int | None = None,
) -> dict[str, Entry]:
    """Find the quickest launch parameters of every kernel that an op launches, one kernel after the other.

    op_name:     of the registry; its tolerance bounds the relative RMS error against the default's
                 result. A candidate beyond it, or one that raises (out of registers, say), is out.
    make_inputs: makes rotating copies of the arguments, enough to leave the caches. A run must give
                 the same result twice: one that adds to its inputs keeps its default.
    run:         a chain of calls of the op instead of its Triton implementation.
    timer:       microseconds a launch of these launches; `graph_us` by default.
    prepare:     is called with a launch of every candidate before they are timed, to compile them at once.
    again:       search even what has a result.
    at_most:     try only so many of the candidates.

    Returns the entries by kernel and shape, old ones included; each is on disk before the next search
    begins. Raises ValueError for an unknown op, off a GPU or without a file, OSError if that cannot be
    written, and what the default raises.
    """
    from pinfer.kernels import ops

    op = next((op for op in ops.OPS if op.name == op_name), None)
    if op is None:
        raise ValueError(f"op {op_name!r} is none of {', '.join(op.name for op in ops.OPS)}")
    calls = [partial(run or op.implementation("triton"), **given) for given in make_inputs()]
    trial, found = Trial(), {}
    with _set(_trial, trial):
        calls[0]()
    for key, (place, density, default, candidates) in trial.asked.items():
        path, gpu = place
        if path is not None and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "results cannot be kept in a folder", str(path))
        if path is None or gpu is None:
            raise ValueError(f"{key} cannot be tuned: {'tuning is switched off' if path is None else 'not on a GPU'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        entry = _load(path).get(gpu, {}).get(key, {}).get(density)
        if again or entry is None or _launch_of(entry, default) is None:
            others = islice((one for one in candidates() if one != default), at_most)
            launches = {one: [partial(_forced, {key: one}, call) for call in calls] for one in (default, *others)}
            if prepare is not None:
                prepare(each[0] for each in launches.values())
            entry = _quickest(default, launches, op.tolerance, timer or graph_us)
            _keep(path, gpu, key, density, entry)
        found[key] = entry
    return found


def _forced(launches: dict[str, Any], call: Call) -> Any:
    with _set(_trial, Trial(launches)):
        return call()


def _quickest(
    default: Any, launches: Mapping[Any, Sequence[Call]], tolerance: float, timer: Callable[[Sequence[Call]], float]
) -> Entry:
    """Time every candidate whose result agrees with the default's; the entry to keep."""
    with _poisoned_memory():
        expected = launches[default][0]()
    times, lost = {default: timer(launches[default])}, {"failed": 0, "wrong": 0}
    for one in launches:
        if one == default:
            continue
        try:
            with _poisoned_memory():
                agrees = _agrees(launches[one][0](), expected, tolerance)
            if agrees:
                times[one] = timer(launches[one])
            else:
                lost["wrong"] += 1
        except Exception:  # out of shared memory, a tile that does not compile: no candidate at this shape
            lost["failed"] += 1
    best = min(times, key=lambda one: times[one])
    # The quickest of many is partly the luckiest, and the default was timed first, on a cold GPU: both anew.
    default_us = timer(launches[default])
    best_us = default_us if best == default else timer(launches[best])
    if best_us > (1 - LEAST_GAIN) * default_us:
        best, best_us = default, default_us
    parameters = {"launch": asdict(best), "default": asdict(default)}
    return parameters | {
        "us": round(best_us, 3),
        "default_us": round(default_us, 3),
        "tried": len(launches) - 1,
        **lost,
    }


def graph_us(launches: Sequence[Call]) -> float:
    """Median microseconds a launch, over replays of a CUDA graph that goes through all of them."""
    from triton.testing import do_bench_cudagraph

    def one_round() -> None:
        for launch in launches:
            launch()

    torch.cuda.synchronize()  # it captures on a stream of its own, which does not wait for the inputs
    return 1e3 * do_bench_cudagraph(one_round, return_mode="median") / len(launches)


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Torch's own fill of fresh memory (NaN, or the largest integer): a forgotten output is not the last run's."""
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)


def _agrees(result: Any, expected: Any, tolerance: float) -> bool:
    """Whether each tensor of a result is within this relative RMS error of the expected one; NaN never is."""
    if isinstance(expected, torch.Tensor):
        if result.shape != expected.shape:
            return False
        wanted = expected.double()
        return bool((result.double() - wanted).norm() <= tolerance * wanted.norm())
    if dataclasses.is_dataclass(expected):
        result, expected = tuple(vars(result).values()), tuple(vars(expected).values())
    if isinstance(expected, (tuple, list)):
        return all(_agrees(one, other, tolerance) for one, other in zip(result, expected, strict=True))
    return bool(result == expected)


def said(entry: Entry) -> str:
    """An entry in one line."""
    launch = " ".join(f"{name}={value}" for name, value in entry["launch"].items())
    kept = " (the default)" if entry["launch"] == entry["default"] else ""
    lost = "".join(f", {entry[name]} {name}" for name in ("failed", "wrong") if entry[name])
    return f"{entry['default_us']:.1f} -> {entry['us']:.1f} us, {entry['tried']} tried{lost}: {launch}{kept}"


def main(arguments: list[str] | None = None) -> int:
    """Print what the file holds, a line for each result; 2 where it is none, or has no place to be."""
    parser = argparse.ArgumentParser(prog="python -m pinfer.kernels.tuning", description="Tuned launch parameters.")
    parser.add_argument("--clear", action="store_true", help="delete the file")
    clear, path = parser.parse_args(arguments).clear, cache_path()
    if path is None:
        print("error: PINFER_NO_TUNING is set, or no folder can hold the file", file=sys.stderr)
        return 2
    if path.is_dir():
        print(f"error: {path} is a folder, expected a file", file=sys.stderr)
        return 2
    if clear:
        print(f"{path}: {'deleted' if path.exists() else 'there was none'}")
        path.unlink(missing_ok=True)
        return 0
    with warnings.catch_warnings(record=True) as unfit:
        warnings.simplefilter("always")
        known = _load(path)
    if unfit:
        print(f"error: {unfit[0].message}", file=sys.stderr)
        return 2
    print(path if known else f"{path}: nothing is tuned yet")
    for gpu, kernels in known.items():
        print(gpu)
        for key, entries in kernels.items():
            for density, entry in entries.items():
                print(f"  {key} density {density}: {said(entry)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
