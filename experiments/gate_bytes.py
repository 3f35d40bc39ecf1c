"""shift_threshold with fewer bytes for the gate and for its compensation M: added loss against FFN bytes read.

    python -m experiments.gate_bytes --model gemma.gguf

shift_threshold computes y = M·x + Σ over kept i of (act(g_i · x) - c_i)(u_i · x) d_i, and reads the whole gate to
know which neurons to keep. Here the gate is screened by a copy of few bits, or without each token's small inputs
(TEAL, Liu et al. 2024), and M is rounded to four bits. The arithmetic is float32 torch on the weights as the sparse
path stores them; bytes are counted from the formats, not measured. Everything is fitted on pinfer's calibration text.
Prints a markdown table and writes experiments/results/gate_bytes/<model>.json after each row, to go on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from experiments.environment import environment
from experiments.error_feedback import bits_per_weight, rounded
from experiments.files import write_json
from experiments.thresholds import added_nats, parse, settings_of, spread_windows
from pinfer.config import RunConfig
from pinfer.engine import Engine, load_engine
from pinfer.engine.text import Text, cut
from pinfer.ffn import DenseFFN
from pinfer.kernels.activation import CLAMPS_UP, activate
from pinfer.kernels.ops import dequantize
from pinfer.quality import perplexity
from pinfer.quant import Q5_0, Q8_0
from pinfer.quantize import quantize
from pinfer.sparsify import ffn_inputs, transposed_down

HERE = Path(__file__).parent
SEQUENCES, TOKENS = 48, 256  # of the calibration text: all that it has under Gemma's tokenizer
M_BITS, M_GROUP = 4, 32  # of the cheap M: Q4_0's layout
RIDGE = 0.3  # of the mean squared input, where M is refitted
FITTED_TOKENS = 4096  # that medians and quantiles are taken over


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    copy:    bits and group of the gate's copy; None: the gate itself.
    exact:   whether kept neurons' own gate rows are read; else what ranked them is their gate value.
    skipped: share of inputs that ranking leaves out, the smallest |x_j| ‖G_:,j‖, the mean of what they add put back.
    small_m: M in four bits with error feedback; else in Q8_0 by plain rounding, as shift_threshold had it then.
    refit:   M fitted as well to what the rest leaves over, by ridge regression on the calibration inputs.
    small_down: down's rows in Q5_0, else as the sparse path stores them.
    norms:   rank by |act(g) - c| · E|u| · ‖d‖; else without ‖d‖, as shift_threshold does.
    """

    name: str
    sparsity: float
    copy: tuple[int, int] | None = None
    exact: bool = False
    skipped: float = 0.0
    small_m: bool = True
    refit: bool = True
    norms: bool = True
    small_down: bool = False


Q4 = (4, 32)
VARIANTS = (
    Variant("shift_threshold", 0.7, small_m=False, refit=False, norms=False),
    *(Variant("4-bit copy instead of the gate", sparsity, copy=Q4) for sparsity in (0.5, 0.6, 0.7)),
    *(
        Variant(
            "4-bit copy, a quarter of its inputs skipped, down in Q5_0", sparsity, Q4, skipped=0.25, small_down=True
        )
        for sparsity in (0.5, 0.6, 0.7)
    ),
    Variant("4-bit copy, a quarter of its inputs skipped", 0.7, copy=Q4, skipped=0.25),
    Variant("4-bit copy instead of the gate, down in Q5_0", 0.7, copy=Q4, small_down=True),
)


class Layer:
    """What a layer's variants share: float32 weights [N, D], their bytes, calibration inputs, centres, M."""

    def __init__(self, ffn: DenseFFN, inputs: torch.Tensor) -> None:
        """inputs: float32 [T, D], opening tokens left out. ValueError without a gate, where up is clamped, or with a bias."""
        if ffn.gate_bias is not None or ffn.down_bias is not None or ffn.cutoff:
            raise ValueError("this model's FFN has biases or a cutoff, which these variants leave out")
        if ffn.up is None or ffn.activation in CLAMPS_UP:
            raise ValueError("this model's FFN has no gate, or clamps its up products: shift_threshold does not fit it")
        down, _ = transposed_down(0, ffn)
        self.gate, self.up, self.down = dequantize(ffn.gate), dequantize(ffn.up), dequantize(down)
        self.small_down = quantize(self.down, Q5_0)
        self.gate_bytes, self.up_bytes, self.down_bytes = ffn.gate.nbytes, ffn.up.nbytes, down.nbytes
        self.activation = ffn.activation
        self.inputs, self.moment = inputs, inputs.T @ inputs / len(inputs)
        self.x = inputs[:: -(-len(inputs) // FITTED_TOKENS)].contiguous()
        self.center = self.act(self.x @ self.gate.T).T.contiguous().median(dim=1).values
        self.up_size = (self.x @ self.up.T).abs().mean(dim=0)
        self.matrix = (self.down * self.center[:, None]).T @ self.up
        self.outputs = self.dense(inputs)
        self._copies: dict[tuple[int, int], torch.Tensor] = {}

    def act(self, values: torch.Tensor) -> torch.Tensor:
        return activate(self.activation, values)

    def copy(self, kind: tuple[int, int] | None) -> torch.Tensor:
        """The gate, or its copy of so many bits and weights a scale."""
        if kind is None:
            return self.gate
        if kind not in self._copies:
            self._copies[kind] = rounded(self.gate, self.moment, *kind)
        return self._copies[kind]

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        return (self.act(x @ self.gate.T) * (x @ self.up.T)) @ self.down


class ScreenedFFN(nn.Module):
    """One layer under a variant; counts the (token, neuron) pairs it keeps, opening tokens apart."""

    def __init__(self, layer: Layer, variant: Variant) -> None:
        super().__init__()
        self.layer, self.variant = layer, variant
        self.screen = layer.copy(variant.copy)
        self.down = dequantize(layer.small_down) if variant.small_down else layer.down
        self.weight = layer.up_size * (layer.down.norm(dim=1) if variant.norms else 1.0)
        self.norms = self.screen.norm(dim=0)
        self.smallest = quantile(layer.x.abs() * self.norms, variant.skipped)
        self.offset = self.screen @ torch.where(self.kept_inputs(layer.x), 0.0, layer.x).mean(dim=0)
        self.threshold = quantile(self.sizes(self.ranking(layer.x)), variant.sparsity)
        self.matrix = self._compensation()
        self.kept = self.tokens = self.inputs = 0

    def kept_inputs(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs() * self.norms > self.smallest  # bool [T, D]

    def ranking(self, x: torch.Tensor) -> torch.Tensor:
        """What neurons are ranked by, act(g · x) or near it: float32 [T, N]."""
        return self.layer.act(torch.where(self.kept_inputs(x), x, 0.0) @ self.screen.T + self.offset)

    def sizes(self, ranking: torch.Tensor) -> torch.Tensor:
        return (ranking - self.layer.center).abs() * self.weight

    def neurons(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What kept neurons add, float32 [T, D], and which they are, bool [T, N]."""
        layer, ranking = self.layer, self.ranking(x)
        keep = self.sizes(ranking) > self.threshold
        values = layer.act(x @ layer.gate.T) if self.variant.exact else ranking
        return torch.where(keep, (values - layer.center) * (x @ layer.up.T), 0.0) @ self.down, keep

    def _compensation(self) -> torch.Tensor:
        layer, matrix = self.layer, self.layer.matrix
        if self.variant.refit:
            left = layer.outputs - self.neurons(layer.inputs)[0] - layer.inputs @ matrix.T
            ridge = layer.moment + RIDGE * layer.moment.diagonal().mean() * torch.eye(len(layer.moment))
            matrix = matrix + torch.linalg.solve(ridge, layer.inputs.T @ left / len(left)).T
        if self.variant.small_m:
            return rounded(matrix, layer.moment, M_BITS, M_GROUP)
        return dequantize(quantize(matrix.contiguous(), Q8_0))

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        added, keep = self.neurons(x)
        y = added + x @ self.matrix.T
        if opens:
            y[0] = self.layer.dense(x[:1])[0]
        counted = slice(1 if opens else 0, None)
        self.kept += int(keep[counted].sum())
        self.inputs += int(self.kept_inputs(x)[counted].sum())
        self.tokens += len(keep[counted])
        return y

    @property
    def density(self) -> float:
        return self.kept / (self.tokens * len(self.layer.center))

    @property
    def read_bytes(self) -> float:
        """A token's FFN bytes: what ranks, M, and of kept neurons up, down and, where it is read, the gate."""
        layer, variant = self.layer, self.variant
        whole = layer.gate_bytes if variant.copy is None else layer.gate.numel() * bits_per_weight(*variant.copy) / 8
        screening = whole * self.inputs / (self.tokens * layer.gate.shape[1])
        m_bits = bits_per_weight(M_BITS if variant.small_m else 8, M_GROUP)
        rows = layer.up_bytes + (layer.small_down.nbytes if variant.small_down else layer.down_bytes)
        rows += layer.gate_bytes if variant.exact else 0
        return screening + layer.matrix.numel() * m_bits / 8 + self.density * rows


def quantile(sizes: torch.Tensor, share: float) -> torch.Tensor:
    """What a share of the sizes does not exceed; below all of them for 0."""
    if share == 0:
        return sizes.new_tensor(-1.0)
    return sizes.flatten().kthvalue(max(1, round(share * sizes.numel()))).values


def calibrated(engine: Engine) -> list[Layer]:
    sequences = cut(engine.tokenizer, Text.read(None), SEQUENCES * TOKENS, engine.config.context_length, TOKENS)
    inputs = ffn_inputs(engine.model, sequences)
    return [Layer(ffn, torch.cat([of_one[1:] for of_one in seen])) for ffn, seen in inputs]


@torch.inference_mode()
def measure(engine: Engine, layers: list[Layer], variant: Variant | None, pieces: list[Any]) -> dict[str, Any]:
    """One row: losses by window under a variant, or of the dense model as it was loaded."""
    if variant is not None:
        for block, layer in zip(engine.model.blocks, layers, strict=True):
            block.ffn = ScreenedFFN(layer, variant)
    row: dict[str, Any] = {"variant": None if variant is None else asdict(variant)}
    row["nll_by_window"] = [perplexity(engine.model, [piece]).nll for piece in pieces]
    if variant is not None:
        dense = sum(layer.gate_bytes + layer.up_bytes + layer.down_bytes for layer in layers)
        row["density"] = fmean(block.ffn.density for block in engine.model.blocks)
        row["bytes_share"] = sum(block.ffn.read_bytes for block in engine.model.blocks) / dense
    return row | {"environment": environment()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: variant, neurons skipped, FFN bytes read, nats added to the dense model."""
    dense, *others = rows
    lines = ["| variant | skipped: asked | reached | FFN bytes read | added nats |", "|---|---|---|---|---|"]
    for row in others:
        lines.append(
            f"| {row['variant']['name']} | {100 * row['variant']['sparsity']:.0f} % | {100 * (1 - row['density']):.1f} % "
            f"| {100 * row['bytes_share']:.1f} % | {added_nats(row, dense)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments, "gate_bytes", __doc__)
    path = args.output / f"{Path(args.model).stem}.json"
    try:
        text = args.text.read_text(encoding="utf-8")
        rows = run(args, text, path, settings_of(args, text))
    except (ValueError, OSError) as error:
        print(f"gate_bytes: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


def run(args: argparse.Namespace, text: str, path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row, those on record taken from there; the record is rewritten after each."""
    known = [] if args.again else measured(path, settings)
    context = max(args.window, TOKENS)
    engine = load_engine(RunConfig(model=args.model, method="dense", context=context, precision="float32"))
    pieces = spread_windows(engine, text, args.window, args.windows)
    with engine.computing(), torch.inference_mode():
        layers = calibrated(engine)
        rows: list[dict[str, Any]] = []
        for variant in (None, *VARIANTS):
            wanted = None if variant is None else json.loads(json.dumps(asdict(variant)))
            row = next((row for row in known if row["variant"] == wanted), None)
            rows.append(row or json.loads(json.dumps(measure(engine, layers, variant, pieces))))
            print(f"{len(rows)} of {len(VARIANTS) + 1} rows: {fmean(rows[-1]['nll_by_window']):.4f}", file=sys.stderr)
            write_json(path, settings | {"rows": [*rows, *(row for row in known if row not in rows)]})
    return rows


def measured(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run under the same settings."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return record["rows"] if all(record.get(name) == value for name, value in settings.items()) else []


if __name__ == "__main__":
    sys.exit(main())
