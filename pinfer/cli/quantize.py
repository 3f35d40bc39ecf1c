"""pinfer quantize: a model in another weight type, as a GGUF that llama.cpp reads too."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.cli.convert import tell_of_llama_cpp
from pinfer.cli.generate import Threads
from pinfer.cli.progress import duration, written
from pinfer.config import RunConfig
from pinfer.engine.cores import default_threads
from pinfer.engine.quantize_model import Target, Total, quantize_model, targets, totals
from pinfer.formats import ModelFile, open_model
from pinfer.formats.model_config import model_config
from pinfer.formats.powerinfer import is_neuron_major
from pinfer.formats.standard import fused_tensors
from pinfer.formats.type_mix import FILE_TYPES, base_type

WRITABLE = ", ".join(name.upper() for name in FILE_TYPES)


def quantize_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Model to read.")],
    output: Annotated[str, typer.Option("-o", "--output", help="GGUF to write.")],
    type_name: Annotated[str, typer.Option("--type", metavar="TYPE", help=f"{WRITABLE}.")],
    threads: Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: options.Json = False,
) -> None:
    """Write a model with its matrices in another weight type, the types of Q4_K_M and Q5_K_M being llama.cpp's."""
    type_name, path = type_name.lower(), Path(output)
    if type_name not in FILE_TYPES:
        raise ValueError(f"type {type_name.upper()} is none of {WRITABLE}")
    count = RunConfig(threads=threads).threads or default_threads()
    with open_model(Path(source)) as file:
        check_target(file, path, replace=force or dry_run)
        fused = fused_tensors(file)
        chosen = targets(file, type_name, fused)
        _tell(chosen, type_name)
        if is_neuron_major(file):
            note(
                "the file has down by neurons, as its source: llama.cpp does not read it; pinfer convert writes one it does"
            )
        started = time.perf_counter()
        found = totals(chosen)
        if not dry_run:
            with written(sum(one.nbytes for one in chosen)) as progress:
                found = quantize_model(file, type_name, path, fused=fused, threads=count, progress=progress)
            if not is_neuron_major(file):
                tell_of_llama_cpp(model_config(file))
        seconds = time.perf_counter() - started
    if json:
        emit_json(_figures(path, type_name, found, None if dry_run else seconds))
        return
    console().print(_table(found, measured=not dry_run))
    if not dry_run:
        console().print(printable(f"{path}: {size(path.stat().st_size)}, written in {duration(seconds)}"))


def check_target(file: ModelFile, path: Path, *, replace: bool) -> None:
    """ValueError where `path` is one of the files that the model is read from, or no file can be there.

    FileExistsError for what is there, unless it is to be replaced.
    """
    if path.is_dir():
        raise ValueError(f"{path}: this is a directory; name the file to write")
    if path.exists() and any(part.path.samefile(path) for part in file.parts):
        raise ValueError(f"{path}: the model is read from it; name another file")
    if os.path.lexists(path) and not replace:
        raise FileExistsError(f"{path} exists; --force replaces it")


def _tell(chosen: Sequence[Target], type_name: str) -> None:
    """Say what is not as asked for: rows that the type does not fit, weights that were rounded once before."""
    odd: dict[tuple[str, str, int], int] = {}
    for target in chosen:
        if target.type is not target.wanted:
            key = (target.wanted.name, target.type.name, target.shape[-1])
            odd[key] = odd.get(key, 0) + 1
    for (wanted, instead, columns), count in odd.items():
        note(f"{count} tensors of {columns} columns are no whole blocks of {wanted}: they are {instead}")
    again = {one.stored.name for one in chosen if one.stored.block_size > 1 and one.stored is not one.type}
    if again and base_type(type_name).block_size > 1:
        note(
            f"the source is quantised already ({', '.join(sorted(again))}): errors are those of the second rounding alone"
        )


def _rows(found: dict[str, Total]) -> list[tuple[str, Total]]:
    return [*found.items(), ("all", sum(found.values(), Total()))]


def _table(found: dict[str, Total], *, measured: bool) -> Table:
    table = Table("tensors", "types", "bytes", "bits a weight", "RMSE" if measured else "", title_justify="left")
    for name, total in _rows(found):
        types = ", ".join(f"{kind} x{count}" for kind, count in total.types.most_common()) if name != "all" else ""
        error = f"{100 * total.error:.3f} %" if measured and total.squared else ""
        table.add_row(name, types, size(total.nbytes), f"{total.bits_per_weight:.2f}", error)
    return table


def _figures(path: Path, type_name: str, found: dict[str, Total], seconds: float | None) -> dict[str, Any]:
    return {
        "path": str(path),
        "type": type_name,
        "seconds": seconds,
        "tensors": {
            name: {
                "types": dict(total.types),
                "weights": total.weights,
                "source_bytes": total.source_bytes,
                "bytes": total.nbytes,
                "bits_per_weight": total.bits_per_weight,
                "relative_rmse": None if seconds is None else total.error,
            }
            for name, total in _rows(found)
        },
    }
