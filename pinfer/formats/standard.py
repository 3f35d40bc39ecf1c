"""Any model file as standard GGUF, as llama.cpp's converter would have written it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pinfer.config import ModelConfig
from pinfer.formats.fused import fused_groups
from pinfer.formats.gguf_writer import Outgoing, fuse, metadata_of, stored, write_gguf
from pinfer.formats.model_file import FLOAT_DTYPES, ModelFile
from pinfer.formats.recast import Dequantize, recast
from pinfer.formats.type_mix import FILE_TYPES
from pinfer.quant import F32, QuantType

_ROUTER = ".ffn_gate_inp.weight"
# What llama.cpp computes for an architecture, whatever a file says.
_ACTIVATIONS = {"llama": "silu", "qwen2": "silu", "qwen3": "silu", "qwen3moe": "silu", "phi3": "silu",
                "gemma2": "gelu_tanh", "gemma3": "gelu_tanh"}  # fmt: skip
_WITHOUT_WINDOWS = ("llama", "qwen2", "qwen3", "qwen3moe", "phi3")


def computed_otherwise(config: ModelConfig) -> list[str]:
    """What llama.cpp, which has no keys for it, computes in another way of a model's GGUF; empty where it agrees."""
    known, found = _ACTIVATIONS.get(config.architecture), []
    if known is not None and config.activation != known:
        found.append(f"{known} in place of {config.activation}")
    if config.sliding and config.architecture in _WITHOUT_WINDOWS:
        found.append(f"attention without the window of {config.sliding_window}")
    if config.experts is not None and not config.experts.normalised:
        found.append("experts' weights normalised")
    return found


def write_standard(
    file: ModelFile,
    path: Path,
    kind: QuantType | None,
    dequantize: Dequantize,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write a model as one GGUF file, its matrices as they are or as floats of type `kind`; returns the file's bytes.

    Vectors, routers of experts and rope's factors are F32. Memory holds one piece at a time, or one tensor where a
    folder's rows are put into GGUF's order. ValueError and OSError as of `write_gguf`, and nothing is written then.
    """
    return write_gguf(path, standard_metadata(file, kind), standard_tensors(file, kind, dequantize), progress=progress)


def standard_metadata(file: ModelFile, kind: QuantType | None) -> dict[str, Any]:
    metadata = metadata_of(file)
    if kind is not None:
        metadata["general.file_type"] = FILE_TYPES[kind.name.lower()]
    return metadata


def standard_tensors(file: ModelFile, kind: QuantType | None, dequantize: Dequantize) -> list[Outgoing]:
    """The tensors of a GGUF file, those that llama.cpp has fused joined."""
    found = [_outgoing(file, name, kind, dequantize) for name in file.tensors]
    return fuse(found, fused_tensors(file))


def fused_tensors(file: ModelFile) -> dict[str, tuple[str, ...]]:
    """The tensors that files of this architecture have as one: name, and its parts in the order of their rows."""
    found = {}
    for layer in range(file.get(f"{file.architecture}.block_count", int)):
        for whole, parts in fused_groups(file.architecture).items():
            for ending in (".weight", ".bias"):
                if file.has(parts[0].format(layer) + ending):
                    found[whole.format(layer) + ending] = tuple(part.format(layer) + ending for part in parts)
    return found


def _outgoing(file: ModelFile, name: str, kind: QuantType | None, dequantize: Dequantize) -> Outgoing:
    info = file.info(name)
    if name.endswith(_ROUTER) and info.type in FLOAT_DTYPES:
        kind = F32
    if kind is None or len(info.shape) == 1 or info.type is kind:
        return stored(file, name)
    return recast(file, name, kind, dequantize)
