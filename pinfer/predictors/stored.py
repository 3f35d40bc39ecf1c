"""Fitted predictors as named tensors and plain data, and back: what a file keeps of them.

Matrices that the model has itself (the gate) are not kept; `unpack` takes them from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from pinfer.predictors.base import Predictor, PredictorQuality
from pinfer.predictors.cuts import Cuts
from pinfer.predictors.gate_threshold import GateThreshold
from pinfer.predictors.low_rank import LowRank
from pinfer.predictors.sign_bits import SignBits
from pinfer.predictors.weighted_threshold import WeightedThreshold
from pinfer.quant import BY_NAME, QuantTensor

Tensors = dict[str, torch.Tensor]


class Packed(NamedTuple):
    """tensors: "blk.3.first" and so on; layers: plain data for JSON, one mapping a layer."""

    tensors: Tensors
    layers: list[dict[str, Any]]


class GateOf(NamedTuple):
    """What a layer's predictor reads of the model: gate QuantTensor [N, D], the activation's name and its cutoff.

    gate_bias: float32 [N] or None, added to the gate product.
    """

    gate: QuantTensor
    activation: str
    gate_bias: torch.Tensor | None = None
    cutoff: float = 0.0

    @property
    def extras(self) -> dict[str, Any]:
        """The bias and the cutoff, as predictors take them."""
        return {"gate_bias": self.gate_bias, "cutoff": self.cutoff}


def pack(predictors: Sequence[Predictor]) -> Packed:
    """The predictors of all layers; ValueError for one that is not fitted but made of the model alone (exact)."""
    tensors: Tensors = {}
    layers = []
    for number, predictor in enumerate(predictors):
        named, rest = _parts(predictor)
        if predictor.cuts is not None:
            named |= predictor.cuts.tensors()
        rest["density"] = predictor.density
        rest["quality"] = None if predictor.quality is None else asdict(predictor.quality)
        tensors |= {f"blk.{number}.{name}": tensor for name, tensor in named.items()}
        layers.append(rest)
    return Packed(tensors, layers)


def unpack(packed: Packed, gates: Sequence[GateOf]) -> list[Predictor]:
    """The inverse of `pack`, for a model with those gates. ValueError, naming the layer, for what does not fit them."""
    if len(packed.layers) != len(gates):
        raise ValueError(f"predictors of {len(packed.layers)} layers, for a model of {len(gates)}")
    found = []
    for number, (rest, of_model) in enumerate(zip(packed.layers, gates, strict=True)):
        prefix = f"blk.{number}."
        named = {name[len(prefix) :]: one for name, one in packed.tensors.items() if name.startswith(prefix)}
        try:
            predictor = _BUILDERS[rest["kind"]](named, rest, of_model)
            if "cuts" in named:
                predictor.cuts = Cuts.from_tensors(named, of_model.gate.rows)
            predictor.density = None if rest["density"] is None else float(rest["density"])
            predictor.quality = None if rest["quality"] is None else PredictorQuality(**rest["quality"])
        except (KeyError, TypeError, ValueError) as problem:
            raise ValueError(f"the predictor of layer {number} does not fit this model: {problem}") from problem
        found.append(predictor)
    return found


# Tensors with an entry, or a row, a neuron; the others belong to the layer.
_BY_NEURON = ("threshold", "cut_base", "cut_scale", "shift", "signs", "second")


def renumbered(packed: Packed, orders: Sequence[torch.Tensor]) -> Packed:
    """The same for a model whose neuron i is what neuron orders[layer][i] was: int64 [N] a layer."""
    tensors = {}
    for name, one in packed.tensors.items():
        _, layer, short = name.split(".")
        order = orders[int(layer)]
        tensors[name] = one[order] if short in _BY_NEURON and len(one) == len(order) else one
    return Packed(tensors, packed.layers)


def _parts(predictor: Predictor) -> tuple[Tensors, dict[str, Any]]:
    if isinstance(predictor, GateThreshold):
        return {"threshold": predictor.threshold}, {"kind": "gate_threshold"}
    if isinstance(predictor, SignBits):
        return {"signs": predictor.signs, "threshold": predictor.threshold}, {"kind": "sign_bits"}
    if isinstance(predictor, WeightedThreshold):
        tensors, rest = {"threshold": predictor.threshold}, {"kind": "weighted_threshold", "shifted": False}
        if predictor.shift is not None and predictor.compensation is not None:
            tensors["shift"], rest["shifted"] = predictor.shift, True
            _put(tensors, rest, "compensation", predictor.compensation)
        return tensors, rest
    if isinstance(predictor, LowRank):
        tensors, rest = {"threshold": predictor.threshold}, {"kind": "low_rank"}
        _put(tensors, rest, "first", predictor.first)
        _put(tensors, rest, "second", predictor.second)
        return tensors, rest | {"by_magnitude": predictor.by_magnitude, "biased": predictor.gate_bias is not None}
    raise ValueError(f"{type(predictor).__name__} is made of the model itself: there is nothing to keep")


def _put(tensors: Tensors, rest: dict[str, Any], name: str, weight: QuantTensor) -> None:
    if weight.layout != "blocks":
        raise ValueError(f"{name} is laid out for a GPU; a file keeps blocks")
    tensors[name] = weight.blocks
    rest[f"{name}_type"], rest[f"{name}_columns"] = weight.type.name, weight.columns


def _weight(tensors: Tensors, rest: Mapping[str, Any], name: str, rows: int, columns: int) -> QuantTensor:
    """The matrix of that name; ValueError unless it is [rows, columns]."""
    weight = QuantTensor(tensors[name], BY_NAME[rest[f"{name}_type"]], int(rest[f"{name}_columns"]))
    if weight.shape != (rows, columns):
        raise ValueError(f"{name} is {list(weight.shape)}, expected [{rows}, {columns}]")
    return weight


def _vector(tensors: Tensors, name: str, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    tensor = tensors[name]
    if tensor.dtype != dtype or tensor.dim() != 1 or tensor.numel() not in sizes:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} [{sizes[-1]}]")
    return tensor


def _gate_threshold(tensors: Tensors, rest: Mapping[str, Any], of: GateOf) -> Predictor:
    return GateThreshold(of.gate, of.activation, _vector(tensors, "threshold", (1,)), **of.extras)


def _sign_bits(tensors: Tensors, rest: Mapping[str, Any], of: GateOf) -> Predictor:
    signs, words = tensors["signs"], -(-of.gate.columns // 32)
    if signs.dtype != torch.int32 or signs.shape != (of.gate.rows, words):
        raise ValueError(f"signs are {signs.dtype} {list(signs.shape)}, expected int32 [{of.gate.rows}, {words}]")
    return SignBits(signs, _vector(tensors, "threshold", (1, of.gate.rows), torch.int32))


def _weighted_threshold(tensors: Tensors, rest: Mapping[str, Any], of: GateOf) -> Predictor:
    neurons, width = of.gate.shape
    threshold = _vector(tensors, "threshold", (neurons,))
    if not rest["shifted"]:
        return WeightedThreshold(of.gate, of.activation, threshold, None, None, **of.extras)
    matrix = _weight(tensors, rest, "compensation", width, width)
    shift = _vector(tensors, "shift", (neurons,))
    return WeightedThreshold(of.gate, of.activation, threshold, shift, matrix, **of.extras)


def _low_rank(tensors: Tensors, rest: Mapping[str, Any], of: GateOf) -> Predictor:
    neurons, width = of.gate.shape
    rank = int(rest["second_columns"])
    first, second = (_weight(tensors, rest, *side) for side in (("first", rank, width), ("second", neurons, rank)))
    threshold = _vector(tensors, "threshold", (1, neurons))
    # Factors fitted to the gate want its bias; trained ones, and those of models without, do not.
    bias = of.gate_bias if rest.get("biased") else None
    magnitude = bool(rest["by_magnitude"])
    return LowRank(first, second, threshold, of.activation, by_magnitude=magnitude, gate_bias=bias, cutoff=of.cutoff)


_BUILDERS = {
    "gate_threshold": _gate_threshold,
    "sign_bits": _sign_bits,
    "weighted_threshold": _weighted_threshold,
    "low_rank": _low_rank,
}
