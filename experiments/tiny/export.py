"""Write the model as a standard Q8_0 GGUF file.

`ffn_down` gets one scale per 32 x 32 tile: the 32 blocks of a tile repeat it. The file stays
ordinary Q8_0, and the transposed matrix has exactly the same weights in Q8_0, so a runtime that
stores neurons as rows computes with the very same numbers.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from experiments.tiny.corpus import END_OF_TEXT_ID
from experiments.tiny.model import TinyConfig, TinyLlama

TILE = 32  # the Q8_0 block length
Q8_MAX = 127
Q8_0 = GGMLQuantizationType.Q8_0
NAME = "pinfer-tiny"
LICENCE = "MIT"
DESCRIPTION = (
    "A tiny English language model with a ReGLU FFN, trained for activation sparsity. "
    "llama.hidden_activation is relu: a runtime that assumes SiLU computes another function."
)

BLOCK_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.output": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}
OUTER_NAMES = {"embedding": "token_embd", "output_norm": "output_norm"}


def gguf_name(parameter: str) -> str:
    """Return the GGUF tensor name of a TinyLlama parameter."""
    module = parameter.removesuffix(".weight")
    if module in OUTER_NAMES:
        return f"{OUTER_NAMES[module]}.weight"
    _, layer, part = module.split(".", 2)
    return f"blk.{layer}.{BLOCK_NAMES[part]}.weight"


def quantize_tiled(matrix: np.ndarray) -> np.ndarray:
    """Quantise float32 [rows, cols] to Q8_0 with one scale per 32 x 32 tile.

    Scale d = float16(max |x| of the tile / 127), values round(x / d) clipped to +-127. Returns the
    packed blocks, uint8 [rows, cols / 32 * 34].
    """
    rows, cols = matrix.shape
    if rows % TILE or cols % TILE:
        raise ValueError(f"matrix of {rows} x {cols} is not made of {TILE} x {TILE} tiles")
    tiles = matrix.reshape(rows // TILE, TILE, cols // TILE, TILE)
    scales = (np.abs(tiles).max(axis=(1, 3), keepdims=True) / Q8_MAX).astype(np.float16)
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    values = np.clip(np.rint(tiles / divisors), -Q8_MAX, Q8_MAX).astype(np.int8)
    repeated = np.broadcast_to(scales, (rows // TILE, TILE, cols // TILE, 1))
    blocks = np.concatenate([np.ascontiguousarray(repeated).view(np.uint8), values.view(np.uint8)], axis=-1)
    return blocks.reshape(rows, -1)


def packed_tensors(model: TinyLlama) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (parameter name, GGUF name, data): norms float32, matrices Q8_0 as uint8 blocks."""
    for parameter, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if values.ndim == 2:
            tiled = parameter.endswith("ffn.down.weight")
            values = quantize_tiled(values) if tiled else quantize(values, Q8_0)
        yield parameter, gguf_name(parameter), values


def quantised_copy(model: TinyLlama) -> TinyLlama:
    """Return a copy of the model whose weights are what the GGUF file holds."""
    weights = {
        parameter: torch.from_numpy(dequantize(values, Q8_0) if values.dtype == np.uint8 else values.copy())
        for parameter, _, values in packed_tensors(model)
    }
    quantised = copy.deepcopy(model)
    quantised.load_state_dict(weights)
    return quantised


def export_gguf(model: TinyLlama, tokenizer: Tokenizer, path: Path) -> None:
    """Write model and tokenizer to `path`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    writer = gguf.GGUFWriter(staging, "llama")
    _add_metadata(writer, model.config)
    _add_tokenizer(writer, tokenizer)
    for _, name, values in packed_tensors(model):
        writer.add_tensor(name, values, raw_dtype=Q8_0 if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(staging, path)


def _add_metadata(writer: gguf.GGUFWriter, config: TinyConfig) -> None:
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_license(LICENCE)
    writer.add_languages(["en"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.n_neurons)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_string("llama.hidden_activation", "relu")


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    stored = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in stored["merges"]]
    types = [gguf.TokenType.NORMAL] * len(vocab)
    types[END_OF_TEXT_ID] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(END_OF_TEXT_ID)
    writer.add_eos_token_id(END_OF_TEXT_ID)
    writer.add_add_bos_token(True)  # every training document starts with it
