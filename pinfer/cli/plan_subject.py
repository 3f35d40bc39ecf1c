"""What a plan is for: a published model by name, or a file, with how often its neurons are named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors

from pinfer.config import Method, ModelConfig, RunConfig
from pinfer.engine import SHIPPED_MODEL
from pinfer.engine.embedded import embedded_solved
from pinfer.engine.fitting import STAGE as PREDICTORS
from pinfer.engine.fitting import kept_densities, kept_predictors, mlp_predictors, predictors_for
from pinfer.engine.load import what_to_run
from pinfer.engine.shape import READS_ALL, READS_GATE, model_shape
from pinfer.engine.solved import ACTIVATIONS, Solved
from pinfer.formats import open_model
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.powerinfer import has_factors
from pinfer.kernels.activation import ZERO_BELOW_ZERO
from pinfer.models import build_model
from pinfer.placement import ModelShape
from pinfer.placement.published import PUBLISHED, Down, predictor_shape, published_shape
from pinfer.placement.skew import measured_rates, published_rates
from pinfer.placement.statistics import LayerStatistics, from_tensors
from pinfer.predictors import Predictor
from pinfer.sparsify import THRESHOLDED, resolve_method

DEFAULT_TYPE, DEFAULT_SKEW, DEFAULT_DENSITY, DEFAULT_RANK = "q4_k_m", "relu-llama-70b", 0.1, 256
MOST_PREDICTOR_GB, RANKS = 1e6, range(32, 8192 + 1, 32)
SHIPPED_PREDICTORS = SHIPPED_MODEL.with_name("pinfer-tiny.pinfer")


@dataclass(frozen=True)
class SubjectOptions:
    """What was asked for; None is a default, or what the model's own directory says."""

    model: str | None = None
    predictor_path: str | None = None
    shape: str | None = None
    type: str | None = None
    down: Down | None = None
    skew: str | None = None
    density: float | None = None
    from_run: str | None = None
    method: Method = "auto"
    predictor_gb: float | None = None
    predictor_rank: int | None = None
    over_prediction: float | None = None

    def __post_init__(self) -> None:
        """ValueError for a number out of range, and for options that do not go together."""
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"--density must lie in (0, 1], not {self.density:g}")
        if self.over_prediction is not None and not (math.isfinite(self.over_prediction) and self.over_prediction >= 1):
            raise ValueError(f"--over-prediction must be at least 1, not {self.over_prediction:g}")
        if self.predictor_gb is not None and not 0 <= self.predictor_gb <= MOST_PREDICTOR_GB:
            raise ValueError(f"--predictor-gb must lie in [0, {MOST_PREDICTOR_GB:g}], not {self.predictor_gb:g}")
        if self.predictor_rank is not None and (self.predictor_rank not in RANKS):
            raise ValueError(
                f"--predictor-rank must be a multiple of {RANKS.step} in [{RANKS.start}, {RANKS[-1]}], "
                f"not {self.predictor_rank}"
            )
        self._check_together()

    def _check_together(self) -> None:
        if self.predictor_gb is not None and self.predictor_rank is not None:
            raise ValueError(
                f"give --predictor-gb {self.predictor_gb:g} or --predictor-rank {self.predictor_rank}, not both"
            )
        if self.from_run is not None and self.skew is not None:
            raise ValueError(f"give --from-run {self.from_run} or --skew {self.skew}, not both")
        of_shapes, of_files = ("type", "down", "predictor_gb", "predictor_rank"), ("model", "predictor_path")
        for name in of_shapes if self.shape is None else of_files:
            if (value := getattr(self, name)) is not None:
                where = "without --shape" if self.shape is None else f"with --shape {self.shape}"
                raise ValueError(f"--{name.replace('_', '-')} {value} has no meaning {where}")


@dataclass(frozen=True)
class Subject:
    """A model to place. shape: with its predictors; dense: the same without, in the file's types; rates: float64 [N] a
    layer, the share of tokens on which a neuron is named; said: where the rates come from; context: the model's limit.
    unturned: the shape if down kept the file's type as rows, where it does not."""

    shape: ModelShape
    dense: ModelShape
    rates: Sequence[np.ndarray]
    said: str
    context: int
    unturned: ModelShape | None = None


def find_subject(options: SubjectOptions, over_prediction: float) -> Subject:
    """The model and its rates. over_prediction: of trained predictors, where nothing says theirs.

    ValueError for what is not known, does not fit or is missing; FileNotFoundError.
    """
    return _published(options, over_prediction) if options.shape is not None else _of_file(options, over_prediction)


def _published(options: SubjectOptions, default_over: float) -> Subject:
    name, kind = (options.shape or "").lower(), (options.type or DEFAULT_TYPE).lower()
    if name not in PUBLISHED:
        raise ValueError(f"--shape {options.shape} is none of {', '.join(PUBLISHED)}")
    if options.predictor_gb is not None:
        predictor = predictor_shape("bytes", name, total_bytes=int(1e9 * options.predictor_gb))
        method: str = "bytes"
    else:
        method = "low_rank" if options.method == "auto" else options.method
        if method in READS_ALL:
            raise ValueError(f"method {method} names no neurons to place")
        predictor = predictor_shape(method, name, rank=options.predictor_rank or DEFAULT_RANK)
    shape = published_shape(name, kind, predictor, down=options.down or "rows")
    over = options.over_prediction or (1.0 if method in READS_GATE else default_over)
    rates, said = _rates(options, over, shape, None)
    unturned = None if options.down == "file" else published_shape(name, kind, predictor, down="file")
    dense, limit = published_shape(name, kind, down="file"), PUBLISHED[name].context
    return Subject(shape, dense, rates, said, limit, unturned if unturned != shape else None)


def _of_file(options: SubjectOptions, default_over: float) -> Subject:
    path = Path(options.model) if options.model else SHIPPED_MODEL
    named = options.predictor_path or (None if options.model else str(SHIPPED_PREDICTORS))
    file = open_model(path)
    config = model_config(file)
    check_tensors(file, config)
    config.without_experts("a plan")
    solved = embedded_solved(file) if named is None else Solved.open(named, file)
    densities = None
    predictors: Sequence[Predictor] | None = None
    if solved is not None and PREDICTORS in solved.stages:
        method, _ = what_to_run(RunConfig(model=str(path), predictor_path=named, method=options.method), config, file)
        if (kept := predictors_for(method, solved)) is not None:
            predictors, densities = kept_predictors(kept, build_model(file, config, 1)), kept_densities(kept)
    elif has_factors(file) and options.method in ("auto", "mlp"):
        method, predictors = "mlp", mlp_predictors(file, config)
    else:
        method = _method(options, config)
    shape = model_shape(file, config, method, predictors)
    over = options.over_prediction or (1.0 if method in READS_GATE or densities else default_over)
    if densities is not None and options.density is None:
        options = dataclasses.replace(options, density=sum(densities) / len(densities))
    rates, said = _rates(options, over, shape, solved)
    return Subject(shape, model_shape(file, config, "dense"), rates, said, config.context_length)


def _method(options: SubjectOptions, config: ModelConfig) -> Method:
    """The method of a run without fitted predictors, the density being its sparsity; ValueError where it names none."""
    fires = config.activation in ZERO_BELOW_ZERO
    takes_sparsity = not fires if options.method == "auto" else options.method in THRESHOLDED
    sparsity = None if options.density is None or not takes_sparsity else 1 - options.density
    method = resolve_method(options.method, config, sparsity)
    if method in READS_ALL:
        raise ValueError(f"method {method} names no neurons to place: give --density, --method or --predictor-path")
    return method


def _rates(
    options: SubjectOptions, over: float, shape: ModelShape, solved: Solved | None
) -> tuple[Sequence[np.ndarray], str]:
    """Rates, and where they come from: a run, a named skew, a solved directory, else the published skew of a shape."""
    n_layers, n_neurons = len(shape.layers), shape.layers[0].n_neurons
    if options.from_run is not None:
        found = measured_rates(read_statistics(options.from_run), density=options.density, over_prediction=over)
        return found, f"gathered in {options.from_run}{_scaled(options, over)}"
    if options.skew is None and solved is not None and solved.has(ACTIVATIONS):
        statistics = from_tensors(solved.read_tensors(ACTIVATIONS), n_layers)
        found = measured_rates(statistics, density=options.density, over_prediction=over)
        return found, f"profiled in {solved.path}{_scaled(options, over)}"
    if options.skew is None and options.shape is None:
        raise ValueError(
            "how often neurons fire is not known: name --predictor-path (of pinfer solve or profile), --from-run or --skew"
        )
    density = DEFAULT_DENSITY if options.density is None else options.density
    skew = _skew(options.skew or DEFAULT_SKEW)
    found = published_rates(skew, min(1.0, density * over), n_layers, n_neurons)
    return found, f"of skew {skew}, density {100 * density:g} % × over-prediction {over:g}"


def _scaled(options: SubjectOptions, over: float) -> str:
    scaled = "" if options.density is None else f", scaled to a density of {100 * options.density:.3g} %"
    return scaled + ("" if over == 1 else f" × over-prediction {over:g}")


def _skew(name: str) -> str | float:
    """A name, or the share of neurons that hold 80 % of activations."""
    try:
        return float(name)
    except ValueError:
        return name


def read_statistics(path: str) -> tuple[LayerStatistics, ...]:
    """Statistics of a safetensors file, or of a solved directory; ValueError for a file that holds none."""
    if Path(path).is_dir():
        tensors = Solved.open(path).read_tensors(ACTIVATIONS)
    else:
        try:
            tensors = load_safetensors(Path(path).read_bytes())
        except SafetensorError as problem:
            raise ValueError(f"{path}: not safetensors: {problem}") from problem
    n_layers = sum(name.endswith(".fired") for name in tensors)
    if not n_layers:
        raise ValueError(f"{path}: no activation statistics in it")
    try:
        return from_tensors(tensors, n_layers)
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from problem
