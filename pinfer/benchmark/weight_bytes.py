"""How many bytes of weights one decode step needs, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass

from pinfer.formats import ModelFile
from pinfer.formats.model_config import model_config
from pinfer.formats.powerinfer import is_predictor

_FFN = ("ffn_gate", "ffn_up", "ffn_down", "ffn_down_t")
WHOLE_GATE = ("exact", "gate_threshold")  # methods that compute every neuron's gate to predict with


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a model's matrices as they lie in the file.

    gate is what predictors read (the up matrix of an ungated FFN), rest the FFN's other matrices,
    other all else: attention, the head, a router of experts. An embedding that is not the head as well
    does not count, nor do learned positions: a step reads one row of them. Of experts those count that
    a token is sent to.
    """

    other: int
    gate: int
    rest: int

    @classmethod
    def of(cls, file: ModelFile) -> StepBytes:
        experts = model_config(file).experts
        matrices = {
            name: info.nbytes for name, info in file.tensors.items() if len(info.shape) > 1 and not is_predictor(name)
        }
        matrices.pop("position_embd.weight", None)
        if "output.weight" in matrices:
            matrices.pop("token_embd.weight", None)
        if experts is not None:
            stacked = (name for name, info in file.tensors.items() if len(info.shape) == 3)
            matrices |= {name: matrices[name] * experts.used // experts.count for name in stacked}
        parts = {name: name.split(".")[-2].removesuffix("_exps") for name in matrices}
        predicting = "ffn_gate" if "ffn_gate" in parts.values() else "ffn_up"
        gate = sum(size for name, size in matrices.items() if parts[name] == predicting)
        ffn = sum(size for name, size in matrices.items() if parts[name] in _FFN)
        return cls(sum(matrices.values()) - ffn, gate, ffn - gate)

    @property
    def dense(self) -> int:
        """What a step of the whole model reads."""
        return self.other + self.gate + self.rest

    def needed(self, method: str, density: float, predictor: int = 0) -> float:
        """An estimate of what a step of `method` needs: the FFN scaled by density, and what it predicts with.

        That is the whole gate, or `predictor` bytes of a predictor's own weights. It goes by the file's
        types: the sparse path's own copy of `down` may be larger.
        """
        if method == "dense":
            return self.dense
        if method in WHOLE_GATE:
            return self.other + self.gate + density * self.rest
        return self.other + predictor + density * (self.gate + self.rest)
