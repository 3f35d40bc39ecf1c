"""Puts a model where a plan says: weights one after the other, so that no second model is in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from pinfer.engine.devices import Device
from pinfer.ffn import HybridFFN
from pinfer.models import Transformer
from pinfer.models.layers import CPU
from pinfer.models.transformer import Block
from pinfer.models.weights import WeightChange, move
from pinfer.placement import LayerPlan, Plan
from pinfer.quant import QuantTensor


class Elsewhere(nn.Module):
    """An FFN that computes on another device than its block: x and the residual go there, y comes back."""

    crosses = True  # so a decode step over it is not repeated as a whole

    def __init__(self, ffn: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.ffn, self._device = ffn, device

    def forward(self, x: torch.Tensor, residual: torch.Tensor, opens: bool = False) -> torch.Tensor:
        """x, residual: float32 [T, D]; returns float32 [T, D] on their device."""
        return self.ffn(x.to(self._device), residual.to(self._device), opens).to(x.device)


def runnable(plan: Plan) -> Plan:
    """The plan as it runs: where one device has all neurons it predicts for them, and the CPU never does for both."""

    def predictor(layer: LayerPlan) -> LayerPlan:
        if layer.n_hot in (0, layer.hot.numel()):
            return replace(layer, predictor="gpu" if layer.n_hot else "cpu")
        return replace(layer, predictor="split") if layer.predictor == "cpu" else layer

    return replace(plan, layers=tuple(predictor(layer) for layer in plan.layers))


def place_model(
    model: Transformer, plan: Plan, device: Device, release: Callable[[QuantTensor], None] = lambda _: None
) -> None:
    """Put the GPU's part of a plan on a device, in place: `sparsify` has split the layers by the same plan already.

    Keys and values of one sequence, and tables of the rotary embedding, are counted where they will be allocated.
    `release` is told of each matrix that has been copied there.
    torch.OutOfMemoryError where the device is full; the model cannot be used then.
    """

    def put(weight: QuantTensor) -> QuantTensor:
        there = device.put_weight(weight)
        if there.device != weight.device:
            release(weight)
        return there

    for block, layer in zip(model.layers, plan.layers, strict=True):
        if layer.attention == "gpu":
            for name, part in block.named_children():
                if name != "ffn":
                    move(part, device.put, put)
        _place_ffn(block, layer, device, put)
    if plan.head == "gpu":
        move(model.norm, device.put, put)
        model.head = put(model.head)  # the embedding stays, of which a token reads one row
    _reserve(model, plan, device)


def _place_ffn(block: Block, layer: LayerPlan, device: Device, put: WeightChange) -> None:
    """Put the hot neurons there; a predictor for all of them is the hot shard's own."""
    ffn = block.ffn
    if layer.n_hot:
        move(ffn.hot if isinstance(ffn, HybridFFN) else ffn, device.put, put)
    computes = device.torch_device if layer.n_hot else CPU
    if computes != block.device:
        block.ffn = Elsewhere(ffn, computes)


def _reserve(model: Transformer, plan: Plan, device: Device) -> None:
    """Count what a sequence will allocate there, and keep the tables that blocks there turn by."""
    config = model.config
    blocks = [block for block, layer in zip(model.layers, plan.layers, strict=True) if layer.attention == "gpu"]
    position_bytes = 2 * config.n_kv_heads * config.head_dim * torch.float32.itemsize
    device.account.take(len(blocks) * position_bytes * model.context)
    for rope in {block.attention.rope for block in blocks if block.attention.rope is not None}:
        rope.reserve(model.context)
        device.account.take(rope.nbytes)
        if device.torch_device != CPU:
            rope.add_device(device.torch_device)
