"""The two configurations: what a model is (`ModelConfig`) and how it is run (`RunConfig`).

Both are frozen and validated where they are made, so that everything above may trust them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Activation = Literal["silu", "gelu_tanh", "relu", "relu2", "drelu", "gelu"]
Norm = Literal["rms", "layer"]
RopeStyle = Literal["interleaved", "halves"]
Method = Literal[
    "auto",
    "dense",
    "exact",
    "gate_threshold",
    "weighted_threshold",
    "shift_threshold",
    "input_threshold",
    "low_rank",
    "sign_bits",
    "mlp",
]
Backend = Literal["auto", "reference", "cpu", "triton"]
Precision = Literal["auto", "float32", "int8"]
Numa = Literal["none", "distribute", "isolate"]
DeviceName = Literal["cpu", "auto", "cuda", "emulated"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (Peng et al. 2023): dimensions that turn more than `beta_fast` times over the original context keep their
    frequency, those that turn less than `beta_slow` times are scaled as linear scaling does, those between mix."""

    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of one kind of layer.

    `dim` of a head's dimensions turn, the rest stays. `style` pairs dimension 2i with 2i+1 (`interleaved`, GGUF's
    llama) or i with i + dim/2 (`halves`, NeoX and Gemma). `scale` divides positions (linear scaling), under `yarn`
    those of slow dimensions only. `attention_factor` multiplies cos and sin. `original_context` is the context before
    scaling: YaRN's bounds follow from it, and of a file's short and long frequency factors (Phi-3) a run with a longer
    context takes the long ones.
    """

    dim: int
    base: float
    style: RopeStyle
    scale: float = 1.0
    yarn: YarnConfig | None = None
    attention_factor: float = 1.0
    original_context: int | None = None

    def __post_init__(self) -> None:
        yarn = self.yarn or YarnConfig()
        factors = (self.base, self.scale, self.attention_factor, yarn.beta_fast, yarn.beta_slow)
        if not all(math.isfinite(one) and one > 0 for one in factors):
            raise ValueError(
                f"rope base {self.base} and scale {self.scale} must be finite and positive, as all of {self}"
            )
        if self.original_context is not None and self.original_context < 1:
            raise ValueError(f"rope's original context must be at least 1, not {self.original_context}")
        if self.yarn and (self.original_context is None or yarn.beta_fast < yarn.beta_slow or self.base <= 1):
            raise ValueError(f"YaRN needs a base above 1, an original context and beta_fast >= beta_slow: {self}")


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts: each token goes to the `used` of `count` FFNs that the router rates highest.

    Their outputs are weighed by the softmax of all ratings, divided by the sum of the chosen ones where `normalised`,
    and times `scale`.
    """

    count: int
    used: int
    normalised: bool = True
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.used <= self.count:
            raise ValueError(f"experts used must lie in [1, {self.count}], the experts there are, not {self.used}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of experts must be finite and positive, not {self.scale}")


@dataclass(frozen=True)
class ModelConfig:
    """Shape and conventions of one model, whatever file it came from.

    Dimensions follow the code base's letters: `d_model` is D, `d_ffn` is N, the neurons of a layer's FFN or of one
    of its `experts`. `sliding[i]` says whether layer i attends only to the last `sliding_window` positions (its own
    included). Without `rope`, positions are learned: row `position_offset` of the table belongs to the first one.
    `cutoff` is what a ReLU's gate must pass to be kept (FATReLU, Song et al. 2024), 0 for plain ReLU. The softcaps
    are Gemma 2's: cap · tanh(x / cap).
    """

    architecture: str
    name: str
    n_layers: int
    d_model: int
    d_ffn: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    activation: Activation
    rope: RopeConfig | None
    rope_local: RopeConfig | None = None
    sliding_window: int | None = None
    sliding: tuple[bool, ...] = ()
    gated: bool = True
    attention_scale: float = 0.0
    embedding_scale: float = 1.0
    norm: Norm = "rms"
    position_offset: int = 0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    cutoff: float = 0.0
    experts: ExpertsConfig | None = None

    def __post_init__(self) -> None:
        counts = ("n_layers", "d_model", "d_ffn", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "context_length")
        for field in counts:
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, not {getattr(self, field)}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_kv_heads ({self.n_kv_heads})")
        if not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps must lie in (0, 1), not {self.norm_eps}")
        for field, kind in (("activation", Activation), ("norm", Norm)):
            if getattr(self, field) not in get_args(kind):
                raise ValueError(f"{field} {getattr(self, field)!r} is none of {', '.join(get_args(kind))}")
        if self.sliding and len(self.sliding) != self.n_layers:
            raise ValueError(f"sliding names {len(self.sliding)} layers, the model has {self.n_layers}")
        for rope in filter(None, (self.rope, self.rope_local)):
            if not 0 < rope.dim <= self.head_dim or rope.dim % 2:
                raise ValueError(f"rope dimension {rope.dim} must be even and at most head_dim {self.head_dim}")
        if not (math.isfinite(self.cutoff) and self.cutoff >= 0):
            raise ValueError(f"cutoff must be finite and at least 0, not {self.cutoff}")
        if self.cutoff and self.activation != "relu":
            raise ValueError(
                f"cutoff {self.cutoff:g} has no meaning for the activation {self.activation}, only for relu"
            )
        for cap in filter(None, (self.attention_softcap, self.logit_softcap)):
            if not (math.isfinite(cap) and cap > 0):
                raise ValueError(f"a softcap must be finite and positive, not {cap}")
        if self.attention_scale == 0.0:
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)

    def is_sliding(self, layer: int) -> bool:
        return bool(self.sliding) and self.sliding[layer]

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """Those that the model has: of all layers, and of sliding ones where theirs differs."""
        return tuple(one for one in (self.rope, self.rope_local) if one is not None)

    def without_experts(self, what: str) -> None:
        """ValueError if the model has experts, for `what` ("a plan") does not know of them."""
        if self.experts is not None:
            raise ValueError(
                f"{what} does not support a mixture of experts yet ({self.architecture}, {self.experts.count} experts); "
                "on the CPU the methods dense, exact and gate_threshold do"
            )


def _in_range(name: str, value: float, low: float, high: float, *, open_low: bool = False, whole: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise ValueError(f"{name} must be a {'whole ' if whole else ''}number, not {value!r}")
    above = value > low if open_low else value >= low
    if not (above and value <= high):  # so that NaN fails
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must lie in {bracket}{low:g}, {high:g}], not {str(value)[:40]}")


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn; temperature 0 is greedy. Names and order are llama.cpp's."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        _in_range("temperature", self.temperature, 0, 100)
        _in_range("top_k", self.top_k, 0, 2**31 - 1, whole=True)
        _in_range("top_p", self.top_p, 0, 1, open_low=True)
        _in_range("min_p", self.min_p, 0, 1)
        _in_range("repeat_penalty", self.repeat_penalty, 0, 100, open_low=True)
        _in_range("repeat_last_n", self.repeat_last_n, 0, 2**31 - 1, whole=True)
        if self.seed is not None:
            _in_range("seed", self.seed, 0, 2**64 - 1, whole=True)


@dataclass(frozen=True)
class RunConfig:
    """Every knob of a run. Defaults, then a mapping (`from_mapping`), then keyword overrides.

    `method` picks the predictor: `dense` computes every neuron, `exact` needs a ReLU model,
    `gate_threshold` (CATS), `weighted_threshold`, `shift_threshold` and `input_threshold` (TEAL, which
    skips inputs instead of neurons) need `sparsity`, `low_rank` needs it for models without ReLU,
    `sign_bits` needs ReLU, `mlp` a file that has its predictors (PowerInfer's). `auto` is what the predictors of `predictor_path`, a solved directory, are
    for, or `mlp` for a file that has its predictors; without either, where a sparsity is given, the best method that needs no training
    (`shift_threshold` for SiLU and GELU); else `exact` for ReLU models and `dense` for others.
    `predictor_rank` is that of `low_rank`, and `recall`, the share of active neurons to catch, that
    of `low_rank` and `sign_bits`. `cold_fraction` puts that share of each layer's neurons on a
    second shard (HybridFFN). `model` None is the shipped one; `context`
    None is the model's own limit or 4096, whichever is less, and 0 the model's limit. `activation`
    overrides the file's, for ReLU models whose converter had no key for it. `precision` is that of
    activations where they meet quantised weights: `int8` rounds them in blocks, as llama.cpp does;
    `auto` is int8 on the C++ core, which is fast at it, and float32 elsewhere. `numa` places threads
    and memory (see `engine/cores.py`).

    `device` is where hot neurons and whole layers go: `auto` a CUDA card if there is one, else the CPU; `emulated`
    runs them as a second shard on the CPU and accounts for them as if it were a card. What goes there is said by
    `plan`, a file of `pinfer plan` or `solve`, by the plan in `predictor_path`, by `gpu_layers`, as llama.cpp's
    -ngl, and by `gpu_memory_gb` (GB of 10^9 bytes), which is also the most it may take.
    """

    model: str | None = None
    context: int | None = None
    activation: Activation | None = None
    threads: int | None = None
    backend: Backend = "auto"
    precision: Precision = "auto"
    method: Method = "auto"
    sparsity: float | None = None
    cold_fraction: float = 0.0
    sampling: SamplingConfig = SamplingConfig()
    predictor_rank: int = 128
    recall: float = 0.99
    numa: Numa = "none"
    record: bool = True
    predictor_path: str | None = None
    device: DeviceName = "cpu"
    plan: str | None = None
    gpu_layers: int | None = None
    gpu_memory_gb: float | None = None

    def __post_init__(self) -> None:
        if self.context is not None:
            _in_range("context", self.context, 0, 2**31 - 1, whole=True)
        if self.threads is not None:
            _in_range("threads", self.threads, 1, 4096, whole=True)
        if self.sparsity is not None:
            _in_range("sparsity", self.sparsity, 0, 0.99)
        _in_range("cold_fraction", self.cold_fraction, 0, 1)
        _in_range("predictor_rank", self.predictor_rank, 32, 8192, whole=True)
        if self.predictor_rank % 32:  # a Q8_0 block
            raise ValueError(f"predictor_rank must be a multiple of 32, not {self.predictor_rank}")
        _in_range("recall", self.recall, 0, 1, open_low=True)
        if self.gpu_layers is not None:
            _in_range("gpu_layers", self.gpu_layers, -1, 2**31 - 1, whole=True)
        if self.gpu_memory_gb is not None:
            _in_range("gpu_memory_gb", self.gpu_memory_gb, 0, 1e6)
        if self.device == "cuda" and self.backend == "cpu":
            raise ValueError("backend cpu computes on the CPU alone, and device is cuda: leave one of them out")
        if self.cold_fraction and self.device != "cpu":
            raise ValueError(
                f"cold_fraction {self.cold_fraction:g} has no meaning with device {self.device}: use a plan"
            )
        choices_of = {
            "method": get_args(Method),
            "backend": get_args(Backend),
            "precision": get_args(Precision),
            "numa": get_args(Numa),
            "device": get_args(DeviceName),
            "activation": (None, *get_args(Activation)),
        }
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(filter(None, choices))}")

    def densely(self) -> RunConfig:
        """The same run with every neuron computed: the baseline. On a GPU it has whole layers, in as much memory."""
        return dataclasses.replace(
            self, method="dense", sparsity=None, cold_fraction=0.0, predictor_path=None, plan=None
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], **overrides: Any) -> RunConfig:
        """Build from nested plain data (TOML, JSON); an unknown key is a ValueError naming it."""
        merged = {**values, **overrides}
        if isinstance(sampling := merged.get("sampling"), Mapping):
            merged["sampling"] = SamplingConfig(**_known(SamplingConfig, sampling, "sampling."))
        run = cls(**_known(cls, merged))
        if not isinstance(run.sampling, SamplingConfig):
            raise ValueError(f"sampling must be a table of its own keys, not {run.sampling!r}")
        return run


def _known(cls: type, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise ValueError(f"unknown key {prefix}{unknown[0]!s}; known keys: {', '.join(sorted(names))}")
    return dict(values)
