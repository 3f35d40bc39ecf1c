"""From a RunConfig to a model ready to run: open the file, build it dense, make it sparse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pinfer.config import Method, ModelConfig, RunConfig
from pinfer.engine.cores import cold_places, default_threads, place_threads, read_topology
from pinfer.engine.devices import NO_CUDA, Device, device_for
from pinfer.engine.embedded import embedded_solved
from pinfer.engine.fitting import (
    STAGE,
    FitSettings,
    check_activation,
    fit_predictors,
    fit_settings_key,
    gates_of,
    kept_densities,
    kept_method,
    kept_predictors,
    mlp_predictors,
    predictors_for,
    sequences_to_fit_on,
)
from pinfer.engine.hardware import read_machine
from pinfer.engine.place import place_model, runnable
from pinfer.engine.plans import GB, Placement, Placer, mean_density, read_plan
from pinfer.engine.prepared import Prepared
from pinfer.engine.rates import kept_rates, prefill_costs
from pinfer.engine.shape import READS_ALL, model_shape
from pinfer.engine.solved import Solved
from pinfer.engine.step_down import Find, MemoryRanOut, within_memory
from pinfer.engine.text import ASSETS, Text
from pinfer.formats import ModelFile, open_model
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.powerinfer import has_factors
from pinfer.formats.tokenizer import Tokenizer, load_tokenizer
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.planes import repack
from pinfer.kernels.registry import backend_on, check_backend, use_backend, use_int8
from pinfer.models import Transformer, build_model, replace_weights
from pinfer.neuron_major_ffn import turn_down, turned_error
from pinfer.overlap import Lane, Place
from pinfer.placement import Plan
from pinfer.placement.memory import check_plan
from pinfer.predictors import InputThreshold, Predictor
from pinfer.sparsify import (
    THRESHOLDED,
    PredictorMaker,
    down_error,
    exact_predictors,
    fit_input_thresholds,
    fitted_predictors,
    input_error,
    predictor_qualities,
    resolve_method,
    sparsify,
    sparsify_inputs,
)

SHIPPED_MODEL = ASSETS / "pinfer-tiny-q8_0.gguf"

DEFAULT_CONTEXT = 4096
# A second thread costs a small model more than it brings: the shipped one (7.5 MB) decodes at 2,850
# tokens/s on one thread and 2,600 on two, and at 300 to 430 on two where another program runs.
ONE_THREAD_BELOW_BYTES = 32e6
MAX_TOKEN_BYTES = 256  # no token of a known vocabulary is longer


@dataclass(frozen=True)
class Engine:
    """A loaded model with its tokenizer.

    `placement` says what is on a GPU, None where nothing is. `notes` are remarks for the user, one line each;
    `progress` is told of steps that take seconds.
    """

    run: RunConfig
    file: ModelFile
    config: ModelConfig
    tokenizer: Tokenizer
    model: Transformer
    method: Method
    placement: Placement | None = None
    notes: tuple[str, ...] = ()
    progress: Callable[[str], None] = lambda _: None

    def check_length(self, text: str) -> None:
        """ValueError for a text that cannot fit the context however it is tokenised, before any work on it."""
        n_bytes = len(text.encode("utf-8", "surrogatepass"))
        if n_bytes <= MAX_TOKEN_BYTES * self.model.context:
            return
        raise ValueError(
            f"the prompt has {n_bytes} bytes, too many for the context of {self.model.context} tokens: "
            f"shorten it or raise --ctx-size (the model's limit is {self.config.context_length})"
        )

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inference on this engine's backend and precision; every forward pass belongs inside."""
        with torch.inference_mode(), use_backend(self.run.backend), use_int8(self.int8):
            yield

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def vram_bytes(self) -> int:
        """The most that has been taken of a GPU's memory so far; 0 without one."""
        return 0 if self.placement is None else self.placement.device.peak_bytes

    @property
    def int8(self) -> bool:
        """Whether activations are rounded to int8 where they meet quantised weights."""
        if self.run.precision == "auto":
            return self.run.backend in ("auto", "cpu") and core_problem() is None
        return self.run.precision == "int8"


def load_engine(run: RunConfig, progress: Callable[[str], None] = lambda _: None) -> Engine:
    """Open `run.model` and apply `run.method`, telling `progress` of steps that take seconds.

    Raises FileNotFoundError or IsADirectoryError for the path, FormatError for the file's content,
    ValueError for settings that the model cannot take and for placements that do not fit their budget,
    RuntimeError where GPU memory runs out for all that.
    """
    path = SHIPPED_MODEL if run.model is None else Path(run.model)
    file = open_model(path)
    threads = run.threads or (1 if file.nbytes < ONE_THREAD_BELOW_BYTES else default_threads())
    threads, remarks = place_threads(run.numa, threads)
    config = model_config(file)
    check_tensors(file, config)
    if run.activation is not None:
        config = dataclasses.replace(config, activation=run.activation)
    method, solved = what_to_run(run, config, file)
    if config.experts is not None:
        _check_experts(run, config)
    if method in ("dense", "input_threshold") and run.cold_fraction:
        raise ValueError(f"cold_fraction {run.cold_fraction:g} has no meaning for the {method} method")
    tokenizer = load_tokenizer(file.metadata)
    if tokenizer.vocab_size > config.vocab_size:
        raise file.error(f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size} rows")
    check_backend(run.backend, torch.device("cpu"))
    prepared = Prepared(file, config, progress)
    said: list[str] = []

    def make(find: Find) -> Engine:
        torch.set_num_threads(threads)  # of which a lane may leave the rest of the model fewer
        model = build_model(file, config, _context(run.context, config))
        engine = Engine(run, file, config, tokenizer, model, method, progress=progress)
        with engine.computing():
            return _made(engine, prepared, solved, find)

    engine = within_memory(make, said.append)
    said += [str(engine.placement)] if engine.placement else _without_gpu(run)
    return dataclasses.replace(engine, notes=(*remarks, *prepared.notes, *said, *_notes(engine, solved)))


def _made(engine: Engine, prepared: Prepared, solved: Solved | None, find: Find) -> Engine:
    """The engine with its model sparse, and placed where `find` says. MemoryRanOut as said there."""
    run, model = engine.run, engine.model
    on_cpu = run.backend == "cpu" or engine.config.experts is not None
    wanted = "cpu" if run.device == "auto" and on_cpu else run.device
    device = device_for(wanted, None if run.gpu_memory_gb is None else round(GB * run.gpu_memory_gb))
    if engine.method == "dense":
        turn_down(model)
    predictors = _predictors(engine, prepared, solved)
    if device is None:
        if run.plan is not None:  # it may be meant for another model, and would be refused where there is a GPU
            shape = model_shape(engine.file, engine.config, engine.method, predictors.fitted)
            check_plan(shape, runnable(read_plan(run.plan, shape)))
        plan = Plan.uniform(engine.config.n_layers, engine.config.d_ffn, run.cold_fraction)
        _make_sparse(engine, prepared, predictors, plan if run.cold_fraction else None)
        _lay_out(model)
        return engine
    shape = model_shape(engine.file, engine.config, engine.method, predictors.fitted, rearranged=device.rearranged)
    placer = Placer(run, engine.method, shape, model.context, device, solved, mean_density(predictors.densities))
    found = find(placer)
    try:
        lane = _lane(run, device) if any(layer.is_split for layer in found.plan.layers) else None
        _make_sparse(engine, prepared, predictors, found.plan, lane)
        place_model(model, found.plan, device, prepared.release)
        device.probe(model)
    except torch.OutOfMemoryError as problem:
        raise MemoryRanOut(problem, placer, found) from problem
    return dataclasses.replace(engine, placement=found)


def _lane(run: RunConfig, device: Device) -> Lane | None:
    """What computes cold neurons beside a device; prompts choose by what `pinfer doctor --measure` has kept.

    The thread that drives the device is not the workers'; an emulated one computes with half of the threads.
    """
    threads = torch.get_num_threads()
    of_device = threads // 2 if device.name == "emulated" else 1
    if device.name == "emulated":
        torch.set_num_threads(max(1, of_device))
    places = _cold_places(run, max(1, threads - of_device))
    return device.lane(places, prefill_costs(kept_rates(read_machine())))


def _cold_places(run: RunConfig, threads: int) -> int | list[Place]:
    """Where cold neurons are computed: on a worker for each node under `distribute`, else on one of all threads."""
    topology = read_topology()
    if run.numa != "distribute" or topology is None or len(topology.nodes) == 1:
        return threads
    return cold_places(min(threads, len(topology.cores) - 1), topology)


def _without_gpu(run: RunConfig) -> list[str]:
    """What was asked for of a GPU that is not there."""
    asked = {"--gpu-layers": run.gpu_layers, "--gpu-memory-gb": run.gpu_memory_gb, "--plan": run.plan}
    given = [
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in asked.items()
        if value is not None
    ]
    if not given:
        return []
    why = NO_CUDA if run.device == "auto" else f"device is {run.device}"
    if run.device == "auto" and run.backend == "cpu":
        why = "backend is cpu"
    return [
        f"{', '.join(given)}: {why}, so everything is computed on the CPU; "
        "--device emulated runs the same placement on it, as if there were a GPU"
    ]


def _check_experts(run: RunConfig, config: ModelConfig) -> None:
    """ValueError for what a mixture of experts cannot do yet: the parts of a layer on several devices or shards."""
    asked = {
        f"device {run.device}": run.device not in ("auto", "cpu"),
        f"cold_fraction {run.cold_fraction:g}": bool(run.cold_fraction),
        "a plan": run.plan is not None,
        "gpu_layers": bool(run.gpu_layers),
        "a solved directory": run.predictor_path is not None,
    }
    for what, is_asked in asked.items():
        if is_asked:
            config.without_experts(what)


def what_to_run(run: RunConfig, config: ModelConfig, file: ModelFile) -> tuple[Method, Solved | None]:
    """The run's method for this model, and the solved directory that is named, or that the file carries, if there is one.

    Its predictors are used where they are for that method (`predictors_for`). ValueError for a method or a directory
    that does not fit the model or the run's other settings.
    """
    carried = embedded_solved(file) if run.predictor_path is None else None
    solved = carried if run.predictor_path is None else Solved.open(run.predictor_path, file)
    if solved is None or (carried is not None and run.method != "auto" and predictors_for(run.method, carried) is None):
        return _own_method(run, config, file), solved
    if carried is not None and STAGE not in carried.stages:
        return _own_method(run, config, file), carried
    method = kept_method(solved, run.method)
    check_activation(solved, config)
    if run.sparsity is not None and method not in THRESHOLDED:
        raise ValueError(f"sparsity {run.sparsity:g} has no meaning for {method} predictors that are fitted already")
    return method, solved


def _own_method(run: RunConfig, config: ModelConfig, file: ModelFile) -> Method:
    """The method of a run without a directory: a file with predictors of its own is run by them, unless told otherwise."""
    if run.method not in ("auto", "mlp") or (run.method == "auto" and run.sparsity is not None):
        return resolve_method(run.method, config, run.sparsity)
    if has_factors(file):
        if run.sparsity is not None:
            raise ValueError(f"sparsity {run.sparsity:g} has no meaning for method mlp, whose threshold is the file's")
        return "mlp"
    if run.method == "mlp":
        raise ValueError(
            f"{file.path}: method mlp needs a file with predictors (blk.N.fc1, blk.N.fc2), as PowerInfer's"
        )
    return resolve_method(run.method, config, run.sparsity)


def _context(asked: int | None, config: ModelConfig) -> int:
    if asked is None:
        return min(DEFAULT_CONTEXT, config.context_length)
    return asked or config.context_length


def _notes(engine: Engine, solved: Solved | None) -> Iterator[str]:
    if engine.config.experts is not None and engine.run.device == "auto" and torch.cuda.is_available():
        yield "a mixture of experts is computed on the CPU"
    if engine.run.backend == "auto" and (problem := core_problem()):
        yield f"the slower torch reference computes: {problem}"
    if error := turned_error(engine.model):
        yield f"down was requantised to Q8_0 for the dense path, at {100 * error:.2g} % of its weights' RMS"
    if error := down_error(engine.model):
        yield f"down was requantised to Q8_0 for the sparse path, at {100 * error:.2g} % of its weights' RMS"
    if error := input_error(engine.model):
        yield f"gate and up are requantised to Q8_0 at each start, at {100 * error:.2g} % of their weights' RMS"
    if qualities := predictor_qualities(engine.model):
        recalls, densities, active = (
            [getattr(layer, name) for layer in qualities] for name in ("recall", "density", "active")
        )
        kept = None if solved is None else predictors_for(engine.method, solved)
        recall = engine.run.recall if kept is None else kept.stages[STAGE].settings.get("recall")
        asked = "" if recall is None else f"asked {100 * recall:g} %, "  # trained ones are not asked for any
        yield (
            f"{engine.method} catches {100 * sum(recalls) / len(recalls):.1f} % of active neurons "
            f"({asked}worst layer {100 * min(recalls):.1f} %) and names "
            f"{sum(densities) / max(sum(active), 1e-9):.1f} for each, on calibration text that it was not fitted on"
        )


def _lay_out(model: Transformer) -> None:
    """Repack the weights where Triton computes, whose launchers would do so at every call; the C++ core reads blocks.

    Also before calibration, which runs the dense model; what is laid out already stays as it is.
    """
    if backend_on(model.embedding.device) == "triton":
        replace_weights(model, repack)


@dataclass(frozen=True)
class _Predictors:
    """How a model's layers get their predictors; the fitted ones, and the densities they are set to, where there are."""

    make: PredictorMaker | None
    fitted: Sequence[Predictor] | None = None
    densities: Sequence[float] | None = None


def _make_sparse(
    engine: Engine, prepared: Prepared, predictors: _Predictors, plan: Plan | None, lane: Lane | None = None
) -> None:
    if engine.method == "input_threshold":
        sparsify_inputs(engine.model, _input_thresholds(engine), prepared.input_major())
    elif predictors.make is not None:
        sparsify(engine.model, predictors.make, plan, prepared.downs(), lane=lane, release=prepared.release)


def _predictors(engine: Engine, prepared: Prepared, solved: Solved | None) -> _Predictors:
    """Of the dense model, which they may be fitted on."""
    if engine.method in READS_ALL:
        return _Predictors(None)
    if engine.method == "exact":
        return _Predictors(exact_predictors)
    densities = None
    kept = None if solved is None else predictors_for(engine.method, solved)
    if engine.method == "mlp":
        fitted: Sequence[Predictor] = mlp_predictors(engine.file, engine.config)
    elif kept is None:
        fitted = _fitted(engine, prepared)
    else:
        fitted, densities = kept_predictors(kept, engine.model), kept_densities(kept)
    if engine.run.sparsity is not None and engine.method in THRESHOLDED:
        densities = [1 - engine.run.sparsity] * len(fitted)
    if densities is not None:
        fitted = [one.at_density(density) for one, density in zip(fitted, densities, strict=True)]
    elif engine.method in THRESHOLDED:
        assert kept is not None  # `resolve_method` asks for a sparsity
        raise ValueError(f"{kept.path}: its predictors were never calibrated: give a sparsity, or run pinfer solve")
    return _Predictors(fitted_predictors(fitted), fitted, densities)


def _input_thresholds(engine: Engine) -> list[InputThreshold]:
    assert engine.run.sparsity is not None
    text, context = Text.read(None), engine.config.context_length
    sequences = sequences_to_fit_on(engine.method, engine.tokenizer, text, context)
    engine.progress("calibrating thresholds on the shipped text")
    _lay_out(engine.model)
    return fit_input_thresholds(engine.model, sequences, engine.run.sparsity, engine.progress)


def _fitted(engine: Engine, prepared: Prepared) -> Sequence[Predictor]:
    """Fitted on the shipped text, or read from where an earlier run kept them beside the model."""
    how = FitSettings.of(engine.run, engine.method)
    how.check(engine.config)
    sequences = sequences_to_fit_on(engine.method, engine.tokenizer, Text.read(None), engine.config.context_length)

    def fit() -> Sequence[Predictor]:
        engine.progress("fitting predictors on the shipped text")
        _lay_out(engine.model)
        return fit_predictors(engine.model, how, sequences, prepared.progress)

    key = fit_settings_key(how, engine.model, sequences, engine.int8)
    return prepared.predictors(engine.method, key, fit, gates_of(engine.model))
