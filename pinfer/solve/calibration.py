"""The calibration stage: a density for each layer that meets a target, kept in the solved directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pinfer.engine import Engine
from pinfer.engine.fitting import CALIBRATE, STAGE, FitSettings, fit_predictors
from pinfer.engine.prepared import Prepared
from pinfer.engine.solved import CALIBRATION, PREDICTOR, Solved
from pinfer.engine.text import walk_settings
from pinfer.files import write_atomically
from pinfer.predictors import Predictor
from pinfer.predictors.low_rank import RANK_MULTIPLE
from pinfer.quality import Target, calibrate
from pinfer.quality.measurements import Refit
from pinfer.solve.parts import Parts
from pinfer.solve.predictors import PredictorPlan

MEASURED = "calibrate-checkpoint.json"
STAND_IN_RANK, STAND_IN_SEQUENCES = 64, 32


def make_calibration(
    engine: Engine,
    solved: Solved,
    predictors: Sequence[Predictor],
    plan: PredictorPlan,
    parts: Parts,
    target: Target,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Densities for the directory's predictors, and the figures reached; a calibration that is there already stays.

    Predictors are fitted anew on halves of their text, to learn what unseen kinds of text cost (see `calibrate`).

    Measurements are kept as they are made, so that an interrupted run goes on, and another target for the
    same predictors and text measures only what is new. ValueError as `calibrate`, while another process
    writes into the directory, and if one has put other predictors there.
    """
    settings = {
        **{f"{name}_{key}": one for name in ("search", "validation") for key, one in _of(engine, parts, name).items()},
        "target": {name: value for name, value in asdict(target).items() if value is not None},
    }
    with solved.lock():
        _check_predictors(solved, {**plan.settings(engine, parts.fit), "method": plan.method})
        done = solved.stages.get(CALIBRATE)
        if done is not None and done.settings == settings:
            tell(f"{solved.path} is calibrated for this already")
            return done.figures
        ledger = _Measured(solved, {key: one for key, one in settings.items() if key != "target"}, tell)
        prepared = Prepared(engine.file, engine.config, tell)
        with engine.computing():
            found = calibrate(
                engine.model,
                predictors,
                parts.search,
                parts.validation,
                target,
                prepared.downs(),
                _refit(engine, plan, parts),
                known=ledger.known,
                measured=ledger.keep,
            )
        content = {"densities": found.densities, "curves": [asdict(curve) for curve in found.curves]}
        solved.write(
            CALIBRATION,
            (json.dumps(content, indent=1) + "\n").encode(),
            stage=CALIBRATE,
            settings=settings,
            figures=found.figures,
            made_from=(PREDICTOR,),
        )
    return solved.stages[CALIBRATE].figures


def _check_predictors(solved: Solved, settings: dict[str, Any]) -> None:
    """Between the two stages the directory was not locked."""
    stage = solved.stages.get(STAGE)
    if stage is None or stage.settings != settings:
        raise ValueError(f"{solved.path}: another pinfer has replaced its predictors meanwhile: run the command again")


def _refit(engine: Engine, plan: PredictorPlan, parts: Parts) -> Refit:
    """How predictors are fitted anew, and on what; those fitted in closed form stand in for trained ones."""
    how, sequences = plan.fit, parts.fit
    if plan.train is not None:
        rank = min(STAND_IN_RANK, min(engine.config.d_model, engine.config.d_ffn) // RANK_MULTIPLE * RANK_MULTIPLE)
        how = FitSettings("low_rank", rank=rank, sparsity=plan.train.sparsity)
        count = min(len(sequences), STAND_IN_SEQUENCES)
        sequences = [sequences[number * len(sequences) // count] for number in range(count)]
    assert how is not None
    settings = how
    return Refit(lambda some: fit_predictors(engine.model, settings, some), sequences)


def _of(engine: Engine, parts: Parts, name: str) -> dict[str, Any]:
    sequences: list[torch.Tensor] = getattr(parts, name)
    found = walk_settings(sequences, engine.model, engine.int8)
    return {key: one for key, one in found.items() if key != "sequences"}


class _Measured:
    """Measurements by name, in a file beside the directory's own, for these predictors and sequences alone.

    The file has a SHA-256 of itself: what does not match is not believed.
    """

    def __init__(self, solved: Solved, settings: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        self._path: Path = solved.path / MEASURED
        self._key = {**settings, "predictor_sha256": solved.sha256(PREDICTOR)}
        self._tell = tell
        self.known: dict[str, Any] = {}
        try:
            content = json.loads(self._path.read_bytes())
            if content.pop("sha256") != _digest(content):
                tell(f"{self._path} is damaged: everything is measured anew")
            elif content["key"] == self._key:
                self.known = dict(content["measured"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            tell(f"{self._path} is of no use, everything is measured anew: {problem}")

    def keep(self, name: str, found: Any, left_s: float) -> None:
        self.known[name] = found
        content = {"key": self._key, "measured": self.known}
        write_atomically(self._path, json.dumps(content | {"sha256": _digest(content)}).encode())
        self._tell(f"calibrating: {name}; {left_s:.0f} s left at most")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
