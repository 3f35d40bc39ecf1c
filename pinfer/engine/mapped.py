"""The mapped pages of a model's file: what tells it from other files, and letting go of what is no longer read."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import sys

from pinfer.formats.gguf import GGUFFile
from pinfer.quant import QuantTensor

SAMPLE_BYTES, SAMPLES = 4096, 64
MADV_DONTNEED = 4  # of Linux


def fingerprint(gguf: GGUFFile, *, timed: bool = True) -> str:
    """What tells a model's file from others without reading it whole, as 32 hexadecimal digits.

    A hash of its size and the time of its last change, its header, both ends of each layer's `down` and
    SAMPLES pieces from all over. The time stands for what lies between the samples: a file that is
    edited in place is another one, and so is a copy that does not keep its time. Without `timed` it is left
    out, for what is to stay valid for a copy of the model elsewhere.
    """
    downs = [gguf.tensor(name).blocks for name in sorted(gguf.tensors) if name.endswith("ffn_down.weight")]
    size = downs[0].untyped_storage().nbytes()  # they are views of the whole mapping
    whole = downs[0].as_strided((size,), (1,), 0)
    pieces = [whole[: min(info.offset for info in gguf.tensors.values())]]
    for down in downs:
        flat = down.reshape(-1)
        pieces += [flat[:SAMPLE_BYTES], flat[-SAMPLE_BYTES:]]
    starts = (i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES))
    pieces += [whole[start : start + SAMPLE_BYTES] for start in starts]
    digest = hashlib.sha256(f"{size} {gguf.path.stat().st_mtime_ns if timed else 0}".encode())
    for piece in pieces:
        digest.update(piece.numpy().data)
    return digest.hexdigest()[:32]


def release_pages(weight: QuantTensor) -> None:
    """Let go of the memory behind a tensor of a GGUFFile: a clean mapping, read again from the file where it is used."""
    if sys.platform != "linux":
        return
    address, page = weight.blocks.data_ptr(), mmap.PAGESIZE
    start = -(-address // page) * page
    length = (address + weight.nbytes - start) // page * page
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), ctypes.c_int(MADV_DONTNEED))
