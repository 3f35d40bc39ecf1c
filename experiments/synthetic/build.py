"""Makes the weights layer by layer while sample tokens run through them, so that sparsity is planted in what they meet.

The residual stream has a constant direction: its first 32 channels, one whole quantisation block,
carry the same value in every embedding, and no layer writes to them (those rows of `attn_output`
and `ffn_down` are zero). Row i of a gate is an offset on these channels plus A_i · B of rank R on
the others, so that its gate is offset_i · (a nearly constant number) plus a Gaussian of R
directions: the offset decides how often the neuron fires, B which tokens make it fire, and a
predictor of rank R can know it. Offsets are quantiles of what the quantised gate gives on the
layer's own normed inputs; other tokens, which decide nothing, measure what was reached.

Each sublayer's output gets a fixed size, so that all of them together raise the residual's energy
by GROWTH whatever the depth: the layers change it truly, and the constant's share after RMSNorm
falls by 18 % at most from the first to the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experiments.synthetic.planting import fitting_offsets, frequencies, power_law_exponent, share_holding
from experiments.synthetic.recipe import CONSTANT, Recipe, TensorSpec
from experiments.synthetic.sink import GGUFSink
from experiments.synthetic.vocabulary import NORM_EPS
from pinfer.kernels.activation import activate
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.quant import QuantTensor
from pinfer.quantize import quantize

Tensor = torch.Tensor

PIECE = 1 << 24  # weights made at a time: 64 MB of floats
FITTED, FRESH, LENGTH = 8, 4, 64  # sequences that set the offsets, sequences that measure, tokens of each
CONSTANT_VALUE = 2.0  # beside other channels of standard deviation 1; a power of two, which every scale can hold
GROWTH = 0.5
SHARPNESS = 1.5  # of queries and keys, so that a token attends to a few others and values do not average out
# Standard deviation of a gate without its offset. SiLU has no zeros: the wider the gates spread, the
# fewer lie where it is neither 0 nor x. At 32, neurons with negative gates hold below 1 % of Σ |act| (printed).
GATE_SPREAD = {"relu": 1.0, "silu": 32.0}


@dataclass(frozen=True)
class LayerReport:
    """What fresh tokens measured: `share_for_80` neurons hold 80 % of firings, `silent` of Σ |act| is not firing."""

    density: float
    share_for_80: float
    silent: float


class Builder:
    """Builds one recipe's weights into a sink; deterministic for one seed, machine and number of threads."""

    def __init__(self, recipe: Recipe, sink: GGUFSink) -> None:
        self.recipe, self.sink, self.specs = recipe, sink, recipe.tensors()
        self.generator = torch.Generator().manual_seed(recipe.seed)
        shape = recipe.shape
        self.exponent = power_law_exponent(shape.d_ffn, recipe.density) if recipe.skew == "powerlaw" else 0.0
        self.unit = shape.d_model**-0.5  # the deviation of weights that keep a normed input's size
        self.output_size = math.sqrt(GROWTH / (2 * recipe.n_layers))
        self.residual = torch.empty(0)  # float32 [T, D], all sequences one behind the other

    def embed(self) -> None:
        """Write the embedding and start the residual of random tokens."""
        tokens = torch.randint(self.recipe.vocab_size, ((FITTED + FRESH) * LENGTH,), generator=self.generator)
        embedded = []

        def piece(rows: int, columns: int) -> Tensor:
            weights = self._random(1.0)(rows, columns)
            weights[:, :CONSTANT] = CONSTANT_VALUE
            return weights

        def keep(rows: slice, weights: QuantTensor) -> None:
            inside = (tokens >= rows.start) & (tokens < rows.stop)
            embedded.append((inside, dequantize(weights[tokens[inside] - rows.start])))

        self._write_matrix("token_embd", piece, keep)
        self.residual = torch.empty(len(tokens), self.recipe.shape.d_model)
        for inside, rows in embedded:
            self.residual[inside] = rows

    def layer(self, index: int) -> LayerReport:
        """Write one layer and push the sample tokens through it."""
        prefix = f"blk.{index}."
        x = self._normed(prefix + "attn_norm")
        q, k = (self._apply(f"{prefix}attn_{name}", self._random(SHARPNESS * self.unit), x) for name in "qk")
        mixed = self._attend(q, k, self._apply(prefix + "attn_v", self._random(self.unit), x))
        self.residual += self._apply(prefix + "attn_output", self._output_rows(mixed), mixed)
        x = self._normed(prefix + "ffn_norm")
        gate = self._gate(prefix + "ffn_gate", x)
        hidden = activate(self.recipe.activation, gate)
        report = _measure(gate[FITTED * LENGTH :], hidden[FITTED * LENGTH :])
        hidden = hidden.mul_(self._apply(prefix + "ffn_up", self._random(self.unit), x))
        self.residual += self._apply(prefix + "ffn_down", self._output_rows(hidden), hidden)
        return report

    def finish(self) -> None:
        """Write the final norm and the head."""
        self._normed("output_norm")
        self._write_matrix("output", self._random(self.unit))

    def _random(self, deviation: float) -> Callable[[int, int], Tensor]:
        return lambda rows, columns: torch.randn(rows, columns, generator=self.generator).mul_(deviation)

    def _output_rows(self, inputs: Tensor) -> Callable[[int, int], Tensor]:
        """Weights that give outputs of the planned size for these inputs, none on the constant direction."""
        make = self._random(self.output_size / float(inputs[: FITTED * LENGTH].square().sum(1).mean().sqrt()))
        first = True

        def piece(rows: int, columns: int) -> Tensor:
            nonlocal first
            weights = make(rows, columns)
            if first:
                weights[:CONSTANT] = 0
            first = False
            return weights

        return piece

    def _write_matrix(
        self, name: str, make: Callable[[int, int], Tensor], use: Callable[[slice, QuantTensor], None] | None = None
    ) -> None:
        """Write a matrix that `make(rows, columns)` gives piece by piece; `use` sees each piece as it is stored."""
        spec = self.specs[name + ".weight"]
        blocks = torch.empty(spec.rows, spec.type.row_bytes(spec.columns), dtype=torch.uint8)
        for rows in _pieces(spec):
            weights = quantize(make(rows.stop - rows.start, spec.columns), spec.type)
            blocks[rows] = weights.blocks
            if use is not None:
                use(rows, weights)
        self.sink.write(spec.name, blocks)

    def _apply(self, name: str, make: Callable[[int, int], Tensor], x: Tensor) -> Tensor:
        """Write a matrix and return x · Wᵀ of its stored weights, float32 [T, rows]."""
        y = torch.empty(x.shape[0], self.specs[name + ".weight"].rows)

        def use(rows: slice, weights: QuantTensor) -> None:
            y[:, rows] = x @ dequantize(weights).T

        self._write_matrix(name, make, use)
        return y

    def _normed(self, name: str) -> Tensor:
        """Write a norm of ones and return the normed residual."""
        weight = torch.ones(self.recipe.shape.d_model)
        self.sink.write(name + ".weight", weight)
        return F.rms_norm(self.residual, weight.shape, weight, NORM_EPS)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each sequence; q [T, D], k and v [T, kv_heads · head_dim]."""

        def heads(x: Tensor) -> Tensor:
            return x.view(FITTED + FRESH, LENGTH, -1, self.recipe.shape.head_dim).transpose(1, 2)

        queries, keys = (_rotated(heads(x), self.recipe.shape.rope_base) for x in (q, k))
        mixed = F.scaled_dot_product_attention(queries, keys, heads(v), is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(q.shape)

    def _gate(self, name: str, x: Tensor) -> Tensor:
        """Write a gate whose neurons fire as often as planned, and return it for all tokens, float32 [T, N]."""
        spec, rank = self.specs[name + ".weight"], self.recipe.gate_rank
        wanted = frequencies(spec.rows, self.recipe.density, self.exponent, self.generator)
        spread = GATE_SPREAD[self.recipe.activation] * self.unit / math.sqrt(rank)
        basis = torch.randn(rank, spec.columns - CONSTANT, generator=self.generator)
        factors = torch.randn(spec.rows, rank, generator=self.generator).mul_(spread)
        seen = x[:, CONSTANT:] @ basis.T  # [T, R]
        blocks = torch.empty(spec.rows, spec.type.row_bytes(spec.columns), dtype=torch.uint8)
        gate = torch.empty(x.shape[0], spec.rows)
        for rows in _pieces(spec):
            guess = self._fit(seen @ factors[rows].T, x, wanted[rows])
            weights = torch.cat([guess[:, None].expand(-1, CONSTANT), factors[rows] @ basis], dim=1)
            stored, gate[:, rows] = self._plant(weights, spec, x, wanted[rows])
            blocks[rows] = stored
        self.sink.write(spec.name, blocks)
        return gate

    def _plant(self, weights: Tensor, spec: TensorSpec, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of gate rows with their offsets set, and what they give; the offsets in `weights` are guesses.

        Only the blocks that hold the offsets are quantised again: the guesses gave their scales.
        """
        head = max(CONSTANT, spec.type.block_size)  # columns that share blocks with the offsets
        stored = quantize(weights, spec.type)
        values = dequantize(stored)
        tail = x[:, head:] @ values[:, head:].T
        rest = tail + x[:, CONSTANT:head] @ values[:, CONSTANT:head].T
        weights[:, :CONSTANT] = self._fit(rest, x, wanted)[:, None]
        first = quantize(weights[:, :head], spec.type)
        stored.blocks[:, : first.blocks.shape[1]] = first.blocks
        return stored.blocks, tail + x[:, :head] @ dequantize(first).T

    def _fit(self, rest: Tensor, x: Tensor, wanted: Tensor) -> Tensor:
        fitted = slice(0, FITTED * LENGTH)
        return fitting_offsets(rest[fitted], x[fitted, :CONSTANT].sum(1), wanted)


def _pieces(spec: TensorSpec) -> Iterator[slice]:
    """Row ranges of at most PIECE weights; the first holds the rows of the constant direction."""
    step = max(CONSTANT, PIECE // spec.columns)
    for start in range(0, spec.rows, step):
        yield slice(start, min(start + step, spec.rows))


def _rotated(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of x [S, heads, L, head_dim], dimension 2i paired with 2i + 1 as llama has it."""
    frequencies = base ** -(torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = torch.outer(torch.arange(x.shape[-2]), frequencies)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def _measure(gate: Tensor, act: Tensor) -> LayerReport:
    """Gates and their activations of fresh tokens, float32 [T, N]."""
    fires = gate > 0
    size = act.abs()
    silent = 1 - float(size[fires].double().sum() / size.double().sum())
    return LayerReport(float(fires.float().mean()), share_holding(fires.sum(0)), max(0.0, silent))
