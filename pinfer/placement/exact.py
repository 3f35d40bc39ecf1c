"""The fixed costs by branch and bound: HiGHS (Huangfu & Hall 2018) over ways as binaries, hot neurons as numbers.

A curve enters as its tangents, which hold only where its way is taken (perspective form): t >= (T_j - slope_j j) z +
slope_j h for the tangent at j of H = least + h. Few tangents keep it a relaxation, so its bound holds; all of them, with h
whole, make it exact over hottest-first placements.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from pinfer.placement.dual import Chain
from pinfer.placement.options import ON_GPU, Curve

TANGENTS = 24
SCALE = 1e4  # of the objective and of memory, so that HiGHS's absolute tolerances are far below what counts
TIME_LIMIT_S = 5.0
STDOUT = 1
LEAST_GAP = 5e-4


class _Row(NamedTuple):
    columns: list[int]
    values: list[float]
    low: float
    high: float


class _Model:
    """Columns and rows as they come."""

    def __init__(self) -> None:
        self.costs: list[float] = []
        self.upper: list[float] = []
        self.whole: list[int] = []
        self.rows: list[_Row] = []

    def column(self, cost: float, upper: float = np.inf, *, whole: bool = False) -> int:
        self.costs.append(cost)
        self.upper.append(upper)
        self.whole.append(int(whole))
        return len(self.costs) - 1

    def row(self, terms: dict[int, float], low: float = -np.inf, high: float = np.inf) -> None:
        self.rows.append(_Row(list(terms), list(terms.values()), low, high))

    def solve(self, gap: float) -> tuple[np.ndarray | None, float]:
        """The columns' values, None where none were found in time, and the bound that was proven."""
        from scipy.optimize import Bounds, LinearConstraint, milp  # 30 MB that most commands do without
        from scipy.sparse import coo_array

        index = np.repeat(np.arange(len(self.rows)), [len(row.columns) for row in self.rows])
        columns = np.concatenate([row.columns for row in self.rows])
        values = np.concatenate([row.values for row in self.rows])
        matrix = coo_array((values, (index, columns)), shape=(len(self.rows), len(self.costs))).tocsr()
        with _unheard():
            result = milp(
                np.array(self.costs),
                integrality=np.array(self.whole),
                bounds=Bounds(0, np.array(self.upper)),
                constraints=LinearConstraint(matrix, [row.low for row in self.rows], [row.high for row in self.rows]),
                options={"mip_rel_gap": gap, "time_limit": TIME_LIMIT_S},
            )
        bound = getattr(result, "mip_dual_bound", None)
        return result.x, -np.inf if bound is None else float(bound)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keeps C's standard output from the user's, where it would stand in the midst of JSON: now and then HiGHS prints a
    line of its debugging, whatever it is asked."""
    c = ctypes.CDLL(None)
    c.fflush(None)  # what was printed before is the user's
    try:
        kept = os.dup(STDOUT)
    except OSError:  # it is closed: nothing can be heard
        yield
        return
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), STDOUT)
    try:
        yield
    finally:
        c.fflush(None)
        os.dup2(kept, STDOUT)
        os.close(kept)


def by_highs(
    chain: Chain, capacity: int, price: float, best_s: float, *, exact: bool
) -> tuple[np.ndarray | None, float, np.ndarray | None]:
    """Ways int64 [layers], a bound in seconds, and hot neurons where `exact`; None for what was not found in time.

    The bound is one for every choice of neurons; where `exact`, for hottest-first placements alone.

    price: where tangents are densest. best_s: a placement's seconds, for scale.
    """
    model, scale = _Model(), SCALE / best_s
    memory: dict[int, float] = {}
    taken: list[dict[int, int]] = []
    hot: dict[tuple[int, int], int] = {}
    for number, layer in enumerate(chain.layers):
        taken.append({})
        for way, curve in enumerate(layer.curves):
            if curve is None:
                continue
            z = taken[-1][way] = model.column(0.0, 1.0, whole=True)
            memory[z] = curve.first_bytes * SCALE / max(capacity, 1)
            h = _curve(model, curve, z, price, scale, exact=exact)
            if h is not None:
                hot[number, way] = h
                memory[h] = curve.unit_bytes * SCALE / max(capacity, 1)
        model.row(dict.fromkeys(taken[-1].values(), 1.0), 1.0, 1.0)
    model.row(memory, high=SCALE * capacity / max(capacity, 1))
    _crossings(model, chain, taken, scale)
    values, bound = model.solve(0.0 if exact else LEAST_GAP)
    if values is None:
        return None, bound / scale, None
    ways = np.array([list(ones)[int(np.argmax(values[list(ones.values())]))] for ones in taken])
    if not exact:
        return ways, bound / scale, None
    counts = [
        chain.curve(number, int(way)).least + (round(values[hot[number, int(way)]]) if (number, int(way)) in hot else 0)
        for number, way in enumerate(ways)
    ]
    total = sum(
        int(chain.curve(number, int(way)).bytes(np.int64(count)))
        for number, (way, count) in enumerate(zip(ways, counts, strict=True))
    )
    return (ways, bound / scale, np.array(counts)) if total <= capacity else (None, bound / scale, None)


def _curve(model: _Model, curve: Curve, z: int, price: float, scale: float, *, exact: bool) -> int | None:
    """Adds the seconds of a way that is taken by z; the column of h, or None for a point."""
    last = len(curve.slopes) if exact else min(len(curve.slopes), int(curve.balance) - curve.least)
    width = float(last) if exact else curve.balance - curve.least
    if last <= 0:
        model.costs[z] += scale * (float(curve.seconds[0]) if exact else min(curve.floor_s, float(curve.seconds[0])))
        return None
    h = model.column(0.0, width, whole=exact)
    t = model.column(1.0)
    model.row({h: 1.0, z: -width}, high=0.0)
    if not exact:
        model.row({t: 1.0, z: -scale * curve.floor_s}, low=0.0)
    for j in range(last) if exact else _tangents(curve, last, price):
        seconds, slope = float(curve.seconds[j]), float(curve.slopes[j])
        model.row({t: 1.0, z: -scale * (seconds - slope * j), h: -scale * slope}, low=0.0)
    return h


def _tangents(curve: Curve, last: int, price: float) -> np.ndarray:
    """Where to touch a curve: evenly, and densely around the best point at this price."""
    near = np.searchsorted(curve.slopes[:last], -price * curve.unit_bytes * np.geomspace(1 / 4, 4, TANGENTS))
    return np.unique(np.clip(np.append(near, np.linspace(0, last - 1, TANGENTS // 2).astype(int)), 0, last - 1))


def _crossings(model: _Model, chain: Chain, taken: list[dict[int, int]], scale: float) -> None:
    before: dict[int, float] = {}
    for ones in taken:
        here = {z: 1.0 for way, z in ones.items() if ON_GPU[way]}
        for cost, sign in ((chain.to_gpu_s, 1.0), (chain.to_cpu_s, -1.0)):
            crossing = model.column(scale * cost)
            terms = dict.fromkeys(here, -sign) | dict.fromkeys(before, sign)
            model.row({crossing: 1.0} | terms, low=0.0)
        before = here
