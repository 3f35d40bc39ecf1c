"""pinfer inspect: what a model's file or folder holds, and where its bytes lie."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pinfer.cli import options
from pinfer.cli.console import console, emit_json, printable, size
from pinfer.config import ModelConfig
from pinfer.engine import SHIPPED_MODEL
from pinfer.formats import ModelFile, open_model
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.powerinfer import is_predictor

SHOWN_ITEMS = 6
SHOWN_CHARACTERS = 100
KV_BYTES = 4  # float32


def inspect(
    path: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="GGUF file or Hugging Face folder.")] = None,
    model: options.Model = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: options.Json = False,
) -> None:
    """Show a model's configuration, metadata and memory by layer, without reading its weights."""
    if path is not None and model is not None:
        raise ValueError(f"one model at a time: {path} or {model}")
    file = open_model(Path(path or model or SHIPPED_MODEL))
    config = model_config(file)
    check_tensors(file, config)
    if json:
        emit_json(_figures(file, config, tensors))
    else:
        _print(file, config, tensors)


def _part(name: str) -> str:
    """Which share of the model a tensor belongs to."""
    if is_predictor(name):
        return "predictors and statistics"
    if not name.startswith("blk."):
        return "embedding and head"
    return "ffn" if ".ffn_" in name and "norm" not in name else "norms" if "norm" in name else "attention"


def _bytes_by_part(file: ModelFile) -> Counter[str]:
    parts: Counter[str] = Counter()
    for name, info in file.tensors.items():
        parts[_part(name)] += info.nbytes
    return parts


def _bytes_by_layer(file: ModelFile, config: ModelConfig) -> list[int]:
    layers = [0] * config.n_layers
    for name, info in file.tensors.items():
        if name.startswith("blk."):
            layers[int(name.split(".")[1])] += info.nbytes
    return layers


def _kv_bytes_per_token(config: ModelConfig) -> int:
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * KV_BYTES


def _types(file: ModelFile) -> dict[str, int]:
    return dict(Counter(str(info.type) for info in file.tensors.values()).most_common())


def _figures(file: ModelFile, config: ModelConfig, tensors: bool) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "path": str(file.path),
        "format": file.format,
        "architecture": config.architecture,
        "name": config.name,
        "layers": config.n_layers,
        "width": config.d_model,
        "ffn_neurons": config.d_ffn,
        "experts": None if config.experts is None else config.experts.count,
        "experts_used": None if config.experts is None else config.experts.used,
        "heads": config.n_heads,
        "kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.context_length,
        "activation": config.activation,
        "weights_bytes": file.nbytes,
        "tensor_count": len(file.tensors),
        "bytes_by_part": dict(_bytes_by_part(file)),
        "bytes_by_layer": _bytes_by_layer(file, config),
        "kv_bytes_per_token": _kv_bytes_per_token(config),
        "kv_bytes_whole_context": _kv_bytes_per_token(config) * config.context_length,
        "metadata": {key: value for key, value in file.metadata.items() if not isinstance(value, list)},
        "types": _types(file),
    }
    if tensors:
        figures["tensors"] = {
            name: {"shape": info.shape, "type": str(info.type), "bytes": info.nbytes}
            for name, info in file.tensors.items()
        }
    return figures


def _print(file: ModelFile, config: ModelConfig, tensors: bool) -> None:
    out = console()
    out.print(printable(f"{config.name or file.path.name} ({config.architecture}), {file.format}"))
    experts = "" if config.experts is None else f" in {config.experts.used} of {config.experts.count} experts each"
    out.print(
        f"{config.n_layers} layers of width {config.d_model}, "
        f"{config.d_ffn} FFN neurons{experts} ({config.activation}), "
        f"{config.n_heads} heads over {config.n_kv_heads} of {config.head_dim}, "
        f"{config.vocab_size} tokens, context {config.context_length}"
    )
    types = ", ".join(f"{name} x{count}" for name, count in _types(file).items())
    per_token = _kv_bytes_per_token(config)
    out.print(f"weights {size(file.nbytes)} in {len(file.tensors)} tensors ({types})")
    out.print(f"KV cache {size(per_token)} a token, {size(per_token * config.context_length)} for the whole context")
    out.print(_memory_table(file, config))
    out.print(_metadata_table(file))
    if tensors:
        out.print(_tensor_table(file))


def _memory_table(file: ModelFile, config: ModelConfig) -> Table:
    table = Table("part", "bytes", "share", title="memory", title_justify="left")
    parts = _bytes_by_part(file)
    for name, n_bytes in parts.most_common():
        table.add_row(name, size(n_bytes), f"{100 * n_bytes / parts.total():.1f} %")
    layers = _bytes_by_layer(file, config)
    table.add_row("a layer", f"{size(min(layers))} to {size(max(layers))}", "")
    return table


def _metadata_table(file: ModelFile) -> Table:
    table = Table("key", "value", title="metadata", title_justify="left")
    for key, value in file.metadata.items():
        table.add_row(printable(key), printable(_shown(value)))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, list):
        head = ", ".join(_shown(item) for item in value[:SHOWN_ITEMS])
        return f"[{head}{', …' if len(value) > SHOWN_ITEMS else ''}] ({len(value)})"
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


def _tensor_table(file: ModelFile) -> Table:
    table = Table("tensor", "shape", "type", "bytes", title="tensors", title_justify="left")
    for name, info in file.tensors.items():
        table.add_row(printable(name), "x".join(str(n) for n in info.shape), str(info.type), size(info.nbytes))
    return table
