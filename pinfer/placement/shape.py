"""What a model is to placement: bytes, layer by layer, stored and read at each token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pinfer.placement.plan import Place
from pinfer.quant import F32, Q4_0, Q5_0, Layout, QuantType, planes_row_bytes

FLOAT_BYTES = F32.block_bytes


@dataclass(frozen=True)
class LayerShape:
    """One layer's bytes as they lie in memory while it runs.

    attention_bytes:    its matrices and the layer's norms.
    kv_position_bytes:  keys and values of one position.
    kv_positions:       the most positions it keeps, None: the context.
    n_neurons:          N.
    neuron_bytes:       one neuron's rows of gate, up and down, and of the predictor.
    always_bytes:       of those, what every token reads: a predictor's rows, or the gate's where it is what predicts.
    active_bytes:       of those, what a token reads beside them where the neuron is named.
    shared_bytes:       the predictor's part that belongs to no neuron (low_rank's first factor): stored and read on
                        every device that predicts.
    compensation_bytes: a matrix that stands for neurons left out: on one device, read at every token.
    own_predictor:      whether the predictor has rows of its own (`always_bytes`), so that one device may predict for
                        both; False where it reads the gate.
    kv_window:          the most positions that a token attends to (a sliding window), None: all that are kept.
    on_gpu:             the same layer's bytes on a GPU, where rows are rearranged for wide loads and padded; None
                        where they are the same.
    """

    attention_bytes: int
    kv_position_bytes: int
    kv_positions: int | None
    n_neurons: int
    neuron_bytes: int
    always_bytes: int
    active_bytes: int
    shared_bytes: int = 0
    compensation_bytes: int = 0
    own_predictor: bool = False
    kv_window: int | None = None
    on_gpu: LayerShape | None = None

    def __post_init__(self) -> None:
        """ValueError for a negative number, or neurons that read more than they have."""
        for name, value in vars(self).items():
            if name != "on_gpu" and value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if self.always_bytes + self.active_bytes > self.neuron_bytes:
            raise ValueError(
                f"a neuron reads {self.always_bytes} + {self.active_bytes} bytes, more than the {self.neuron_bytes} it has"
            )
        other = self.on_gpu
        if other and (other.n_neurons, other.own_predictor) != (self.n_neurons, self.own_predictor):
            raise ValueError(f"{other.n_neurons} neurons on the GPU, {self.n_neurons} on the CPU")

    def on(self, place: Place) -> LayerShape:
        """The bytes as they lie on that device."""
        return self.on_gpu if place == "gpu" and self.on_gpu is not None else self

    def kv_bytes(self, positions: int) -> int:
        """Memory for keys and values of so many positions, as far as they are kept."""
        return self.kv_position_bytes * _least(positions, self.kv_positions)

    def kv_read_bytes(self, positions: int) -> int:
        """Keys and values that a token reads when so many positions are filled."""
        return self.kv_position_bytes * _least(positions, self.kv_positions, self.kv_window)


@dataclass(frozen=True)
class ModelShape:
    """A model's layers in order, and what surrounds them.

    head_bytes: the head and the last norm, read at every token. embedding_bytes: with learned positions; of the
    embedding 0 where the head serves as it. A token reads one row of either, so they stay on the CPU. d_model: D. vocab_size: of the logits.
    gpu_head_bytes: the head as it lies on a GPU; None where that is the same. rope_position_bytes: of one position in
    all tables of the rotary embedding; 0 leaves them to the margin.
    """

    name: str
    layers: tuple[LayerShape, ...]
    head_bytes: int
    embedding_bytes: int
    d_model: int
    vocab_size: int
    gpu_head_bytes: int | None = None
    rope_position_bytes: int = 0

    def head(self, place: Place) -> int:
        """Bytes of the head as it lies on that device."""
        return self.gpu_head_bytes if place == "gpu" and self.gpu_head_bytes is not None else self.head_bytes


class Matrix(Protocol):
    """What placement asks of a weight; a QuantTensor is one."""

    @property
    def type(self) -> QuantType: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...


@dataclass(frozen=True)
class PredictorShape:
    """What a predictor stores and reads.

    everything:   nothing is predicted, every token reads every neuron (dense).
    rows:         its own weights of a neuron, as rows of (type, columns); none where it reads the gate.
    row_bytes:    other bytes of its own per neuron that a prediction reads: thresholds, sign bits.
    shared:       matrices that belong to no neuron; shared_bytes: other bytes of that kind.
    compensation: a matrix that stands for the neurons left out.
    """

    everything: bool = False
    rows: tuple[tuple[QuantType, int], ...] = ()
    row_bytes: int = 0
    shared: tuple[tuple[QuantType, int, int], ...] = ()
    shared_bytes: int = 0
    compensation: tuple[QuantType, int, int] | None = None
    reads_gate: bool = False

    @classmethod
    def dense(cls) -> PredictorShape:
        return cls(everything=True)

    @classmethod
    def of_gate(cls, compensated_width: int = 0) -> PredictorShape:
        """exact and the thresholds: the whole gate is read, with a float32 threshold a neuron; `shift_threshold` has a
        compensation matrix Q5_0 [D, D] beside it."""
        width = compensated_width
        return cls(row_bytes=FLOAT_BYTES, reads_gate=True, compensation=(Q5_0, width, width) if width else None)

    @classmethod
    def low_rank(cls, rank: int, width: int, kind: QuantType = Q4_0) -> PredictorShape:
        """first [R, D], which belongs to no neuron, and second [N, R], a threshold a neuron."""
        return cls(rows=((kind, rank),), row_bytes=FLOAT_BYTES, shared=((kind, rank, width),))

    @classmethod
    def sign_bits(cls, width: int) -> PredictorShape:
        """A bit a weight of the gate, in words of 32."""
        return cls(row_bytes=4 * -(-width // 32))

    @classmethod
    def of_bytes(cls, layer_bytes: int, n_neurons: int) -> PredictorShape:
        """So many bytes a layer, whatever they are: spread over neurons, what is left over belongs to none."""
        return cls(row_bytes=layer_bytes // n_neurons, shared_bytes=layer_bytes % n_neurons)


def layer_shape(
    attention: Iterable[Matrix],
    norm_values: int,
    ffn: Sequence[Matrix],
    predictor: PredictorShape,
    kv_position_bytes: int,
    *,
    kv_positions: int | None = None,
    kv_window: int | None = None,
    rearranged: bool = True,
) -> LayerShape:
    """The bytes of a layer.

    attention: its matrices. norm_values: float32 numbers of its norms. ffn: gate, up where there is one, and down, the
    rows of each being neurons as they lie in memory. rearranged: whether a GPU has rows in planes (`quant.Layout`).
    """
    attention = tuple(attention)

    def lying(layout: Layout, on_gpu: LayerShape | None) -> LayerShape:
        rows = [row_bytes(matrix.type, matrix.columns, layout) for matrix in ffn]
        own = predictor.row_bytes + sum(row_bytes(kind, columns, layout) for kind, columns in predictor.rows)
        read = sum(rows) if predictor.everything else rows[0] if predictor.reads_gate else 0
        shared = sum(_bytes(kind, count, columns, layout) for kind, count, columns in predictor.shared)
        return LayerShape(
            attention_bytes=sum(_bytes(one.type, one.rows, one.columns, layout) for one in attention)
            + FLOAT_BYTES * norm_values,
            kv_position_bytes=kv_position_bytes,
            kv_positions=kv_positions,
            n_neurons=ffn[0].rows,
            neuron_bytes=sum(rows) + own,
            always_bytes=read + own,
            active_bytes=sum(rows) - read,
            shared_bytes=shared + predictor.shared_bytes,
            compensation_bytes=_bytes(*predictor.compensation, layout) if predictor.compensation else 0,
            own_predictor=not (predictor.everything or predictor.reads_gate),
            kv_window=kv_window,
            on_gpu=on_gpu,
        )

    return lying("blocks", lying("planes", None) if rearranged else None)


def row_bytes(kind: QuantType, columns: int, layout: Layout) -> int:
    """Bytes of a row of `columns` weights in that layout."""
    return planes_row_bytes(kind, columns) if layout == "planes" else kind.row_bytes(columns)


def _bytes(kind: QuantType, rows: int, columns: int, layout: Layout) -> int:
    return rows * row_bytes(kind, columns, layout)


def _least(*limits: int | None) -> int:
    return min(limit for limit in limits if limit is not None)
