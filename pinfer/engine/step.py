"""The decode step: one token in, logits out, without Python or torch between the kernels where that can be."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp import core_available
from pinfer.kernels.cpp.program import NotRecordable, Program, record
from pinfer.models import KVCache, Transformer
from pinfer.sparsify import activities


class DecodeStep:
    """Runs a model on single tokens after a cache's. The first call records a program, later ones repeat it.

    A model that computes outside of the registry's ops is run as usual each time; `reason` then says why.
    Calls belong under the same backend and int8 settings and the same number of threads.
    """

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._token = torch.zeros(1, dtype=torch.int64)
        self._program: Program | None = None
        self._logits: torch.Tensor | None = None
        self.reason: str | None = None if core_available() else "there is no C++ core"

    @property
    def recorded(self) -> bool:
        """Whether calls repeat a program."""
        return self._program is not None

    def __call__(self, token: int) -> torch.Tensor:
        """Logits float32 [1, V] after `token`; the next call overwrites them. ValueError past the cache or the vocabulary."""
        length, cache = self._cache.length, self._cache
        if length >= cache.context:
            raise ValueError(f"{length + 1} tokens do not fit the context of {cache.context}")
        if not 0 <= token < self._model.embedding.rows:
            raise ValueError(f"token {token} is outside the vocabulary of {self._model.embedding.rows}")
        self._token.fill_(token)
        if self._program is not None and self._logits is not None:
            self._program.run()
            cache.length = length + 1
            return self._logits
        return self._first()

    def _first(self) -> torch.Tensor:
        if self.reason is None:
            for rope in self._model.ropes:
                rope.reserve(self._cache.context)  # the table must not move later
            counted = [(activity, activity.totals.clone()) for activity in activities(self._model)]
            try:
                with record(torch.get_num_threads()) as program:
                    self._logits = self._model.compute(self._token, self._cache)
            except NotRecordable as problem:
                self.reason = str(problem)
                for activity, totals in counted:  # layers before the problem have counted this token
                    activity.totals.copy_(totals)
            else:
                self._program = program
                self._cache.length += 1
                return self._logits
        return self._model(self._token, self._cache)
