"""Reference logits from llama.cpp for one text, teacher-forced, in two modes.

* ``f32``: a copy of the model whose weights are dequantised to F32, with an F32 KV cache and without flash
  attention. This is the tight reference: another correct forward pass over the same weights should match its argmax.
* ``q4``: the model file as it is, with llama.cpp's default options (repacked quantised kernels, quantised
  activations, F16 KV cache). This is what users of llama.cpp see; it is not exact arithmetic on the same weights.

Both modes evaluate the first ``--tokens`` tokens of ``--text`` (BOS included) in one batch. The full logits go to
``--output-dir`` as ``<model stem>_f32_logits.npy`` and ``<model stem>_q4_logits.npy`` (float32, tokens x vocabulary),
together with the F32 copy ``<model stem>-f32.gguf``; a compact summary goes to ``--json``.

JSON layout: ``tokens`` is the list of token ids; each mode under ``modes`` has, per position, ``argmax``, ``top_ids``
and ``top_logits`` (best first), ``logsumexp``, ``margin`` (best logit minus second best) and ``nll`` (of the next
token, in nats: one entry fewer than there are tokens), and ``mean_nll``. ``comparison`` sets the modes against
each other. Logits are rounded to five decimals.

Usage::

    pip install llama-cpp-python gguf
    python -m experiments.llama_cpp_reference --model model.gguf --text tests/data/reference_text.txt \
        --output-dir out --json tests/data/gemma3_reference.json
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from experiments.files import write_text

DECIMALS = 5
CLEAR_MARGIN = 0.5  # positions whose top-1/top-2 margin exceeds this should agree even between number formats
ROWS_PER_CHUNK = 32  # bounds the float64 temporaries over a large vocabulary


class ReferenceRunError(Exception):
    """A problem the user can fix; reported as one line with exit status 2."""


def require(module: str, package: str) -> ModuleType:
    """Import ``module`` or fail with the pip command that provides it."""
    try:
        return importlib.import_module(module)
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # llama_cpp raises the latter two when its library is broken
        raise ReferenceRunError(f"cannot import {module} ({error}); install it with: pip install {package}") from error


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_f32_copy(source: Path, target: Path) -> None:
    """Copy a GGUF file with every quantised or half-precision tensor dequantised to F32 and all metadata kept.

    Tensors are converted one at a time. The copy is written beside ``target`` and renamed, so that an interrupted run
    never leaves a truncated model under the final name.
    """
    gguf = require("gguf", "gguf")
    f32 = gguf.GGMLQuantizationType.F32
    untouched = {f32} | {getattr(gguf.GGMLQuantizationType, name) for name in ("F64", "I8", "I16", "I32", "I64")}
    reader = gguf.GGUFReader(str(source))
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
        writer = gguf.GGUFWriter(str(partial), architecture, endianess=reader.endianess)
        writer.data_alignment = reader.alignment
        for field in reader.fields.values():
            # The writer itself emits the header fields and the architecture.
            if field.name == gguf.Keys.General.ARCHITECTURE or field.name.startswith("GGUF."):
                continue
            kind = field.types[0]
            sub_kind = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_kind)
        for tensor in reader.tensors:
            if tensor.tensor_type in untouched:
                writer.add_tensor_info(
                    tensor.name,
                    tensor.data.shape,
                    tensor.data.dtype,
                    tensor.data.nbytes,
                    tensor.tensor_type,
                )
            else:
                shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest axis first
                writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * int(np.prod(shape)), f32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            data = tensor.data
            if tensor.tensor_type not in untouched:
                data = gguf.quants.dequantize(data, tensor.tensor_type).astype(np.float32, copy=False)
            writer.write_tensor_data(data)
        writer.close()
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def tokenize(model_path: Path, text: bytes, count: int) -> list[int]:
    """First ``count`` tokens of ``text``, BOS included, from the tokenizer stored in the model file."""
    llama_cpp = require("llama_cpp", "llama-cpp-python")
    model = llama_cpp.Llama(model_path=str(model_path), vocab_only=True, verbose=False)
    try:
        tokens = [int(token) for token in model.tokenize(text, add_bos=True, special=False)]
    finally:
        model.close()
    if len(tokens) < count:
        raise ReferenceRunError(f"the text has {len(tokens)} tokens but --tokens asks for {count}")
    return tokens[:count]


def evaluate(model_path: Path, tokens: list[int], threads: int, exact: bool) -> np.ndarray:
    """Logits of llama.cpp at every position, float32 [tokens, vocabulary], from one teacher-forced batch.

    ``exact`` asks for an F32 KV cache with flash attention and every form of offload switched off; otherwise the
    options are llama-cpp-python's defaults.
    """
    llama_cpp = require("llama_cpp", "llama-cpp-python")
    options: dict[str, Any] = {}
    if exact:
        options = {
            "type_k": llama_cpp.GGML_TYPE_F32,
            "type_v": llama_cpp.GGML_TYPE_F32,
            "flash_attn": False,
            "n_gpu_layers": 0,
            "offload_kqv": False,
            "op_offload": False,
        }
    count = len(tokens)
    model = llama_cpp.Llama(
        model_path=str(model_path),
        n_ctx=count,
        n_batch=count,
        n_ubatch=count,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        verbose=False,
        **options,
    )
    try:
        model.scores.fill(np.nan)  # the array starts uninitialised: make anything left unwritten visible
        model.eval(tokens)
        logits = np.array(model.scores[:count], dtype=np.float32)
    finally:
        model.close()
    if not np.isfinite(logits).all():
        raise ReferenceRunError(f"llama.cpp left non-finite or unwritten logits for {model_path.name}")
    return logits


def summarise(logits: np.ndarray, tokens: list[int], top: int) -> dict[str, Any]:
    """Per-position figures of one mode (see the module docstring for the keys)."""
    count = len(tokens)
    argmax = logits.argmax(axis=1)
    top_ids = np.empty((count, top), dtype=np.int64)
    logsumexp = np.empty(count, dtype=np.float64)
    for start in range(0, count, ROWS_PER_CHUNK):
        chunk = logits[start : start + ROWS_PER_CHUNK]
        rows = slice(start, start + len(chunk))
        candidates = np.argpartition(chunk, -top, axis=1)[:, -top:]
        candidates.sort(axis=1)  # equal logits then keep the order of their ids, as in argmax
        order = np.argsort(-np.take_along_axis(chunk, candidates, axis=1), axis=1, kind="stable")
        top_ids[rows] = np.take_along_axis(candidates, order, axis=1)
        wide = chunk.astype(np.float64)
        peak = wide.max(axis=1, keepdims=True)
        logsumexp[rows] = peak[:, 0] + np.log(np.exp(wide - peak).sum(axis=1))
    top_logits = np.take_along_axis(logits, top_ids, axis=1).astype(np.float64)
    nll = logsumexp[:-1] - logits[np.arange(count - 1), tokens[1:]].astype(np.float64)
    return {
        "mean_nll": round(float(nll.mean()), 6),
        "argmax": argmax.tolist(),
        "top_ids": top_ids.tolist(),
        "top_logits": rounded(top_logits),
        "logsumexp": rounded(logsumexp),
        "margin": rounded(top_logits[:, 0] - top_logits[:, 1]),
        "nll": rounded(nll),
    }


def rounded(values: np.ndarray) -> list[Any]:
    """Nested lists of floats rounded for the JSON file."""
    return np.round(values.astype(np.float64), DECIMALS).tolist()


def compare(
    reference: np.ndarray,
    other: np.ndarray,
    reference_summary: dict[str, Any],
    other_summary: dict[str, Any],
) -> dict[str, Any]:
    """Agreement of the ``q4`` mode (``other``) with the ``f32`` mode (``reference``)."""
    same = np.array(reference_summary["argmax"]) == np.array(other_summary["argmax"])
    clear = np.array(reference_summary["margin"]) > CLEAR_MARGIN
    nll_change = np.array(other_summary["nll"]) - np.array(reference_summary["nll"])
    largest, total = 0.0, 0.0
    for start in range(0, len(reference), ROWS_PER_CHUNK):
        rows = slice(start, start + ROWS_PER_CHUNK)
        change = np.abs(other[rows] - reference[rows])
        largest = max(largest, float(change.max()))
        total += float(change.sum(dtype=np.float64))
    return {
        "argmax_agreement": round(float(same.mean()), 6),
        "argmax_equal": int(same.sum()),
        "clear_margin": CLEAR_MARGIN,
        "clear_positions": int(clear.sum()),
        "clear_argmax_equal": int((same & clear).sum()),
        "mean_nll_difference": round(other_summary["mean_nll"] - reference_summary["mean_nll"], 6),
        "mean_abs_nll_difference": round(float(np.abs(nll_change).mean()), 6),
        "max_abs_logit_difference": round(largest, DECIMALS),
        "mean_abs_logit_difference": round(total / reference.size, DECIMALS),
    }


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file through a temporary name."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            np.save(file, array)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def build_reference(args: argparse.Namespace) -> dict[str, Any]:
    """Run both modes, save the logits and the summary, and return the summary."""
    for path in (args.model, args.text):
        if not path.is_file():
            raise ReferenceRunError(f"no such file: {path}")
    if args.tokens < 2 or args.top < 2 or args.threads < 1:
        raise ReferenceRunError("--tokens and --top must be at least 2 and --threads at least 1")
    llama_cpp = require("llama_cpp", "llama-cpp-python")
    require("gguf", "gguf")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    tokens = tokenize(args.model, args.text.read_bytes(), args.tokens)
    f32_model = args.output_dir / f"{args.model.stem}-f32.gguf"
    started = time.perf_counter()
    write_f32_copy(args.model, f32_model)
    print(f"wrote {f32_model} ({f32_model.stat().st_size:,} bytes) in {time.perf_counter() - started:.1f} s")

    logits: dict[str, np.ndarray] = {}
    modes: dict[str, dict[str, Any]] = {}
    for name, path, exact in (("f32", f32_model, True), ("q4", args.model, False)):
        started = time.perf_counter()
        logits[name] = evaluate(path, tokens, args.threads, exact)
        elapsed = time.perf_counter() - started
        modes[name] = summarise(logits[name], tokens, args.top)
        output = args.output_dir / f"{args.model.stem}_{name}_logits.npy"
        save_array(output, logits[name])
        print(f"{name}: mean NLL {modes[name]['mean_nll']:.6f}; {elapsed:.1f} s; wrote {output} {logits[name].shape}")

    summary = {
        "generator": "experiments/llama_cpp_reference.py",
        "llama_cpp_python": llama_cpp.__version__,
        "model": {
            "name": args.model.name,
            "bytes": args.model.stat().st_size,
            "sha256": sha256_of(args.model),
        },
        "text": {
            "name": args.text.name,
            "bytes": args.text.stat().st_size,
            "sha256": sha256_of(args.text),
        },
        "vocabulary": int(logits["f32"].shape[1]),
        "comparison": compare(logits["f32"], logits["q4"], modes["f32"], modes["q4"]),
        "tokens": tokens,
        "modes": modes,
    }
    write_text(args.json, json.dumps(summary, separators=(",", ":"), allow_nan=False) + "\n")
    print(f"wrote {args.json} ({args.json.stat().st_size:,} bytes)")
    return summary


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Command-line options."""
    parser = argparse.ArgumentParser(description="Write llama.cpp reference logits (F32 and native) for one text.")
    parser.add_argument("--model", type=Path, required=True, help="GGUF model file")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to evaluate")
    parser.add_argument("--tokens", type=int, default=512, help="tokens to use, BOS included (default: 512)")
    parser.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        help="folder for the F32 model and the full logits",
    )
    parser.add_argument("--json", type=Path, required=True, help="compact summary to write")
    parser.add_argument("--top", type=int, default=8, help="logits kept per position in the summary (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="llama.cpp threads (default: 2)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_arguments(argv)
    try:
        summary = build_reference(args)
    except ReferenceRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for key, value in summary["comparison"].items():
        print(f"  {key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
