"""pinfer convert: a model as standard GGUF or as a Hugging Face folder, whichever of the two it comes as."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from pinfer.cli import options
from pinfer.cli.console import console, emit_json, note, printable, size
from pinfer.cli.convert_bundle import DOWN_TYPES, bundle, figures, said
from pinfer.cli.progress import duration, written
from pinfer.config import ModelConfig
from pinfer.formats import ModelFile, open_model
from pinfer.formats.huggingface.folder import CONFIG
from pinfer.formats.huggingface.write import folder_bytes, write_folder
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.model_file import FLOAT_DTYPES
from pinfer.formats.powerinfer import is_neuron_major
from pinfer.formats.row_major import RowMajor
from pinfer.formats.standard import computed_otherwise, standard_tensors, write_standard
from pinfer.kernels.ops import dequantize
from pinfer.quant import BY_NAME, QuantType

KEEP = "keep"
TYPES = ("f16", "bf16", "f32")
FORMS = ("gguf", "hf", "pinfer")


def convert_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="GGUF file or Hugging Face folder to read.")],
    output: Annotated[str, typer.Option("-o", "--output", help="File or folder to write.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORM",
            help="gguf, hf or pinfer (one file with hot neurons first and predictors); left out: gguf for a name ending in .gguf, else hf, a folder.",
        ),
    ] = None,
    type_name: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            help=f"{', '.join(TYPES)} or {KEEP}: the type of matrices; in a folder, quantised ones become f16.",
        ),
    ] = KEEP,
    predictor_path: Annotated[
        str | None,
        typer.Option("--predictor-path", help="With --to pinfer: directory of pinfer solve, to go into the file."),
    ] = None,
    down_type: Annotated[
        str | None,
        typer.Option("--down-type", help=f"With --to pinfer: type of down's rows ({', '.join(DOWN_TYPES)})."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    json: options.Json = False,
) -> None:
    """Write a model in another form, its weights as they are or as floats; `pinfer quantize` makes them smaller."""
    if not output:
        raise ValueError("-o is empty: name the file or folder to write")
    path = Path(output)
    form, kind = _form(to, path), _kind(type_name)
    _check_options(form, type_name, predictor_path, down_type)
    with open_model(Path(source)) as file:
        check_tensors(file, model_config(file))
        _check_output(file, path, form, force)
        started = time.perf_counter()
        bundled = bundle(file, path, predictor_path, down_type) if form == "pinfer" else None
        n_bytes = bundled.nbytes if bundled else _write(file, path, form, kind, force)
        seconds = time.perf_counter() - started
        if form == "gguf":
            tell_of_llama_cpp(model_config(file))
        elif form == "hf" and kind is None:
            _tell_of_floats(file)
        n_tensors = len(file.tensors)
        more = figures(file, bundled) if bundled else {}
    if json:
        emit_json({"path": str(path), "form": form, "tensors": n_tensors, "bytes": n_bytes, "seconds": seconds} | more)
        return
    console().print(printable(f"{path}: {size(n_bytes)}, written in {duration(seconds)}"))
    if bundled:
        console().print(printable(said(bundled)))


def _check_options(form: str, type_name: str, predictor_path: str | None, down_type: str | None) -> None:
    """ValueError for options that the form has no use for."""
    if form == "pinfer" and type_name != KEEP:
        raise ValueError(f"--type {type_name} has no meaning with --to pinfer: run pinfer quantize before")
    for name, value in (("--predictor-path", predictor_path), ("--down-type", down_type)):
        if form != "pinfer" and value is not None:
            raise ValueError(f"{name} {value} has no meaning with --to {form}, only with pinfer")


def _form(to: str | None, path: Path) -> str:
    form = to or ("gguf" if path.suffix.lower() == ".gguf" else "hf")
    if form not in FORMS:
        raise ValueError(f"--to {form} is none of {', '.join(FORMS)}")
    return form


def _kind(name: str) -> QuantType | None:
    if name.lower() not in (*TYPES, KEEP):
        raise ValueError(f"--type {name} is none of {', '.join((*TYPES, KEEP))}; pinfer quantize writes other types")
    return BY_NAME.get(name.upper())


def _check_output(file: ModelFile, path: Path, form: str, force: bool) -> None:
    """FileExistsError for what is there already; ValueError where the output is, or holds, what is read."""
    if not os.path.lexists(path):
        return
    if not force:
        raise FileExistsError(f"{path} exists; --force replaces it")
    if form != "hf" and path.is_dir():
        raise ValueError(f"{path} is a folder; name the file to write")
    if form == "hf" and not (path.is_dir() and ((path / CONFIG).is_file() or not any(path.iterdir()))):
        raise ValueError(f"{path} is no model's folder, so that --force does not replace it")
    read = {part.path.resolve() for part in file.parts}
    if form == "hf":
        read |= {folder for part in file.parts for folder in (*part.path.resolve().parents, part.path.parent.resolve())}
    if path.resolve() in read:
        raise ValueError(f"{path}: the model is read from it; name another output")


def tell_of_llama_cpp(config: ModelConfig) -> None:
    """Say so where llama.cpp would open what is written and compute something else."""
    if otherwise := computed_otherwise(config):
        note(f"llama.cpp will read the file, but compute {', '.join(otherwise)}")


def _tell_of_floats(file: ModelFile) -> None:
    """Say so where a folder has floats for quantised weights."""
    if quantised := sorted({str(info.type) for info in file.tensors.values() if info.type not in FLOAT_DTYPES}):
        note(f"{', '.join(quantised)} became F16: a folder has floats alone")


def _write(file: ModelFile, path: Path, form: str, kind: QuantType | None, force: bool) -> int:
    if is_neuron_major(file):
        file = RowMajor(file, dequantize)
    if "tokenizer.ggml.tokens" not in file.metadata:
        note("the model has no tokenizer, and what is written will have none")
    with torch.inference_mode():
        if form == "gguf":
            with written(sum(tensor.nbytes for tensor in standard_tensors(file, kind, dequantize))) as progress:
                return write_standard(file, path, kind, dequantize, progress=progress)
        with written(folder_bytes(file, kind, dequantize)) as progress:
            return write_folder(file, path, kind, dequantize, replace=force, progress=progress)
