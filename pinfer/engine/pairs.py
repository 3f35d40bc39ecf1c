"""Collects what one layer's FFN reads and what its neurons contribute into files that its predictor is trained on.

`inputs.f16` holds x as float16 [T, D], `contributions.u8` a byte a neuron [T, N]: 0 for one that is not
active, else its share of the token's contribution on a logarithmic scale (`encode`). The first token of
each sequence is left out; the last sequences come last and are held out to judge by. Both files are
mapped, so that memory holds no more of them than RESIDENT_BYTES.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pinfer.engine.load import Engine
from pinfer.engine.measure import dense_ffn, observe_layer
from pinfer.engine.sample import contribution_bar
from pinfer.kernels.norms import column_norms
from pinfer.models import LayerWalk
from pinfer.predictors.pair_source import Pairs

INPUTS, CONTRIBUTIONS = "inputs.f16", "contributions.u8"
# Codes 1 to 255 stand for shares of 2^-20 to 1, 12.7 to an octave: a share comes back within 2.8 %, smaller
# ones as 2^-20.
OCTAVES, TOP = 20, 255
MIN_PAIRS = 256  # fewer say nothing of a neuron that fires on one token in twenty
VALIDATION_SHARE, VALIDATION_TOKENS = 1 / 16, 8192  # of all tokens, but no more than that
RESIDENT_BYTES = 512 << 20  # of the mapped files; more is let go after every batch
HASH_CHUNK_BYTES = 16 << 20


def encode(contribution: torch.Tensor) -> torch.Tensor:
    """Codes uint8 [T, N] of contributions float32 [T, N] >= 0, from each one's share of its token's sum."""
    share = contribution / contribution.sum(1, keepdim=True).clamp_min(1e-38)
    code = (share.log2_().mul_((TOP - 1) / OCTAVES) + (TOP + 0.5)).clamp_(1, TOP)
    return torch.where(contribution > 0, code, 0).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Shares float32 [T, N] of codes uint8 [T, N]: 0, or 2^-20 to 1."""
    share = codes.float().sub_(TOP).mul_(OCTAVES / (TOP - 1)).exp2_()
    return share.mul_(codes != 0)


@dataclass(frozen=True)
class PairPlan:
    """Which tokens of a layer are kept: `kept` of `counted`, evenly, those from `held_out` on to judge by.

    Tokens are counted in order, without each sequence's first one. The same for every layer of a model.
    """

    width: int
    n_neurons: int
    counted: int
    kept: int
    held_out: int

    @classmethod
    def of(cls, lengths: Sequence[int], width: int, n_neurons: int, budget_bytes: int) -> PairPlan:
        """For sequences of these lengths and files of at most `budget_bytes` together.

        ValueError for fewer than two sequences or MIN_PAIRS tokens, and for a budget that holds fewer.
        """
        counted = sum(max(0, length - 1) for length in lengths)
        if len(lengths) < 2 or counted < MIN_PAIRS:
            raise ValueError(
                f"training needs 2 sequences and {MIN_PAIRS} tokens without their first ones, "
                f"not {len(lengths)} and {counted}"
            )
        a_token = 2 * width + n_neurons
        if budget_bytes < MIN_PAIRS * a_token:
            raise ValueError(
                f"a disk budget of {budget_bytes} bytes is too small: {MIN_PAIRS} tokens of a layer "
                f"of width {width} and {n_neurons} neurons take {MIN_PAIRS * a_token} bytes"
            )
        wanted, held, first = min(VALIDATION_SHARE * counted, VALIDATION_TOKENS), 0, len(lengths)
        while first > 1 and (held < wanted or not held):
            first -= 1
            held += max(0, lengths[first] - 1)
        plan = cls(width, n_neurons, counted, min(counted, budget_bytes // a_token), counted - held)
        if not 0 < plan.tokens < plan.kept:
            raise ValueError("training needs sequences of at least 2 tokens beside those held out to judge by")
        return plan

    def before(self, token: int) -> int:
        """How many of the tokens before a counted one are kept."""
        return token * self.kept // self.counted

    @property
    def tokens(self) -> int:
        """Kept tokens to train on."""
        return self.before(self.held_out)

    @property
    def nbytes(self) -> int:
        """Bytes of the files of a layer."""
        return self.kept * (2 * self.width + self.n_neurons)


class PairWriter:
    """An Observer that writes a layer's files. Unfinished ones are worth nothing.

    down_norms: float32 [N], ‖d_i‖. bar: a contribution counts as active where it exceeds that.
    """

    def __init__(self, folder: Path, plan: PairPlan, down_norms: torch.Tensor, bar: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._plan, self._norms, self._bar, self._seen = plan, down_norms, bar, 0
        self._files = {name: (folder / name).open("wb") for name in (INPUTS, CONTRIBUTIONS)}
        self._sums = {name: hashlib.sha256() for name in self._files}

    def add(self, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor | None, hidden: torch.Tensor) -> None:
        """See `Observer`. ValueError where activations are not finite."""
        at = np.arange(self._seen, self._seen + len(x), dtype=np.int64)
        kept, counted = self._plan.kept, self._plan.counted
        rows = torch.from_numpy(((at + 1) * kept // counted > at * kept // counted).nonzero()[0])
        self._seen += len(x)
        if not len(rows):
            return
        inputs = x[rows].half()
        contribution = hidden[rows].abs_().mul_(self._norms)
        if not bool(inputs.isfinite().all() and contribution.isfinite().all()):
            raise ValueError("the activations are not finite, or inputs are too large for float16")
        contribution[contribution <= self._bar] = 0
        self._write(INPUTS, inputs)
        self._write(CONTRIBUTIONS, encode(contribution))

    def _write(self, name: str, values: torch.Tensor) -> None:
        data = values.contiguous().view(torch.uint8).numpy().data
        self._files[name].write(data)
        self._sums[name].update(data)

    def finish(self) -> dict[str, Any]:
        """Put the files on the disk; plain data by which `LayerPairs` knows them again."""
        assert self._seen == self._plan.counted
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        return {"plan": asdict(self._plan), "sha256": {name: one.hexdigest() for name, one in self._sums.items()}}

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class CodedPairs:
    """A PairSource of inputs float16 [T, D] and codes uint8 [T, N], the first `tokens` of them to train on."""

    def __init__(self, inputs: torch.Tensor, codes: torch.Tensor, tokens: int) -> None:
        self._inputs, self._codes, self._tokens = inputs, codes, tokens

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def validation_tokens(self) -> int:
        return len(self._codes) - self._tokens

    def take(self, tokens: torch.Tensor) -> Pairs:
        return Pairs(self._inputs[tokens].float(), decode(self._codes[tokens]))

    def validation(self, start: int, stop: int) -> Pairs:
        return self.take(torch.arange(self._tokens + start, self._tokens + stop))


class LayerPairs(CodedPairs):
    """The files of a layer, mapped."""

    def __init__(self, folder: Path, mark: Mapping[str, Any], *, check: bool) -> None:
        """mark: what `PairWriter.finish` returned. check: read the files whole. ValueError unless they are those marked."""
        plan, self._maps = PairPlan(**mark["plan"]), list[mmap.mmap]()
        rows = {INPUTS: 2 * plan.width, CONTRIBUTIONS: plan.n_neurons}
        inputs, codes = (self._map(folder / name, (plan.kept, size)) for name, size in rows.items())
        for name, digest in mark["sha256"].items():
            if check and _sha256(folder / name) != digest:
                raise ValueError(f"{name} is damaged")
        super().__init__(inputs.view(torch.float16), codes, plan.tokens)
        self._released = plan.nbytes > RESIDENT_BYTES and sys.platform == "linux"

    def _map(self, path: Path, shape: tuple[int, int]) -> torch.Tensor:
        """uint8"""
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != shape[0] * shape[1]:
                raise ValueError(f"{path.name} is damaged")
            # Writable, though nobody writes, because torch warns of memory that is not; private, so nothing would reach the file.
            self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        return torch.frombuffer(self._maps[-1], dtype=torch.uint8).view(shape)

    def take(self, tokens: torch.Tensor) -> Pairs:
        pairs = super().take(tokens)
        if self._released:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
        return pairs


def collect_pairs(
    engine: Engine,
    walk: LayerWalk,
    folder: Path,
    plan: PairPlan,
    sparsity: float | None,
    passed: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Take the sequences through the walk's next layer and write its files; returns their mark.

    sparsity: neurons whose contribution is among the smallest share of that size count as not active;
    None: those that contribute nothing. `passed` is called after every sequence. ValueError for a layer
    that is not dense, and where activations are not finite.
    """
    number, dense = walk.layer, dense_ffn(engine, walk.layer)
    norms = column_norms(dense.down)
    bar = 0.0 if sparsity is None else contribution_bar(engine, walk, norms, sparsity)
    writer = PairWriter(folder, plan, norms, bar)
    try:
        observe_layer(engine, walk, writer, passed)
        return writer.finish()
    except ValueError as problem:
        raise ValueError(f"{engine.path}: layer {number}: {problem}") from problem
    finally:
        writer.close()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
