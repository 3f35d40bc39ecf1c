"""PowerInfer's files, written after their published layout: models of its four architectures, with predictors, and splits.

Gates are planted: the first channel of the residual is a constant that nothing changes, so that its weight is each
neuron's bias and about an eighth fire. The predictor reproduces the gate's product up to a positive factor: with rows
[C; -C] and [G, -G], relu gives back G · C · residual, C being the identity, or what takes away the mean where the norm
does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pinfer.formats.gguf_writer import Outgoing, write_gguf
from pinfer.quant import F16, F32, Q4_0, QuantType
from pinfer.quantize import quantize
from tests.gguf_files import bpe_vocab

ARCHITECTURES = ("llama", "bamboo", "falcon", "opt")
WIDTH, NEURONS, LAYERS, HEADS, CONTEXT = 64, 160, 2, 4, 128
CONSTANT, SHIFT = 3.0, 0.6
Tensors = dict[str, torch.Tensor]


def write_powerinfer(
    path: Path,
    architecture: str = "llama",
    kind: QuantType = F16,
    *,
    threshold: float = 0.0,
    magic: bytes = b"PWRI",
    change: Callable[[Tensors], None] = lambda _: None,
    keys: dict[str, Any] | None = None,
) -> Path:
    """Write a model with matrices of that type; `change` edits its tensors and `keys` its metadata. Returns `path`."""
    tensors = model_tensors(architecture)
    change(tensors)
    outgoing = [_outgoing(name, values, kind) for name, values in tensors.items()]
    metadata = _metadata(architecture) | {"powerinfer.sparse_threshold": threshold} | (keys or {})
    write_gguf(path, metadata, outgoing, magic=magic)
    return path


def model_tensors(architecture: str) -> Tensors:
    """float32 tensors under the file's names, the same at every call."""
    draw = torch.Generator().manual_seed(20)
    layer_normed, gated = architecture in ("falcon", "opt"), architecture in ("llama", "bamboo")

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    def norm(name: str) -> Tensors:
        return {f"{name}.weight": torch.ones(WIDTH)} | ({f"{name}.bias": torch.zeros(WIDTH)} if layer_normed else {})

    embedding = 0.5 * torch.randn(len(bpe_vocab()), WIDTH, generator=draw)
    embedding[:, 0] = CONSTANT
    found: Tensors = {"token_embd.weight": embedding}
    if architecture == "opt":
        found["position_embd.weight"] = 0.1 * torch.randn(CONTEXT + 2, WIDTH, generator=draw)
        found["position_embd.weight"][:, 0] = 0
    for layer in range(LAYERS):
        prefix = f"blk.{layer}"
        found |= norm(f"{prefix}.attn_norm")
        found |= _attention(prefix, architecture, matrix)
        if architecture != "falcon":
            found |= norm(f"{prefix}.ffn_norm")
        fires = 2 * matrix(NEURONS, WIDTH)
        fires[:, 0] = -SHIFT
        found |= (
            {f"{prefix}.ffn_gate.weight": fires, f"{prefix}.ffn_up.weight": matrix(NEURONS, WIDTH)}
            if gated
            else {f"{prefix}.ffn_up.weight": fires}
        )
        down = matrix(NEURONS, WIDTH)
        down[:, 0] = 0
        found[f"{prefix}.ffn_down_t.weight"] = down
        if architecture == "opt":
            found[f"{prefix}.ffn_up.bias"] = -0.1 * torch.rand(NEURONS, generator=draw)
            bias = 0.1 * torch.randn(WIDTH, generator=draw)
            bias[0] = 0
            found[f"{prefix}.ffn_down_t.bias"] = bias
        found |= _predictor(prefix, fires, layer, layer_normed)
    found |= norm("output_norm")
    return found if architecture == "opt" else found | {"output.weight": matrix(len(bpe_vocab()), WIDTH)}


def _attention(prefix: str, architecture: str, matrix: Callable[[int, int], torch.Tensor]) -> Tensors:
    out = matrix(WIDTH, WIDTH)
    out[0] = 0
    three = {part: matrix(WIDTH, WIDTH) for part in "qkv"}
    if architecture in ("llama", "bamboo"):
        return {f"{prefix}.attn_{part}.weight": one for part, one in three.items()} | {
            f"{prefix}.attn_output.weight": out
        }
    found = {f"{prefix}.attn_qkv.weight": torch.cat(list(three.values())), f"{prefix}.attn_output.weight": out}
    if architecture == "opt":
        found |= {f"{prefix}.attn_qkv.bias": torch.zeros(3 * WIDTH), f"{prefix}.attn_output.bias": torch.zeros(WIDTH)}
    return found


def _predictor(prefix: str, fires: torch.Tensor, layer: int, centred: bool) -> Tensors:
    """Of rank 2 D, and more in later layers, whose last rows are nothing: ranks differ from layer to layer."""
    channels = torch.eye(WIDTH) - (1 / WIDTH if centred else 0)
    more = 32 * layer
    return {
        f"{prefix}.fc1.weight": torch.cat([channels, -channels, torch.zeros(more, WIDTH)]),
        f"{prefix}.fc2.weight": torch.cat([fires, -fires, torch.zeros(NEURONS, more)], dim=1),
    }


def _outgoing(name: str, values: torch.Tensor, kind: QuantType) -> Outgoing:
    if values.dim() < 2:
        kind = F32
    elif name.endswith("fc1.weight"):
        kind = F16  # the fractions that take away a mean would not survive Q4_0
    made = quantize(values if values.dim() == 2 else values[None], kind)
    return Outgoing(name, tuple(values.shape), kind, lambda: [made.blocks])


def _metadata(architecture: str) -> dict[str, Any]:
    vocab, layer_normed = bpe_vocab(), architecture in ("falcon", "opt")
    epsilon = "layer_norm_epsilon" if layer_normed else "layer_norm_rms_epsilon"
    of_architecture = {
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": NEURONS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS,
        f"attention.{epsilon}": 1e-5,
    }
    if architecture in ("llama", "bamboo"):
        of_architecture["rope.dimension_count"] = WIDTH // HEADS
    return {
        "general.architecture": architecture,
        "general.name": f"planted {architecture}",
        **{f"{architecture}.{key}": value for key, value in of_architecture.items()},
        "tokenizer.ggml.model": vocab.model,
        "tokenizer.ggml.pre": vocab.pre,
        "tokenizer.ggml.tokens": list(vocab.tokens),
        "tokenizer.ggml.token_type": list(vocab.types),
        "tokenizer.ggml.merges": list(vocab.merges),
        "tokenizer.ggml.bos_token_id": vocab.special["bos"],
        "tokenizer.ggml.eos_token_id": vocab.special["eos"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


INDEX_I32 = QuantType("I32", 18, 1, 4)  # by PowerInfer's number


def write_gpu_index(
    path: Path,
    hot: list[torch.Tensor],
    *,
    buckets: list[torch.Tensor] | None = None,
    kind: QuantType = INDEX_I32,
    keys: dict[str, Any] | None = None,
) -> Path:
    """Write a split: the hot neurons bool [N] of each layer; `buckets` overrides their numbers. Returns `path`."""
    outgoing = []
    for layer, mask in enumerate(hot):
        bucket = mask.nonzero().flatten() if buckets is None else buckets[layer]
        for name, values in (("gpu_idx", mask), ("gpu_bucket", bucket)):
            data = values.to(torch.int32)
            outgoing.append(
                Outgoing(f"blk.{layer}.{name}", tuple(data.shape), kind, lambda data=data: [data.view(torch.uint8)])
            )
    metadata = {
        "general.architecture": "generic.gpu_index",
        "generic.gpu_index.block_count": len(hot),
        "split.vram_capacity": 1 << 30,
    } | (keys or {})
    write_gguf(path, metadata, outgoing, magic=b"PWRI")
    return path


__all__ = ["ARCHITECTURES", "LAYERS", "NEURONS", "Q4_0", "model_tensors", "write_gpu_index", "write_powerinfer"]
