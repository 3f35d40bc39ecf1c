"""A GGUF file written tensor by tensor, which appears under its name only when it is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from types import TracebackType

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from experiments.synthetic.recipe import Recipe, TensorSpec
from experiments.synthetic.vocabulary import add_metadata

_HEADER_BYTES = 64  # a tensor's entry and padding, roughly; and a token's


class GGUFSink:
    """`with GGUFSink(path, recipe) as sink: sink.write(...)` once for every tensor, in order.

    Leaving the block renames the file into place; leaving it by an exception removes it. OSError
    for a folder that is not there or cannot be written to, and for a disk without the room.
    """

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe
        self.waiting = list(recipe.tensors().values())
        self._staging = path.with_name(f".{path.name}.{os.getpid()}")
        self._writer = gguf.GGUFWriter(self._staging, "llama")

    def __enter__(self) -> GGUFSink:
        self._check_room()
        add_metadata(self._writer, self.recipe)
        for spec in self.waiting:
            self._announce(spec)
        try:
            self._writer.write_header_to_file()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self.waiting, f"{self.waiting[0].name} was never written"
                self._writer.close()
                os.replace(self._staging, self.path)
        finally:
            self._abandon()

    def write(self, name: str, data: torch.Tensor) -> None:
        """The next tensor: uint8 blocks [rows, row_bytes], or float32 [n] for a vector."""
        spec = self.waiting.pop(0)
        assert spec.name == name, f"{name} came where {spec.name} was due"
        self._writer.write_tensor_data(data.numpy())

    def _announce(self, spec: TensorSpec) -> None:
        shape = (spec.rows, spec.columns) if spec.rows else (spec.columns,)
        kind = GGMLQuantizationType(spec.type.ggml_id)
        # Not uint8, so that the writer takes the shape in weights.
        self._writer.add_tensor_info(spec.name, shape, np.dtype(np.float32), spec.nbytes, raw_dtype=kind)

    def _check_room(self) -> None:
        needed = sum(spec.nbytes + _HEADER_BYTES for spec in self.waiting) + _HEADER_BYTES * self.recipe.vocab_size
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(f"it needs {needed / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free")

    def _abandon(self) -> None:
        """Drop what was not renamed; closing flushes, which fails again on a full disk."""
        with contextlib.suppress(OSError):
            self._writer.close()
        self._staging.unlink(missing_ok=True)
