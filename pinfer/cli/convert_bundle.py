"""pinfer convert --to pinfer: a model and its solved directory as one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pinfer.cli.console import note, size
from pinfer.cli.progress import written
from pinfer.engine.bundle import Bundle, write_bundle
from pinfer.engine.solved import Solved
from pinfer.formats import ModelFile
from pinfer.formats.model_config import model_config
from pinfer.formats.powerinfer import has_factors
from pinfer.quant import BY_NAME

DOWN_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q5_0", "Q4_0")


def bundle(file: ModelFile, path: Path, predictor_path: str | None, down_type: str | None) -> Bundle:
    """Write the bundled file. ValueError for a directory of another model and for a type that rows cannot have."""
    kind = None
    if down_type is not None:
        if down_type.upper() not in DOWN_TYPES:
            raise ValueError(f"--down-type {down_type} is none of {', '.join(DOWN_TYPES)}")
        kind = BY_NAME[down_type.upper()]
    solved = None if predictor_path is None else Solved.open(predictor_path, file)
    with written(file.nbytes) as progress:
        found = write_bundle(file, path, solved, down_type=kind, progress=progress)
    if solved is None and not has_factors(file):
        note("no predictors are in the file: --predictor-path names a directory of pinfer solve")
    return found


def figures(file: ModelFile, found: Bundle) -> dict[str, Any]:
    """What is told of it beside its bytes."""
    return {
        "down_bytes": found.down_bytes,
        "down_relative_rmse": found.down_error,
        "layers": model_config(file).n_layers,
    }


def said(found: Bundle) -> str:
    """One line on the rows of `down`."""
    error = f"at {100 * found.down_error:.3g} % of its weights' RMS" if found.down_error else "without a loss"
    return f"down by neurons: {size(found.down_bytes)}, {error}"
