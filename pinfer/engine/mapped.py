"""What tells a model from others without reading it whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from pinfer.formats import ModelFile, TensorInfo
from pinfer.formats.model_file import Part

SAMPLE_BYTES, SAMPLES, PART_SAMPLES = 4096, 64, 8


def fingerprint(file: ModelFile, *, timed: bool = True) -> str:
    """What tells a model from others without reading it whole, as 32 hexadecimal digits.

    A hash, over each of its parts, of its size and the time of its last change, its header, both ends of each layer's
    `down` and pieces from all over, SAMPLES in all and at least PART_SAMPLES. The time stands for what lies between the samples: a file that is
    edited in place is another one, and so is a copy that does not keep its time. Without `timed` it is left
    out, for what is to stay valid for a copy of the model elsewhere.
    """
    digest = hashlib.sha256()
    samples = max(PART_SAMPLES, SAMPLES // len(file.parts))
    for number, part in enumerate(file.parts):
        tensors = [info for info in file.tensors.values() if info.part == number]
        digest.update(f"{part.data.numel()} {part.path.stat().st_mtime_ns if timed else 0}".encode())
        for piece in _pieces(part, tensors, samples):
            digest.update(piece.numpy().data)
    return digest.hexdigest()[:32]


def _pieces(part: Part, tensors: list[TensorInfo], samples: int) -> Iterator[torch.Tensor]:
    """What a fingerprint reads of one part."""
    data, size = part.data, part.data.numel()
    yield data[: part.header_bytes or min((info.offset for info in tensors), default=size)]
    for info in sorted(tensors, key=lambda info: info.name):
        if info.name.endswith(("ffn_down.weight", "ffn_down_t.weight", "ffn_down_exps.weight")):
            flat = data[info.offset : info.offset + info.nbytes]
            yield flat[:SAMPLE_BYTES]
            yield flat[-SAMPLE_BYTES:]
    for i in range(samples):
        start = i * max(0, size - SAMPLE_BYTES) // (samples - 1)
        yield data[start : start + SAMPLE_BYTES]
