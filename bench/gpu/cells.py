"""The cells to measure, most important first: what a run of some minutes is to know before it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from bench.gpu.candidates import FFN, candidates, op_named
from pinfer.kernels.tuning import density_bucket

MAIN_TYPES = ("F16", "BF16", "Q4_K")
TYPES = (*MAIN_TYPES, "Q8_0", "Q4_0", "Q5_K", "Q6_K")
SPARSITIES = (90, 50, 0, 10, 97, 80, 70)
TOKENS = (1, 4, 16)
DENSE_HALF = ("cublas", "torch-compile")
SCHEMES = ("teal", "deja-vu")
PROVIDERS = ("cublas", "pinfer-dense", "pinfer", "teal", "deja-vu")
ATTENTION_CONTEXT, DRY_CONTEXT = 4096, 40


class Shape(NamedTuple):
    """A model's D and N, and its heads of 128."""

    width: int
    neurons: int
    heads: int
    kv_heads: int


SHAPES = {
    "7B": Shape(4096, 11008, 32, 32),
    "70B": Shape(8192, 28672, 64, 8),
    "13B": Shape(5120, 13824, 40, 40),
    "Llama-3-8B": Shape(4096, 14336, 32, 8),
}
DRY_SHAPES = {"7B": Shape(256, 256, 2, 1), "70B": Shape(512, 256, 2, 1)}


@dataclass(frozen=True)
class Cell:
    """One measurement: a candidate at a case. `level` 0 is the most important."""

    candidate: str
    shape: str
    type: str | None
    tokens: int
    sparsity_percent: int | None
    case: tuple[tuple[str, Any], ...]
    level: int

    @cached_property
    def config(self) -> dict[str, Any]:
        """What identifies it in the results."""
        task, provider = self.candidate.split("/")
        return {
            "task": task, "provider": provider, "shape": self.shape, "type": self.type, "tokens": self.tokens,
            "sparsity_percent": self.sparsity_percent, "case": dict(self.case),
        }  # fmt: skip

    @property
    def density(self) -> float | None:
        return None if self.sparsity_percent is None else 1 - self.sparsity_percent / 100

    @property
    def kernels(self) -> str:
        """What decides the kernels that it launches by default: all but the density."""
        kept = (f"{key}={value}" for key, value in self.case if key != "density")
        return " ".join((self.candidate, *kept))

    @property
    def launches(self) -> str:
        """What decides the tuned launch parameters: cells of neighbouring densities share them."""
        return f"{self.kernels} density {density_bucket(self.density)}"

    @property
    def label(self) -> str:
        sparsity = "" if self.sparsity_percent is None else f" {self.sparsity_percent}%"
        extra = "" if self.shape != "bench" else f" {dict(self.case)}"
        return f"{self.candidate} {self.shape} {self.type or '-'} T{self.tokens}{sparsity}{extra}"


class Level(NamedTuple):
    """FFN cells of one importance: every combination that its candidates can compute."""

    shapes: Sequence[str]
    types: Sequence[str]
    tokens: Sequence[int]
    sparsities: Sequence[int]
    providers: Sequence[str]


def planned(dry: bool = False) -> list[Cell]:
    """All cells in order. `dry`: toy shapes, two types, fewer batches and sparsities."""
    shapes = DRY_SHAPES if dry else SHAPES
    found: dict[tuple[Any, ...], Cell] = {}
    for number, level in enumerate(levels(dry)):
        group = other_ops(shapes, number, dry) if level is None else ffn_cells(level, shapes, number)
        for cell in group:
            found.setdefault((cell.candidate, cell.shape, cell.type, cell.case), cell)
    return [cell for cell in found.values() if cell.candidate in candidates()]


def levels(dry: bool) -> list[Level | None]:
    """FFN levels by importance; None stands for the other ops."""
    large = ("7B", "70B")
    if dry:
        types = ("F16", "Q4_K")
        one_token = Level(large, types, (1,), (90, 50), (*PROVIDERS, "torch-compile"))
        return [one_token, Level(("7B",), types, (2,), (90,), PROVIDERS), None]
    rest = tuple(name for name in TYPES if name not in MAIN_TYPES)
    return [
        Level(("7B",), MAIN_TYPES, (1,), (90, 50), PROVIDERS),
        Level(("70B",), MAIN_TYPES, (1,), (90, 50), PROVIDERS),
        Level(large, MAIN_TYPES, (1,), (0, 10), ("pinfer",)),
        Level(large, ("F16", "BF16"), (1,), (), ("torch-compile",)),
        Level(large, MAIN_TYPES, (1,), (97, 80, 70), ("pinfer", *SCHEMES)),
        Level(("7B",), rest, (1,), (90, 50, 0), PROVIDERS),
        None,
        Level(("70B",), rest, (1,), (90, 50), PROVIDERS),
        Level(("13B", "Llama-3-8B"), MAIN_TYPES, (1,), (90, 50, 0), PROVIDERS),
        Level(("7B",), MAIN_TYPES, (4, 16), (90, 50, 0), PROVIDERS),
        Level(tuple(SHAPES), TYPES, TOKENS, SPARSITIES, PROVIDERS),
        Level(tuple(SHAPES), ("F16", "BF16"), TOKENS, (), ("torch-compile",)),
    ]


def ffn_cells(level: Level, shapes: dict[str, Shape], number: int) -> Iterator[Cell]:
    """The cells of a level, dense ones before those that are set against them."""
    for shape in level.shapes:
        for tokens in level.tokens:
            for type in level.types:
                for provider in level.providers:
                    yield from _provider_cells(provider, shape, shapes[shape], type, tokens, level.sparsities, number)


def _provider_cells(
    provider: str, name: str, shape: Shape, type: str, tokens: int, sparsities: Sequence[int], number: int
) -> Iterator[Cell]:
    size = {"neurons": shape.neurons, "width": shape.width}
    half = type in ("F16", "BF16")
    if provider == "pinfer-dense" or (provider in DENSE_HALF and half):
        case = {"type": type, "tokens": tokens, **size}
        yield make_cell(f"{FFN}/{provider}", name, type, tokens, None, case, number)
    elif provider == "pinfer":
        for percent in sparsities:
            case = {"type": type, "tokens": tokens, **size, "density": 1 - percent / 100, "masked": tokens > 1}
            yield make_cell(f"{FFN}/pinfer", name, type, tokens, percent, case, number)
    elif provider in SCHEMES and type == "F16" and tokens == 1:
        for percent in sparsities:
            case = {**size, "density": 1 - percent / 100}
            yield make_cell(f"{FFN}/{provider}", name, type, tokens, percent, case, number)
            if provider == "deja-vu" and percent in (50, 90):
                yield make_cell("predictor/deja-vu", name, type, tokens, percent, case, number)


def make_cell(
    candidate: str, shape: str, type: str | None, tokens: int, percent: int | None, case: dict[str, Any], level: int
) -> Cell:
    rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in case.items()}
    return Cell(candidate, shape, type, tokens, percent, tuple(rounded.items()), level)


def other_ops(shapes: dict[str, Shape], number: int, dry: bool) -> Iterator[Cell]:
    """A few cells for each other op with a Triton implementation, at model shapes where its case is known here."""
    for name, shape in shapes.items():
        if name in ("7B", "70B"):
            yield from _model_ops(name, shape, number, DRY_CONTEXT if dry else ATTENTION_CONTEXT)
    known = {FFN, "sparse_ffn", "quant_matmul", "input_sparse_matmul", "select_active", "sign_select", "attention"}
    for candidate in candidates().values():
        op = op_named(candidate.task)
        if dry or op is None or candidate.provider != "pinfer" or candidate.task in known:
            continue
        for case in op.bench_cases:
            percent = None if "density" not in case else round(100 * (1 - case["density"]))
            tokens = int(case.get("tokens", 1))
            yield make_cell(candidate.name, "bench", case.get("type"), tokens, percent, dict(case), number)


def _model_ops(name: str, shape: Shape, number: int, context: int) -> Iterator[Cell]:
    width, neurons = shape.width, shape.neurons
    for type in ("F16", "Q8_0", "Q4_K"):
        case: dict[str, Any] = {"type": type, "tokens": 1, "rows": neurons, "columns": width}
        if type == "F16":
            yield make_cell("quant_matmul/cublas", name, type, 1, None, case, number)
        yield make_cell("quant_matmul/pinfer", name, type, 1, None, case, number)
    for type in ("F16", "Q4_K"):
        for percent in (50, 90):
            case = {"type": type, "tokens": 1, "inputs": width, "outputs": neurons, "density": 1 - percent / 100}
            yield make_cell("input_sparse_matmul/pinfer", name, type, 1, percent, case, number)
    for tokens in (1, 16):  # and the union of 16 tokens' lists
        selection = {"tokens": tokens, "neurons": neurons, "density": 0.1}
        yield make_cell("select_active/pinfer", name, None, tokens, 90, selection, number)
        yield make_cell("sign_select/pinfer", name, None, tokens, 90, {**selection, "width": width}, number)
    heads = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": 128}
    yield make_cell("attention/pinfer", name, None, 1, None, {"tokens": 1, **heads, "start": context - 1}, number)
