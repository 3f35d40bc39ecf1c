"""What a model will take in memory, before any of it is loaded: its file's types, and its predictors'."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from pinfer.config import Method, ModelConfig
from pinfer.formats import ModelFile
from pinfer.kernels.transpose import transposed_type
from pinfer.placement import LayerShape, ModelShape
from pinfer.placement.shape import FLOAT_BYTES, row_bytes
from pinfer.predictors import MLP, LowRank, Predictor, SignBits, WeightedThreshold
from pinfer.quant import F16, Q5_0, Layout, QuantTensor

READS_ALL: tuple[Method, ...] = ("dense", "input_threshold")  # no neuron is split off, or skipped as a whole
READS_GATE: tuple[Method, ...] = ("exact", "gate_threshold", "weighted_threshold", "shift_threshold")


class PredictorBytes(NamedTuple):
    """One layer's: of each neuron, of none, of what stands for neurons left out; `own`: it has rows of its own."""

    neuron: int = 0
    shared: int = 0
    compensation: int = 0
    own: bool = False


def model_shape(
    file: ModelFile,
    config: ModelConfig,
    method: Method,
    predictors: Sequence[Predictor] | None = None,
    *,
    rearranged: bool = True,
) -> ModelShape:
    """The bytes of a model under a resolved method, layer by layer, as they will lie in memory; reads no weights.

    predictors: one a layer, of a solved directory; low_rank and sign_bits need them, for other methods their sizes
    are known without. rearranged: whether the GPU has rows in planes, a little longer, as Triton reads them; without
    it both devices have them as in the file, as an emulated one does. Sliding layers keep the whole context's keys
    and values, which is what a cache reserves. ValueError where predictors are missing, and for a model with experts.
    """
    config.without_experts("a plan")
    if predictors is None and method in ("low_rank", "sign_bits", "mlp"):
        raise ValueError(f"the size of {method} predictors is not known before they are made: name a solved directory")

    def layer(number: int, layout: Layout) -> LayerShape:
        predictor = _unfitted(method, config, layout) if predictors is None else _measured(predictors[number], layout)
        return _layer(file, config, method, number, predictor, layout)

    layers = []
    for number in range(config.n_layers):
        on_gpu = layer(number, "planes") if rearranged else None
        layers.append(dataclasses.replace(layer(number, "blocks"), on_gpu=on_gpu))
    output = "output.weight" if file.has("output.weight") else "token_embd.weight"
    norm = sum(_bytes(file, name, "blocks") for name in file.tensors if name.startswith("output_norm."))
    return ModelShape(
        name=config.name,
        layers=tuple(layers),
        head_bytes=_matrix_bytes(file, output, "blocks") + norm,
        embedding_bytes=_embedding_bytes(file, config),
        d_model=config.d_model,
        vocab_size=config.vocab_size,
        gpu_head_bytes=_matrix_bytes(file, output, "planes") + norm if rearranged else None,
        rope_position_bytes=sum(FLOAT_BYTES * one.dim for one in config.ropes),
    )


def _embedding_bytes(file: ModelFile, config: ModelConfig) -> int:
    """Of the embedding where it is not the head as well, and of learned positions: what a token reads one row of."""
    tokens = _matrix_bytes(file, "token_embd.weight", "blocks") if file.has("output.weight") else 0
    if config.rope is not None:
        return tokens
    positions = file.info("position_embd.weight")
    return tokens + config.context_length * row_bytes(positions.type, positions.columns, "blocks")


def _layer(
    file: ModelFile, config: ModelConfig, method: Method, number: int, predictor: PredictorBytes, layout: Layout
) -> LayerShape:
    prefix = f"blk.{number}."
    others = [name for name in file.tensors if name.startswith(prefix) and not _is_ffn(name)]
    gate, rows, left = _ffn_rows(file, config, method, prefix, layout)
    neuron = gate + rows + predictor.neuron
    read = gate + rows if method in READS_ALL else gate if method in READS_GATE else 0
    return LayerShape(
        attention_bytes=sum(_bytes(file, name, layout) for name in others) + left,
        kv_position_bytes=2 * config.n_kv_heads * config.head_dim * FLOAT_BYTES,
        kv_positions=None,
        n_neurons=config.d_ffn,
        neuron_bytes=neuron,
        always_bytes=read + predictor.neuron,
        active_bytes=gate + rows - read,
        shared_bytes=predictor.shared,
        compensation_bytes=predictor.compensation + _optional_bytes(file, f"{prefix}ffn_down.bias"),
        own_predictor=predictor.own,
        kv_window=config.sliding_window if config.is_sliding(number) else None,
    )


def _ffn_rows(
    file: ModelFile, config: ModelConfig, method: Method, prefix: str, layout: Layout
) -> tuple[int, int, int]:
    """Bytes of a neuron's gate (or up, where there is none), of its other rows, and what neurons cannot share evenly.

    Where no neuron is split off, matrices lie otherwise than a row a neuron: a neuron has its share of them. A bias of
    the gate counts with it.
    """
    names = [f"{prefix}ffn_{name}.weight" for name in (("gate", "up") if config.gated else ("up",))]
    n, d = config.d_ffn, config.d_model
    by_neuron = file.has(f"{prefix}ffn_down_t.weight")
    down = file.info(f"{prefix}ffn_down{'_t' if by_neuron else ''}.weight").type
    turned = down if by_neuron else transposed_type(down, d)
    biases = _optional_bytes(file, names[0].replace(".weight", ".bias"))
    if method not in READS_ALL:
        rows = [row_bytes(file.info(name).type, d, layout) for name in names]
        return rows[0] + biases // n, sum(rows[1:]) + row_bytes(turned, d, layout), 0
    if method == "dense":
        stored = transposed_type(down, n) if by_neuron else down
        whole = [*(_matrix_bytes(file, name, layout) for name in names), d * row_bytes(stored, n, layout)]
    else:
        by_input = [d * row_bytes(transposed_type(file.info(name).type, n), n, layout) for name in names]
        whole = [*by_input, n * row_bytes(turned, d, layout)]
    whole[0] += biases
    return whole[0] // n, sum(whole) // n - whole[0] // n, sum(whole) % n


def _unfitted(method: Method, config: ModelConfig, layout: Layout) -> PredictorBytes:
    """What a method's predictor has where all of it follows from the model."""
    if method in READS_ALL:
        return PredictorBytes(shared=4 * FLOAT_BYTES if method == "input_threshold" else 0)
    if method == "weighted_threshold":
        return PredictorBytes(neuron=FLOAT_BYTES)
    if method == "shift_threshold":
        kind = F16 if config.d_model % Q5_0.block_size else Q5_0
        return PredictorBytes(2 * FLOAT_BYTES, 0, config.d_model * row_bytes(kind, config.d_model, layout))
    return PredictorBytes(shared=FLOAT_BYTES)


def _measured(predictor: Predictor, layout: Layout) -> PredictorBytes:
    """What one predictor has beside the model's own matrices."""
    threshold, shift = predictor.threshold, getattr(predictor, "shift", None)
    vectors = FLOAT_BYTES if threshold.numel() > 1 or isinstance(predictor, WeightedThreshold) else 0
    vectors += 0 if shift is None else FLOAT_BYTES
    shared = 0 if vectors else FLOAT_BYTES
    matrix = predictor.compensation
    compensation = 0 if matrix is None else _weight_bytes(matrix, layout)
    if isinstance(predictor, (LowRank, MLP)):
        row = row_bytes(predictor.second.type, predictor.second.columns, layout)
        return PredictorBytes(row + vectors, _weight_bytes(predictor.first, layout) + shared, compensation, True)
    if isinstance(predictor, SignBits):
        return PredictorBytes(predictor.signs.shape[1] * predictor.signs.element_size(), shared, compensation, True)
    return PredictorBytes(vectors, shared, compensation)


def _weight_bytes(weight: QuantTensor, layout: Layout) -> int:
    return weight.rows * row_bytes(weight.type, weight.columns, layout)


def _matrix_bytes(file: ModelFile, name: str, layout: Layout) -> int:
    info = file.info(name)
    rows, columns = info.shape
    return rows * row_bytes(info.type, columns, layout)


def _bytes(file: ModelFile, name: str, layout: Layout) -> int:
    """Of a matrix as it is, of a vector as float32."""
    shape = file.info(name).shape
    return _matrix_bytes(file, name, layout) if len(shape) == 2 else FLOAT_BYTES * shape[0]


def _optional_bytes(file: ModelFile, name: str) -> int:
    return _bytes(file, name, "blocks") if file.has(name) else 0


def _is_ffn(name: str) -> bool:
    return name.split(".")[-2] in ("ffn_gate", "ffn_up", "ffn_down", "ffn_down_t", "fc1", "fc2")
