"""Letting go of the mapped pages of a model's file that are no longer read."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

from pinfer.formats.model_file import MADE, ModelFile
from pinfer.quant import QuantTensor

MADV_DONTNEED = 4  # of Linux


def release_pages(weight: QuantTensor) -> None:
    """Let go of the memory behind a tensor of a ModelFile: a clean mapping, read again from the file where it is used."""
    release_bytes(weight.blocks)


def release_bytes(mapped: torch.Tensor) -> None:
    """The same for any contiguous run of a mapping's bytes."""
    if sys.platform != "linux":
        return
    address, page = mapped.data_ptr(), mmap.PAGESIZE
    start = -(-address // page) * page
    length = (address + mapped.nbytes - start) // page * page
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(MADV_DONTNEED))


def release_tensor(file: ModelFile, name: str) -> None:
    """Let go of the pages behind a tensor of a file; one that the file makes when it is asked for has none."""
    info = file.info(name)
    if info.part != MADE:
        release_bytes(file.parts[info.part].data[info.offset : info.offset + info.nbytes])


def is_mapped(blocks: torch.Tensor, file: ModelFile) -> bool:
    """Whether bytes are a view of the file, and no copy: only then may their pages be let go of."""
    return blocks.untyped_storage().data_ptr() in {part.data.untyped_storage().data_ptr() for part in file.parts}
