"""What a long run over a model's layers tells of itself."""

from __future__ import annotations


class Watcher:
    """Is told where a run stands; the base class keeps silent."""

    def begin(self, n_layers: int, n_sequences: int, layers_done: int) -> None:
        """The walk starts after so many layers."""

    def sequence(self) -> None:
        """One more sequence has passed the present layer."""

    def note(self, text: str) -> None:
        """A remark, one line."""
