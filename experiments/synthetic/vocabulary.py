"""The file's metadata, with a valid SentencePiece vocabulary of any size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, product
from string import ascii_lowercase

import gguf
from gguf import TokenType

from experiments.synthetic.recipe import Recipe

NORM_EPS = 1e-5
SPACE = "▁"  # how SentencePiece spells a space
SPECIALS = ("<unk>", "<s>", "</s>")
_SYLLABLES = 4  # letters of the longest pieces: 26 + 26² + 26³ + 26⁴, with and without a space


def add_metadata(writer: gguf.GGUFWriter, recipe: Recipe) -> None:
    """All keys of a `llama` model; ReLU is our own key, which llama.cpp ignores (it computes SiLU)."""
    shape = recipe.shape
    writer.add_name(f"synthetic {recipe.shape_name}, {recipe.n_layers} layers")
    writer.add_description(
        f"Random weights with a planted FFN density of {recipe.density:g} ({recipe.skew}), "
        f"gate rank {recipe.gate_rank}, seed {recipe.seed}. For measuring speed: it says nothing."
    )
    writer.add_file_type(recipe.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(recipe.vocab_size)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.d_model)
    writer.add_block_count(recipe.n_layers)
    writer.add_feed_forward_length(shape.d_ffn)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_string("llama.hidden_activation", recipe.activation)
    _add_vocabulary(writer, recipe.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Specials, the 256 byte tokens, then pieces whose scores fall with their rank."""
    tokens = vocabulary(size)
    pieces = size - len(SPECIALS) - 256
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (size - pieces) + [-float(rank) for rank in range(pieces)])
    writer.add_token_types(types + [TokenType.NORMAL] * pieces)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)


def vocabulary(size: int) -> list[str]:
    """`size` different tokens; every piece can be reached by joining two shorter ones."""
    return list(islice(chain(SPECIALS, (f"<0x{byte:02X}>" for byte in range(256)), _pieces()), size))


def _pieces() -> Iterator[str]:
    """Printable ASCII first, then groups of lower-case letters, alone and behind a space."""
    yield SPACE
    yield from (chr(code) for code in range(0x21, 0x7F))
    yield from (SPACE + letter for letter in ascii_lowercase)
    for length in range(2, _SYLLABLES + 1):
        words = map("".join, product(ascii_lowercase, repeat=length))
        yield from chain.from_iterable((word, SPACE + word) for word in words)
