"""The place stage: which neurons go on the GPU, from the directory's statistics and calibration, as its plan.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pinfer.engine import Engine
from pinfer.engine.fitting import kept_densities
from pinfer.engine.plans import mean_density, reserves_of, typically_filled
from pinfer.engine.shape import model_shape
from pinfer.engine.solved import ACTIVATIONS, CALIBRATION, PLAN, Solved
from pinfer.placement import Hardware, ModelShape
from pinfer.placement.problem import Problem
from pinfer.placement.skew import measured_rates
from pinfer.placement.solver import check_pinned, solve
from pinfer.placement.statistics import from_tensors
from pinfer.predictors import Predictor
from pinfer.solve.predictors import PredictorPlan

PLACE = "place"


@dataclasses.dataclass(frozen=True)
class PlacePlan:
    """What to place for: the hardware, the GPU memory to stay within, -ngl's layers, and whether it is emulated."""

    hardware: Hardware
    budget_bytes: int
    gpu_layers: int = 0
    emulated: bool = False


def check_layers(engine: Engine, wanted: PlacePlan) -> None:
    """ValueError where the layers asked for do not fit even without predictors: told before those are made."""
    shape = model_shape(engine.file, engine.config, "dense", rearranged=not wanted.emulated)
    none = [np.zeros(layer.n_neurons) for layer in shape.layers]
    try:
        check_pinned(_problem(engine, shape, none, wanted))
    except ValueError as problem:
        raise ValueError(f"{problem}, before any predictors") from problem


def make_plan(
    engine: Engine,
    solved: Solved,
    predictors: Sequence[Predictor],
    method: PredictorPlan,
    wanted: PlacePlan,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The directory's plan for its predictors at their calibrated density, and its figures; one that is there stays.

    It is dropped when the statistics or the calibration are made anew. ValueError where the layers asked for do not
    fit, and while another process writes into the directory.
    """
    settings = dataclasses.asdict(wanted) | {"context": engine.model.context}
    with solved.lock():
        done = solved.stages.get(PLACE)
        if done is not None and done.settings == settings:
            tell(f"{solved.path} is placed for this already")
            return done.figures
        statistics = from_tensors(solved.read_tensors(ACTIVATIONS), engine.config.n_layers)
        rates = measured_rates(statistics, density=mean_density(kept_densities(solved)))
        shape = model_shape(engine.file, engine.config, method.method, predictors, rearranged=not wanted.emulated)
        found = solve(_problem(engine, shape, rates, wanted))
        figures = {
            "gpu_bytes": found.memory.gpu_bytes,
            "gpu_items": dict(found.memory.gpu),
            "tokens_per_s": found.tokens_per_s,
            "gap": found.gap,
            "solve_seconds": round(found.solve_seconds, 3),
            "hot_share": sum(layer.n_hot for layer in found.plan.layers)
            / sum(layer.hot.numel() for layer in found.plan.layers),
        }
        plan = dataclasses.replace(found.plan, budget_bytes=wanted.budget_bytes, figures=figures)
        content = (json.dumps(plan.to_plain(), indent=1) + "\n").encode()
        solved.write(
            PLAN, content, stage=PLACE, settings=settings, figures=figures, made_from=(ACTIVATIONS, CALIBRATION)
        )
    return solved.stages[PLACE].figures


def _problem(engine: Engine, shape: ModelShape, rates: Sequence[np.ndarray], wanted: PlacePlan) -> Problem:
    """What the solver is asked. rates: float64 [N] a layer, how often neurons are named."""
    return Problem(
        shape,
        rates,
        wanted.hardware,
        engine.model.context,
        wanted.budget_bytes,
        filled=typically_filled(engine.model.context),
        gpu_layers=wanted.gpu_layers,
        reserves=reserves_of(emulated=wanted.emulated),
    )
