"""The FFN of a layer as its file has it: one, or a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from pinfer.config import ExpertsConfig, ModelConfig
from pinfer.ffn import DenseFFN
from pinfer.kernels.ops import quant_matmul
from pinfer.models.layers import optional_vector
from pinfer.models.weights import WeightSource
from pinfer.neuron_major_ffn import NeuronMajorFFN
from pinfer.quant import QuantTensor


class Experts(nn.Module):
    """A mixture of experts: the FFNs that the router rates highest for a token, weighed by its ratings.

    router: QuantTensor [experts, D]. The FFNs are interchangeable as a layer's one FFN is, and each computes the
    tokens that are sent to it.
    """

    data_dependent = True  # which expert computes follows from values, so that no recorded step repeats it

    def __init__(self, router: QuantTensor, ffns: list[DenseFFN], config: ExpertsConfig) -> None:
        super().__init__()
        self.router, self.config = router, config
        self.ffns = nn.ModuleList(ffns)

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        """x, residual: float32 [T, D]; returns float32 [T, D]."""
        ratings, chosen = self.routed(x)
        y = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            first = opens and int(tokens[0]) == 0
            out = self.ffns[expert](x[tokens], residual=residual[tokens], opens=first)
            y.index_add_(0, tokens, out * ratings[tokens, place, None])
        return y

    def routed(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Per token what its experts weigh, float32 [T, used], and their numbers, int64 [T, used]."""
        ratings, chosen = quant_matmul(x, self.router).softmax(-1).topk(self.config.used)
        if self.config.normalised:
            ratings = ratings / ratings.sum(-1, keepdim=True)
        return ratings * self.config.scale, chosen


def single_ffns(ffn: nn.Module) -> list[nn.Module]:
    """The FFNs of one layer: its one, or its experts'."""
    return list(ffn.ffns) if isinstance(ffn, Experts) else [ffn]


def build_ffn(weights: WeightSource, config: ModelConfig, prefix: str) -> nn.Module:
    """The dense FFN of layer `prefix` ("blk.3."): a DenseFFN, or Experts of them."""
    if config.experts is None:
        return _dense(weights, config, prefix)
    router = weights.tensor(f"{prefix}ffn_gate_inp.weight")
    return Experts(router, list(_experts(weights, config, prefix)), config.experts)


def _dense(weights: WeightSource, config: ModelConfig, prefix: str) -> DenseFFN:
    """Gated or not: the up matrix of an ungated FFN stands as its gate."""
    gate = "ffn_gate" if config.gated else "ffn_up"
    by_neuron = weights.has(f"{prefix}ffn_down_t.weight")
    return (NeuronMajorFFN if by_neuron else DenseFFN)(
        weights.tensor(f"{prefix}{gate}.weight"),
        weights.tensor(f"{prefix}ffn_up.weight") if config.gated else None,
        weights.tensor(f"{prefix}{'ffn_down_t' if by_neuron else 'ffn_down'}.weight"),
        config.activation,
        optional_vector(weights, f"{prefix}{gate}.bias"),
        optional_vector(weights, f"{prefix}ffn_down.bias"),
        config.cutoff,
    )


def _experts(weights: WeightSource, config: ModelConfig, prefix: str) -> Iterator[DenseFFN]:
    """Each expert over its own of the stacked matrices."""
    experts = cast(ExpertsConfig, config.experts)
    for expert in range(experts.count):
        gate, up, down = (weights.expert(f"{prefix}ffn_{part}_exps.weight", expert) for part in ("gate", "up", "down"))
        yield DenseFFN(gate, up, down, config.activation, cutoff=config.cutoff)
