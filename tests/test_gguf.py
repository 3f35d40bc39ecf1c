"""The GGUF reader on sound files: equal to gguf's own, and views that copy nothing."""

from __future__ import annotations

import gc
import resource
import struct
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from pinfer.formats.errors import FormatError
from pinfer.formats.gguf import UNSUPPORTED_TYPES, GGUFFile
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.quant import BY_ID
from tests.gguf_files import (
    ARRAY,
    BOOL,
    F64,
    STRING,
    U8,
    U32,
    WEIGHT_TYPES,
    gemma_file,
    key,
    raw_gguf,
    tensor,
    text,
    u32,
    u64,
    write_tiny_gemma3,
    write_tiny_llama,
)


class Oracle(gguf.GGUFReader):
    """gguf's reader over a plain array: its slices of a `np.memmap` take 12 s for Gemma, these 3 s."""

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value.view(np.ndarray) if name == "data" else value)


def assert_equals_oracle(path: Path) -> None:
    reader = Oracle(path)
    with GGUFFile.open(path) as file:
        assert file.version == reader.fields["GGUF.version"].contents()
        expected = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
        assert dict(file.metadata) == expected
        assert list(file.tensors) == [t.name for t in reader.tensors]
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert ours.shape == tuple(int(n) for n in reversed(theirs.shape))
            assert ours.type.name == theirs.tensor_type.name
            assert (ours.offset, ours.nbytes) == (theirs.data_offset, theirs.n_bytes)
            assert np.array_equal(file.tensor(theirs.name).blocks.numpy().ravel(), theirs.data.view(np.uint8).ravel())


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_llama_equals_oracle(tmp_path: Path, weight_type: str) -> None:
    assert_equals_oracle(write_tiny_llama(tmp_path / "m.gguf", weight_type=weight_type))


def test_gemma3_equals_oracle(tmp_path: Path) -> None:
    assert_equals_oracle(write_tiny_gemma3(tmp_path / "m.gguf"))


def test_every_value_type_equals_oracle(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    kinds = {"uint8": 255, "int8": -128, "uint16": 65535, "int16": -9, "uint32": 2**32 - 1, "int32": -(2**31)}
    for kind, value in {**kinds, "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.1, "float64": 0.1}.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    writer.add_bool("x.bool", True)
    writer.add_string("x.string", "é▁😀\0\n")
    for name, values in {"s": ["", "a", "ü"], "f": [1.5, -0.0], "b": [True, False], "i": [1, -2, 3]}.items():
        writer.add_array(f"x.{name}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equals_oracle(path)
    assert GGUFFile.open(path).metadata["x.bool"] is True


def test_nested_arrays_keep_their_nesting(tmp_path: Path) -> None:
    """gguf's reader flattens them."""
    inner = [u32(U8) + u64(2) + b"\1\2", u32(STRING) + u64(1) + text("a"), u32(F64) + u64(0)]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([key("n", ARRAY, u32(ARRAY) + u64(3) + b"".join(inner))]))
    assert GGUFFile.open(path).metadata["n"] == [[1, 2], ["a"], []]


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignments_equal_oracle(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for rows in (1, 3, 5):
        writer.add_tensor(f"t{rows}", np.arange(rows * 7, dtype=np.float32).reshape(rows, 7))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equals_oracle(path)


needs_gemma = pytest.mark.skipif(gemma_file() is None, reason="Gemma-3-270M is not installed")


@pytest.mark.real_model
@needs_gemma
def test_gemma_opens_with_its_config() -> None:
    path = gemma_file()
    assert path is not None
    file = GGUFFile.open(path)
    config = model_config(file)
    check_tensors(file, config)
    assert (config.n_layers, config.d_model, config.d_ffn, config.head_dim) == (18, 640, 2048, 256)
    assert (config.n_heads, config.n_kv_heads, config.vocab_size, config.sliding_window) == (4, 1, 262144, 512)
    assert config.sliding == ((True,) * 5 + (False,)) * 3
    assert {str(info.type) for info in file.tensors.values()} == {"F32", "Q8_0", "Q5_0", "Q4_K", "Q6_K"}


@pytest.mark.real_model
@needs_gemma
def test_gemma_equals_oracle() -> None:
    path = gemma_file()
    assert path is not None
    assert_equals_oracle(path)


# Views of the file


def test_tensors_are_views_without_warning(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf", weight_type="Q8_0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        file = GGUFFile.open(path)
        one, two = file.tensor("blk.0.ffn_gate.weight"), file.tensor("output_norm.weight")
    assert one.blocks.untyped_storage().data_ptr() == two.blocks.untyped_storage().data_ptr()
    assert one.shape == (96, 64) and two.shape == (1, 64)
    info = file.tensors["blk.0.ffn_gate.weight"]
    assert one.blocks.numpy().tobytes() == path.read_bytes()[info.offset : info.offset + info.nbytes]
    assert file.nbytes == sum(info.nbytes for info in file.tensors.values()) > 0


def test_tensors_outlive_the_file_and_then_release_it(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf")
    with GGUFFile.open(path) as file:
        weight = file.tensor("blk.0.ffn_up.weight")
    with pytest.raises(ValueError, match="closed"):
        file.tensor("blk.0.ffn_up.weight")
    del file
    gc.collect()
    assert weight.blocks.view(torch.float32).isfinite().all()
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text()
        del weight
        gc.collect()
        assert str(path) not in maps.read_text()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vector_is_float32(tmp_path: Path, dtype: type) -> None:
    values = np.array([1.5, -2, 0.25], dtype)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([], [tensor("v", [3], 0 if dtype is np.float32 else 1)], values.tobytes()))
    assert torch.equal(GGUFFile.open(path).vector("v"), torch.tensor([1.5, -2, 0.25]))


def test_vector_of_bfloat16(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([], [tensor("v", [2], 30)], bytes.fromhex("c03f00c0")))
    assert GGUFFile.open(path).vector("v").tolist() == [1.5, -2.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vector_refuses_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([], [tensor("blk.0.norm", [2])], struct.pack("<ff", 1, value)))
    with pytest.raises(FormatError, match=r"m\.gguf: tensor 'blk\.0\.norm' holds values that are not finite"):
        GGUFFile.open(path).vector("blk.0.norm")


def test_tensor_and_vector_name_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = [tensor("m", [2, 3]), tensor("c", [2, 3, 2, 2], offset=32), tensor("q", [32], 8, 128)]
    path.write_bytes(raw_gguf([], tensors, bytes(162)))
    file = GGUFFile.open(path)
    for call, words in (
        (lambda: file.tensor("x"), "tensor 'x' is missing"),
        (lambda: file.tensor("c"), r"tensor 'c' has shape \[2, 2, 3, 2\]"),
        (lambda: file.vector("m"), r"tensor 'm' is F32 \[3, 2\]"),
        (lambda: file.vector("q"), r"tensor 'q' is Q8_0 \[32\]"),
    ):
        with pytest.raises(FormatError, match=words):
            call()
    assert file.has("m") and not file.has("x")


def test_getters_check_types(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    strings = key("s", ARRAY, u32(STRING) + u64(2) + text("a") + text("b"))
    path.write_bytes(raw_gguf([key("n", U32, u32(3)), key("t", BOOL, b"\1"), strings]))
    file = GGUFFile.open(path)
    assert file.get("n", int) == 3 and file.get("n", float) == 3.0 and file.get("t", bool) is True
    assert file.get("x", int, 7) == 7 and file.get("x", str, None) is None
    assert file.get_list("s", str) == ["a", "b"] and file.get_list("x", int, None) is None
    for call, words in (
        (lambda: file.get("x", int), "'x' is missing"),
        (lambda: file.get("t", int), "'t' must be int, not bool"),
        (lambda: file.get("n", str, ""), "'n' must be str, not int"),
        (lambda: file.get_list("s", int), "'s' must hold int, not str"),
        (lambda: file.get_list("n", int), "'n' must be list, not int"),
    ):
        with pytest.raises(FormatError, match=words):
            call()


def test_sparse_file_of_40_gb_opens_in_little_memory(tmp_path: Path) -> None:
    rows, columns = 10_240, 1 << 20
    path = tmp_path / "m.gguf"
    path.write_bytes(raw_gguf([], [tensor("big", [columns, rows])]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with path.open("r+b") as out:
            out.truncate(path.stat().st_size + rows * columns * 4)
    except OSError:
        pytest.skip("no room for a sparse file of 43 GB")
    with GGUFFile.open(path) as file:
        assert file.nbytes > 40e9
        assert not file.tensor("big")[rows - 1 :].blocks[:, -4096:].any()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_all_ggml_types_are_named() -> None:
    known = UNSUPPORTED_TYPES | {number: kind.name for number, kind in BY_ID.items()}
    assert {int(kind): kind.name for kind in gguf.GGMLQuantizationType}.items() <= known.items()
    assert not set(UNSUPPORTED_TYPES) & set(BY_ID)
