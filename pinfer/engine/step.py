"""The decode step: one token in, logits out, without Python or torch between the kernels where that can be.

On the CPU that is a program of the core, on a GPU a CUDA graph (see pinfer.overlap.capture; it awaits its first run).
"""

from __future__ import annotations

import torch

from pinfer.kernels.cpp import core_available
from pinfer.kernels.cpp import program as programs
from pinfer.kernels.cpp.binding import StepFailed
from pinfer.kernels.cpp.program import NotRecordable, Program
from pinfer.kernels.registry import settings
from pinfer.models import KVCache, Transformer
from pinfer.overlap import Capture, Lane, captured
from pinfer.sparsify import activities


class DecodeStep:
    """Runs a model on single tokens after a cache's. The first call records a program, later ones repeat it.

    The second call does both, the program and the plain model, and keeps the program only if they agree
    bit for bit. Lanes that can step down are asked to where it does not, or where it fails, before that; `remarks`
    tells of it. A model that computes outside of the registry's ops, or has forward hooks, is run as
    usual each time; `reason` then says why. Another backend, precision or number of threads records anew.
    What a recorded model reads must be changed in place: tensors and modules that are replaced later are
    not seen by this step, but by the next. Python between its ops is not run again: branches, counters
    and prints stay as they were while recording. A module whose branches follow from values says `data_dependent = True`:
    the model is then run as usual. `record` False runs the model as usual throughout.
    """

    def __init__(self, model: Transformer, cache: KVCache, *, record: bool = True) -> None:
        self._model, self._cache = model, cache
        self._device = model.device
        self._token = torch.zeros(1, dtype=torch.int64, device=model.embedding.device)
        self._embedded = torch.empty(0)  # float32 [1, D], what a graph reads: the embedding may be on the CPU
        self._program: Program | Capture | None = None
        self._recorded_under: object = None
        self._proven = False
        self._logits = torch.empty(0)
        self._opens_dense = any(getattr(module, "opens_dense", False) for module in model.modules())
        self.remarks: list[str] = []
        self.reason = None if core_available() else "there is no C++ core"
        if not record:
            self.reason = "recording is switched off"
        for rope in model.ropes:
            rope.reserve(cache.context)  # its table must not move while a program reads it

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
        if length == 0 and self._opens_dense:
            logits = self._plain(opens=True)
        elif self._program is None or self._recorded_under != _conditions():
            logits = self._record() if self.reason is None else self._plain()
        elif not self._proven:
            logits = self._prove(self._program)
        else:
            logits = self._repeated(self._program)
        cache.length = length + 1
        return logits

    def _plain(self, opens: bool = False) -> torch.Tensor:
        return self._model.compute(self._token, self._cache, opens=opens)

    def _record(self) -> torch.Tensor:
        counted = _counts(self._model)
        self._program, self._proven = None, False
        try:
            if any(module._forward_hooks or module._forward_pre_hooks for module in self._model.modules()):
                raise NotRecordable("the model has forward hooks, which a program would not call")
            if any(getattr(module, "crosses", False) for module in self._model.modules()):
                raise NotRecordable("an FFN computes on another device than its layer's attention")
            if any(getattr(module, "data_dependent", False) for module in self._model.modules()):
                raise NotRecordable("a module chooses what it computes by values, such as experts by their router's")
            if not all(lane.recordable for lane in self._lanes()):
                raise NotRecordable("cold neurons are computed by a lane that is not repeated as a whole")
            if self._device.type == "cuda":
                return self._capture()
            with programs.record(torch.get_num_threads()) as program:
                self._logits = self._plain()
        except NotRecordable as problem:
            self.reason = str(problem)
            _restore(counted)  # layers before the problem have counted this token
            return self._plain()
        self._program, self._recorded_under = program, _conditions()
        return self._logits

    def _capture(self) -> torch.Tensor:
        """Run as usual, for Triton to compile what it has not, and capture the same without running it."""
        logits = self._plain()
        self._embedded = self._model.embedded(self._token, self._cache.position).to(self._device)
        try:
            with captured(self._device) as capture:
                self._logits = self._model.compute_embedded(self._embedded, self._cache)
        except RuntimeError as problem:  # such as layers that are on the CPU
            raise NotRecordable(f"the step cannot be captured: {problem}") from problem
        self._program, self._recorded_under = capture, _conditions()
        return logits

    def _prove(self, program: Program | Capture) -> torch.Tensor:
        """Both ways, on a token other than the recorded one's place: what was missed in recording shows here."""
        counted = _counts(self._model)
        problem = "the recorded step does not repeat what the model computes"
        try:
            self._repeat(program)
        except StepFailed as failure:
            if not self._step_down(str(failure)):
                raise
            _restore(counted)
            return self._plain()
        _restore(counted)
        logits = self._plain()
        if torch.equal(logits, self._logits):
            self._proven = True
        elif not self._step_down(problem):
            self._program, self.reason = None, problem
        return logits

    def _repeated(self, program: Program | Capture) -> torch.Tensor:
        """A step that is proven. Where it fails all the same, as after a stop of the whole process, and a lane can step
        down, the token is computed as usual; layers that it had reached have then counted it twice."""
        try:
            self._repeat(program)
        except StepFailed as failure:
            if not self._step_down(str(failure)):
                raise
            return self._plain()
        return self._logits

    def _repeat(self, program: Program | Capture) -> None:
        if isinstance(program, Capture):
            self._embedded.copy_(self._model.embedded(self._token, self._cache.position))
        program.run()

    def _step_down(self, problem: str) -> bool:
        """Whether a lane can go on in another way, for which the step is recorded anew."""
        weaker = [remark for lane in self._lanes() if (remark := lane.step_down())]
        if weaker:
            self._program = None
            self.remarks += [f"{problem}: {remark}" for remark in weaker]
        return bool(weaker)

    def _lanes(self) -> list[Lane]:
        """Those of the model, each once."""
        lanes = (getattr(module, "lane", None) for module in self._model.modules())
        return list({id(lane): lane for lane in lanes if isinstance(lane, Lane)}.values())


def _conditions() -> tuple[object, ...]:
    return (*settings(), torch.get_num_threads())


def _counts(model: Transformer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(activity.totals, activity.totals.clone()) for activity in activities(model)]


def _restore(counted: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for totals, before in counted:
        totals.copy_(before)
