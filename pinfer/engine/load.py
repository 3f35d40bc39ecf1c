"""From a RunConfig to a model ready to run: open the file, build it dense, make it sparse."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pinfer.config import Method, ModelConfig, RunConfig
from pinfer.engine.cores import default_threads, place_threads
from pinfer.engine.prepared import Prepared
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.tokenizer import Tokenizer, load_tokenizer
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.planes import repack
from pinfer.kernels.registry import backend_on, check_backend, use_backend, use_int8
from pinfer.models import Transformer, build_model, replace_weights
from pinfer.placement import Plan
from pinfer.predictors import InputThreshold, LowRank, LowRankSettings, SignBits, WeightedThreshold
from pinfer.sparsify import (
    PredictorMaker,
    calibrate_gate_thresholds,
    down_error,
    exact_predictors,
    fit_input_thresholds,
    fit_low_rank_predictors,
    fit_sign_predictors,
    fit_weighted_predictors,
    fitted_predictors,
    gate_threshold_predictors,
    input_error,
    predictor_qualities,
    resolve_method,
    sparsify,
    sparsify_inputs,
)

ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED_MODEL = ASSETS / "pinfer-tiny-q8_0.gguf"
CALIBRATION_TEXT = ASSETS / "calibration.txt"
EVALUATION_TEXT = ASSETS / "evaluation.txt"  # neither trained nor calibrated on

DEFAULT_CONTEXT = 4096
# A second thread costs a small model more than it brings: the shipped one (7.5 MB) decodes at 2,850
# tokens/s on one thread and 2,600 on two, and at 300 to 430 on two where another program runs.
ONE_THREAD_BELOW_BYTES = 32e6
MAX_TOKEN_BYTES = 256  # no token of a known vocabulary is longer
CALIBRATION_TOKENS = 1024
CALIBRATION_EXCERPTS = 4  # spread over the text, which changes its subject as it goes
# Fitting wants more tokens than some contexts hold, so it gets sequences. Twice as many take a tenth
# off the neurons that low_rank names beside the active ones, and twice the time.
FIT_SEQUENCES, FIT_TOKENS = 8, 256
WEIGHTED_SEQUENCES = 16


@dataclass(frozen=True)
class Engine:
    """A loaded model with its tokenizer.

    `notes` are remarks for the user, one line each; `progress` is told of steps that take seconds.
    """

    run: RunConfig
    gguf: GGUFFile
    config: ModelConfig
    tokenizer: Tokenizer
    model: Transformer
    method: Method
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
        return self.gguf.path

    @property
    def int8(self) -> bool:
        """Whether activations are rounded to int8 where they meet quantised weights."""
        if self.run.precision == "auto":
            return self.run.backend in ("auto", "cpu") and core_problem() is None
        return self.run.precision == "int8"


def load_engine(run: RunConfig, progress: Callable[[str], None] = lambda _: None) -> Engine:
    """Open `run.model` and apply `run.method`, telling `progress` of steps that take seconds.

    Raises FileNotFoundError or IsADirectoryError for the path, FormatError for the file's content,
    ValueError for settings that the model cannot take.
    """
    path = SHIPPED_MODEL if run.model is None else Path(run.model)
    gguf = GGUFFile.open(path)
    threads = run.threads or (1 if gguf.nbytes < ONE_THREAD_BELOW_BYTES else default_threads())
    threads, remarks = place_threads(run.numa, threads)
    torch.set_num_threads(threads)
    config = model_config(gguf)
    check_tensors(gguf, config)
    if run.activation is not None:
        config = dataclasses.replace(config, activation=run.activation)
    method = resolve_method(run.method, config.activation, run.sparsity)
    if method in ("dense", "input_threshold") and run.cold_fraction:
        raise ValueError(f"cold_fraction {run.cold_fraction:g} has no meaning for the {method} method")
    tokenizer = load_tokenizer(gguf.metadata)
    if tokenizer.vocab_size > config.vocab_size:
        raise gguf.error(f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {config.vocab_size} rows")
    model = build_model(gguf, config, _context(run.context, config))
    engine = Engine(run, gguf, config, tokenizer, model, method, progress=progress)
    check_backend(run.backend, model.embedding.device)
    prepared = Prepared(gguf, config, progress)
    with engine.computing():
        _make_sparse(engine, prepared)
        _lay_out(model)
    return dataclasses.replace(engine, notes=(*remarks, *prepared.notes, *_notes(engine)))


def _context(asked: int | None, config: ModelConfig) -> int:
    if asked is None:
        return min(DEFAULT_CONTEXT, config.context_length)
    return asked or config.context_length


def _notes(engine: Engine) -> Iterator[str]:
    if engine.run.backend == "auto" and (problem := core_problem()):
        yield f"the slower torch reference computes: {problem}"
    if error := down_error(engine.model):
        yield f"down was requantised to Q8_0 for the sparse path, at {100 * error:.2g} % of its weights' RMS"
    if error := input_error(engine.model):
        yield f"gate and up are requantised to Q8_0 at each start, at {100 * error:.2g} % of their weights' RMS"
    if qualities := predictor_qualities(engine.model):
        recalls, densities, active = (
            [getattr(layer, name) for layer in qualities] for name in ("recall", "density", "active")
        )
        yield (
            f"{engine.method} catches {100 * sum(recalls) / len(recalls):.1f} % of active neurons "
            f"(asked {100 * engine.run.recall:g} %, worst layer {100 * min(recalls):.1f} %) and names "
            f"{sum(densities) / max(sum(active), 1e-9):.1f} for each, on calibration text that it was not fitted on"
        )


def _lay_out(model: Transformer) -> None:
    """Repack the weights where Triton computes, whose launchers would do so at every call; the C++ core reads blocks.

    Also before calibration, which runs the dense model; what is laid out already stays as it is.
    """
    if backend_on(model.embedding.device) == "triton":
        replace_weights(model, repack)


def _make_sparse(engine: Engine, prepared: Prepared) -> None:
    if engine.method == "dense":
        return
    if engine.method == "input_threshold":
        sparsify_inputs(engine.model, _input_thresholds(engine), prepared.input_major())
        return
    config, run = engine.config, engine.run
    plan = Plan.uniform(config.n_layers, config.d_ffn, run.cold_fraction) if run.cold_fraction else None
    sparsify(engine.model, _predictors(engine, prepared), plan, prepared.downs())


def _predictors(engine: Engine, prepared: Prepared) -> PredictorMaker:
    if engine.method == "exact":
        return exact_predictors
    if engine.method == "low_rank":
        return fitted_predictors(_low_rank(engine, prepared))
    if engine.method == "sign_bits":
        return fitted_predictors(_sign_bits(engine))
    assert engine.run.sparsity is not None
    engine.progress("calibrating thresholds on the shipped text")
    if engine.method != "gate_threshold":
        return fitted_predictors(_weighted(engine))
    _lay_out(engine.model)
    text = CALIBRATION_TEXT.read_text(encoding="utf-8")
    tokens = calibration_tokens(engine.tokenizer, text, min(CALIBRATION_TOKENS, engine.config.context_length))
    return gate_threshold_predictors(calibrate_gate_thresholds(engine.model, tokens, engine.run.sparsity))


def _sign_bits(engine: Engine) -> list[SignBits]:
    return fit_sign_predictors(engine.model, _to_fit_on(engine), engine.run.recall, engine.progress)


def _to_fit_on(engine: Engine, count: int = FIT_SEQUENCES) -> list[torch.Tensor]:
    """Sequences of the shipped text, for the dense model, whose weights are laid out for it."""
    _lay_out(engine.model)
    text = CALIBRATION_TEXT.read_text(encoding="utf-8")
    return calibration_sequences(engine.tokenizer, text, min(FIT_TOKENS, engine.config.context_length), count)


def _weighted(engine: Engine) -> list[WeightedThreshold]:
    sequences = _to_fit_on(engine, WEIGHTED_SEQUENCES)
    assert engine.run.sparsity is not None
    shifted = engine.method == "shift_threshold"
    return fit_weighted_predictors(
        engine.model, sequences, engine.run.sparsity, shifted=shifted, progress=engine.progress
    )


def _input_thresholds(engine: Engine) -> list[InputThreshold]:
    assert engine.run.sparsity is not None
    engine.progress("calibrating thresholds on the shipped text")
    return fit_input_thresholds(
        engine.model, _to_fit_on(engine, WEIGHTED_SEQUENCES), engine.run.sparsity, engine.progress
    )


def _low_rank(engine: Engine, prepared: Prepared) -> list[LowRank]:
    """Fitted on the shipped text, or read from where an earlier run kept them."""
    run, config = engine.run, engine.config
    settings = LowRankSettings(run.predictor_rank, run.recall, run.sparsity)
    settings.check(config.activation, config.d_ffn, config.d_model)
    text = CALIBRATION_TEXT.read_text(encoding="utf-8")

    def fit() -> list[LowRank]:
        engine.progress("fitting predictors on the shipped text")
        return fit_low_rank_predictors(engine.model, _to_fit_on(engine), settings, prepared.progress)

    key = dataclasses.asdict(settings) | {
        "activation": config.activation,
        "int8": engine.int8,
        "text": hashlib.sha256(text.encode()).hexdigest()[:16],
        "sequences": [FIT_SEQUENCES, FIT_TOKENS],
    }
    return prepared.low_rank(key, fit)


def calibration_sequences(
    tokenizer: Tokenizer, text: str, length: int, count: int = FIT_SEQUENCES
) -> list[torch.Tensor]:
    """`count` excerpts from all over the text, int64 [<= length] each, opened by BOS where the model uses one."""
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text, add_bos=False)
    step = min(length - len(start), len(ids) // count)
    if step < 2:
        raise ValueError(
            f"calibration needs sequences of at least 2 tokens beside the opening one: "
            f"the context is {length}, the text has {len(ids)} for {count} of them"
        )
    stride = len(ids) // count
    return [torch.tensor(start + ids[at : at + step]) for at in range(0, count * stride, stride)]


def calibration_tokens(tokenizer: Tokenizer, text: str, length: int) -> torch.Tensor:
    """int64 [<= length]: BOS where the model uses one, then excerpts from all over the text."""
    start = [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []
    ids = tokenizer.encode(text, add_bos=False)
    if length - len(start) < CALIBRATION_EXCERPTS:
        raise ValueError(f"calibration needs at least {CALIBRATION_EXCERPTS + len(start)} tokens, not {length}")
    step = (length - len(start)) // CALIBRATION_EXCERPTS
    stride = max(step, len(ids) // CALIBRATION_EXCERPTS)
    excerpts = [ids[at : at + step] for at in range(0, len(ids), stride)][:CALIBRATION_EXCERPTS]
    return torch.tensor(start + [token for excerpt in excerpts for token in excerpt])
