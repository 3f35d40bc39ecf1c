"""Files of a large model's shape: a real header over holes, so that 40 GB take no room on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pinfer.formats.gguf_writer import Outgoing, header_bytes
from pinfer.formats.type_mix import Facts, tensor_type
from pinfer.placement.published import PUBLISHED, attention_matrices
from pinfer.quant import F32


def write_holes(path: Path, name: str = "llama-2-70b", vocab_size: int = 32000) -> Path:
    """A published model in Q4_K_M, its vocabulary made up in that size; all weights are zeros. Returns `path`."""
    tensors = _tensors(name, vocab_size)
    header = header_bytes(_metadata(name, vocab_size), tensors)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(-(-tensor.nbytes // 32) * 32 for tensor in tensors))
    return path


def has_holes(path: Path) -> bool:
    """Whether the file system keeps no room for them."""
    status = os.stat(path)
    return status.st_blocks * 512 < status.st_size // 100


def _tensors(name: str, vocab_size: int) -> list[Outgoing]:
    dims = PUBLISHED[name]
    width, facts = dims.d_model, Facts(dims.n_layers, is_70b=True)
    block = attention_matrices(dims) | {
        "ffn_gate": (dims.d_ffn, width),
        "ffn_up": (dims.d_ffn, width),
        "ffn_down": (width, dims.d_ffn),
        "attn_norm": (width,),
        "ffn_norm": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, width), "output_norm.weight": (width,)}
    shapes["output.weight"] = (vocab_size, width)
    for layer in range(dims.n_layers):
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in block.items()}
    return [Outgoing(one, shape, tensor_type("q4_k_m", one, shape, F32, facts), list) for one, shape in shapes.items()]


def _metadata(name: str, vocab_size: int) -> dict[str, Any]:
    dims = PUBLISHED[name]
    return {
        "general.architecture": "llama",
        "general.name": name,
        "llama.context_length": dims.context,
        "llama.embedding_length": dims.d_model,
        "llama.block_count": dims.n_layers,
        "llama.feed_forward_length": dims.d_ffn,
        "llama.rope.dimension_count": dims.head_dim,
        "llama.attention.head_count": dims.n_heads,
        "llama.attention.head_count_kv": dims.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        + [f"▁word{number}" for number in range(vocab_size - 259)],
        "tokenizer.ggml.scores": [-float(number) for number in range(vocab_size)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (vocab_size - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
