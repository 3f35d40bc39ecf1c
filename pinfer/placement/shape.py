"""What a model is to placement: bytes, layer by layer, stored and read at each token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerShape:
    """One layer's bytes as they lie in memory while it runs.

    attention_bytes:    its matrices and the layer's norms.
    kv_position_bytes:  keys and values of one position.
    kv_positions:       the most positions it keeps (a sliding window), None: the context.
    n_neurons:          N.
    neuron_bytes:       one neuron's rows of gate, up and down, and of the predictor.
    always_bytes:       of those, what every token reads: a predictor's rows, or the gate's where it is what predicts.
    active_bytes:       of those, what a token reads beside them where the neuron is named.
    shared_bytes:       the predictor's part that belongs to no neuron (low_rank's first factor): stored and read on
                        every device that predicts.
    compensation_bytes: a matrix that stands for neurons left out: on one device, read at every token.
    own_predictor:      whether the predictor has rows of its own (`always_bytes`), so that one device may predict for
                        both; False where it reads the gate.
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

    def __post_init__(self) -> None:
        """ValueError for a negative number, or neurons that read more than they have."""
        for name, value in vars(self).items():
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if self.always_bytes + self.active_bytes > self.neuron_bytes:
            raise ValueError(
                f"a neuron reads {self.always_bytes} + {self.active_bytes} bytes, more than the {self.neuron_bytes} it has"
            )

    def kv_bytes(self, positions: int) -> int:
        """Keys and values of so many positions, as far as they are kept."""
        kept = positions if self.kv_positions is None else min(positions, self.kv_positions)
        return self.kv_position_bytes * kept


@dataclass(frozen=True)
class ModelShape:
    """A model's layers in order, and what surrounds them.

    head_bytes: the head and the last norm, read at every token. embedding_bytes: 0 where the head serves as it;
    a token reads one row of it, so it stays on the CPU. d_model: D. vocab_size: of the logits.
    """

    name: str
    layers: tuple[LayerShape, ...]
    head_bytes: int
    embedding_bytes: int
    d_model: int
    vocab_size: int
