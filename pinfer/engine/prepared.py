"""What is made of a model once and then kept beside it: its transposed `down`, its fitted predictors.

`<model>.pinfer-down.gguf` holds `blk.N.ffn_down_t.weight` [N, D], row i being neuron i's (PowerInfer's
name and layout), or one `blk.N.ffn_down_t.E.weight` for each expert E; fitted predictors are in
`<model>.pinfer-<method>-<settings>.safetensors`. Where the model's folder cannot be written, they
lie in the user's cache folder under the model's fingerprint.
Models below CACHE_FROM_BYTES are prepared in memory at each start, as all are with PINFER_NO_CACHE=1.

A file counts only if its format version, its model's fingerprint, its shapes and its checksums are
right; anything else is made again. It is written under a temporary name and renamed once it is on
the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from pinfer.config import ModelConfig
from pinfer.engine.mapped import fingerprint
from pinfer.ffn import DenseFFN
from pinfer.files import temporary
from pinfer.formats import ModelFile
from pinfer.formats.gguf import GGUFFile
from pinfer.formats.pages import release_pages
from pinfer.formats.powerinfer import down_rows
from pinfer.input_sparse_ffn import InputMajorWeights
from pinfer.kernels.cpp.build import cache_folder
from pinfer.kernels.transpose import transpose_weights
from pinfer.predictors import GateOf, Packed, Predictor, pack, unpack
from pinfer.predictors.low_rank import stored_type
from pinfer.quant import F32, QuantTensor, QuantType
from pinfer.sparsify import DownMaker, InputMajorMaker

FORMAT = 1
CACHE_FROM_BYTES = 64e6
ALIGNMENT = 32
BLANK = 64 * "0"  # in place of a SHA-256


class Prepared:
    """The prepared files of one model; `notes` says what was not as expected, one line each."""

    def __init__(
        self, source: ModelFile, config: ModelConfig, progress: Callable[[str], None] = lambda _: None
    ) -> None:
        self._file, self._config, self._tell = source, config, progress
        self._large = source.nbytes >= CACHE_FROM_BYTES
        self._kept = self._large and not os.environ.get("PINFER_NO_CACHE")
        self.notes: list[str] = []
        self._mapped = {part.data.data_ptr() for part in source.parts}

    def progress(self, step: str) -> None:
        """Tell of a layer's step where the model is large enough for it to take long."""
        if self._large:
            self._tell(step)

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self._file)

    def downs(self) -> DownMaker:
        """Each FFN's transposed `down`, by its number in `Transformer.ffns`.

        The model's own rows, or mapped from a file, which is written if need be, or made in memory.
        """
        if self._file.has(down_rows(0)):
            return lambda layer, _: (self._file.tensor(down_rows(layer)), 0.0)
        if not self._kept:
            return self._transposed
        suffix = ".pinfer-down.gguf"
        found = self._find(suffix, self._open_downs)
        if found is None:
            try:
                found = self._open_downs(self._write(suffix, self._downs_bytes(), self._fill_downs))
            except (OSError, ValueError) as problem:
                self.notes.append(f"the transposed down is not kept and stays in memory: {_said(problem)}")
                return self._transposed
        for number in range(self._n_ffns):  # calibration may have read them
            self.release(self._source(number))
        return found

    def release(self, weight: QuantTensor) -> None:
        """Let go of the pages of a mapped weight that has been copied; others are left alone."""
        if _storage(weight) in self._mapped:
            release_pages(weight)

    def input_major(self) -> InputMajorMaker:
        """Each layer's weights by input: `down` as of `downs`, gate and up transposed in memory at each start."""
        downs = self.downs()

        def made(layer: int, dense: DenseFFN) -> InputMajorWeights:
            down, down_error = downs(layer, dense)
            if not self._config.gated:
                gate, error = self._transposed(layer, matrix="up")
                return InputMajorWeights(gate, None, down, error, down_error, dense.gate_bias, dense.down_bias)
            (gate, gate_error), (up, up_error) = (self._transposed(layer, matrix=name) for name in ("gate", "up"))
            errors = (max(gate_error, up_error), down_error)
            return InputMajorWeights(gate, up, down, *errors, dense.gate_bias, dense.down_bias)

        return made

    def predictors(
        self, method: str, settings: dict[str, Any], fit: Callable[[], Sequence[Predictor]], gates: Sequence[GateOf]
    ) -> Sequence[Predictor]:
        """What `fit` makes under `settings` (plain data), for those gates: from their file, or fitted and then kept."""
        if not self._kept:
            return fit()
        key = json.dumps(settings, sort_keys=True)
        suffix = f".pinfer-{method.replace('_', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
        found = self._find(suffix, lambda path: self._open_predictors(path, key, gates))
        if found is not None:
            return found
        fitted = fit()
        content = _pack(fitted, {"format": str(FORMAT), "fingerprint": self._fingerprint, "settings": key})
        try:
            self._write(suffix, len(content), lambda file: file.write(content))
        except OSError as problem:
            self.notes.append(f"the fitted predictors are not kept: {_said(problem)}")
        return fitted

    def _places(self, suffix: str) -> list[Path]:
        places = [self._file.path.with_name(self._file.path.name + suffix)]
        with contextlib.suppress(RuntimeError):  # a user without a home
            places.append(cache_folder() / f"{self._fingerprint}{suffix}")
        return places

    def _find(self, suffix: str, opened: Callable[[Path], Any]) -> Any:
        """What `opened` makes of the first good file, or None; bad ones are noted where there is no good one."""
        problems = []
        for path in self._places(suffix):
            try:
                return opened(path)
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
                problems.append(f"{_said(problem, path)}: it is made again")
        self.notes += problems
        return None

    def _write(self, suffix: str, n_bytes: int, fill: Callable[[IO[bytes]], Any]) -> Path:
        """Have `fill` write a file of at most `n_bytes`, which appears whole or not at all; OSError says why not."""
        path, file = self._create(suffix)
        try:
            with file:
                if shutil.disk_usage(path.parent).free < n_bytes:
                    raise OSError(errno.ENOSPC, f"no room for {n_bytes / 1e6:.0f} MB", str(path.parent))
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self._file.parts[0].path, file.name)  # who may read the model may read this
            os.replace(file.name, path)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
        return path

    def _create(self, suffix: str) -> tuple[Path, IO[bytes]]:
        """Where a file is to lie, and a temporary one in that folder: the first of the places that can be written."""
        *places, last = self._places(suffix)
        for path in places:
            with contextlib.suppress(OSError):
                return path, temporary(path)
        return last, temporary(last)

    @property
    def _n_ffns(self) -> int:
        experts = self._config.experts
        return self._config.n_layers * (1 if experts is None else experts.count)

    def _source(self, number: int, matrix: str = "down") -> QuantTensor:
        """A matrix of the FFN of that number, which of a stack of experts is its rows."""
        experts = self._config.experts
        if experts is None:
            return self._file.tensor(f"blk.{number}.ffn_{matrix}.weight")
        layer, expert = divmod(number, experts.count)
        return self._file.expert(f"blk.{layer}.ffn_{matrix}_exps.weight", expert)

    def _turned(self, number: int) -> str:
        experts = self._config.experts
        if experts is None:
            return f"blk.{number}.ffn_down_t.weight"
        layer, expert = divmod(number, experts.count)
        return f"blk.{layer}.ffn_down_t.{expert}.weight"

    def _transposed(self, number: int, _: DenseFFN | None = None, *, matrix: str = "down") -> tuple[QuantTensor, float]:
        """A matrix of an FFN, transposed in memory; the pages it came from are let go."""
        layer = number * self._config.n_layers // self._n_ffns + 1
        self.progress(f"transposing {matrix}, layer {layer} of {self._config.n_layers}")
        turned = transpose_weights(self._source(number, matrix))
        self.release(self._source(number, matrix))
        return turned

    def _downs_bytes(self) -> int:
        """No less than the file of transposed weights takes."""
        sources = [self._source(number) for number in range(self._n_ffns)]
        return sum(max(down.nbytes, down.columns * stored_type(down.rows).row_bytes(down.rows)) for down in sources)

    def _fill_downs(self, file: IO[bytes]) -> None:
        """Layer by layer, and the header last: until then the file is none."""
        layers: list[tuple[QuantType, float, str]] = [(F32, 0.0, 8 * "0")] * self._n_ffns
        file.write(bytes(len(self._header(layers, 0))))
        for number in range(self._n_ffns):
            down, error = self._transposed(number)
            layers[number] = (down.type, error, _crc32(down))
            file.write(down.blocks.reshape(-1).numpy().data)
            file.write(bytes(-down.nbytes % ALIGNMENT))
        # Even seconds of the past, which no later change of the file can leave behind on any file
        # system: as long as the file has this time, its weights need not be read to be trusted.
        sealed_ns = (int(time.time()) // 2 * 2 - 2) * 10**9
        file.seek(0)
        file.write(self._header(layers, sealed_ns))
        file.flush()
        os.utime(file.name, ns=(sealed_ns, sealed_ns))

    def _header(self, layers: list[tuple[QuantType, float, str]], sealed_ns: int) -> bytes:
        """All that comes before the weights, of the same length whatever their (type, error, checksum)."""
        import gguf  # not needed where the file is there

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "header"
            writer = gguf.GGUFWriter(path, "pinfer-down")
            writer.add_uint32("pinfer.format", FORMAT)
            writer.add_string("pinfer.fingerprint", self._fingerprint)
            writer.add_uint64("pinfer.sealed_ns", sealed_ns)
            writer.add_array("pinfer.down_error", [error for _, error, _ in layers])
            writer.add_array("pinfer.down_crc32", [checksum for _, _, checksum in layers])
            for number, (kind, _, _) in enumerate(layers):
                width, neurons = self._source(number).shape
                bytes_shape, raw = (neurons, kind.row_bytes(width)), gguf.GGMLQuantizationType(kind.ggml_id)
                writer.add_tensor_info(
                    self._turned(number), bytes_shape, np.dtype(np.uint8), math.prod(bytes_shape), raw
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = path.read_bytes()
        return header + bytes(-len(header) % ALIGNMENT)

    def _open_downs(self, path: Path) -> DownMaker:
        """The file's tensors and errors, mapped; ValueError unless it is whole and this model's."""
        file = GGUFFile.open(path)
        self._check_stamp(file.get("pinfer.format", int), file.get("pinfer.fingerprint", str))
        errors, sums = file.get_list("pinfer.down_error", float), file.get_list("pinfer.down_crc32", str)
        downs = [file.tensor(self._turned(number)) for number in range(self._n_ffns)]
        expected = [self._source(number).shape[::-1] for number in range(self._n_ffns)]
        if [down.shape for down in downs] != expected or not len(errors) == len(sums) == len(downs):
            raise ValueError("its tensors are not those of this model")
        sealed_ns = file.get("pinfer.sealed_ns", int)
        if path.stat().st_mtime_ns != sealed_ns:
            for down, checksum in zip(downs, sums, strict=True):
                if _crc32(down) != checksum:
                    raise ValueError("its weights are damaged")
                release_pages(down)
            with contextlib.suppress(OSError):  # a sound copy, then: it need not be read whole again
                os.utime(path, ns=(sealed_ns, sealed_ns))
        self._mapped.add(_storage(downs[0]))
        return lambda number, _: (downs[number], errors[number])

    def _open_predictors(self, path: Path, key: str, gates: Sequence[GateOf]) -> list[Predictor]:
        metadata, tensors = _unpack(path.read_bytes())
        self._check_stamp(int(metadata["format"]), metadata["fingerprint"])
        if metadata["settings"] != key:
            raise ValueError("it was made under other settings")
        return unpack(Packed(tensors, json.loads(metadata["layers"])), gates)

    def _check_stamp(self, version: int, of_model: str) -> None:
        if version != FORMAT:
            raise ValueError(f"its format version is {version}, expected {FORMAT}")
        if of_model != self._fingerprint:
            raise ValueError("it was made from another model than the one it lies beside")


def _storage(weight: QuantTensor) -> int:
    """Where the memory begins that a weight is a view of: for those of a file, its whole mapping."""
    return weight.blocks.untyped_storage().data_ptr()


def _crc32(weight: QuantTensor) -> str:
    return f"{zlib.crc32(weight.blocks.reshape(-1).numpy().data):08x}"


def _said(problem: Exception, path: Path | None = None) -> str:
    """One line for a problem, naming its file."""
    if isinstance(problem, OSError) and problem.strerror:
        return f"{problem.filename or path}: {problem.strerror}"
    return str(problem) if path is None or str(path) in str(problem) else f"{path}: {problem}"


def _pack(predictors: Sequence[Predictor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose metadata gains what is no tensor, and a checksum of the whole file."""
    tensors, layers = pack(predictors)
    content = save_safetensors(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        metadata | {"layers": json.dumps(layers), "sha256": BLANK},
    )
    return content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def _unpack(content: bytes) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a file by `_pack`; ValueError or SafetensorError if it is damaged."""
    tensors = load_safetensors(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    checksum = metadata.get("sha256", "")
    if hashlib.sha256(content.replace(checksum.encode(), BLANK.encode(), 1)).hexdigest() != checksum:
        raise ValueError("it is damaged")
    return metadata, tensors
