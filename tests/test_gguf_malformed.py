"""The GGUF reader on files that are not sound: one FormatError, soon, in little memory."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pinfer.formats.errors import FormatError
from pinfer.formats.gguf import GGUFFile
from tests.gguf_files import (
    ARRAY,
    BOOL,
    F64,
    STRING,
    U8,
    U32,
    U64,
    Vocab,
    key,
    raw_gguf,
    tensor,
    text,
    u32,
    u64,
    write_tiny_llama,
)

# Each of these is refused in milliseconds; a hang ends here.
pytestmark = pytest.mark.timeout(60)

TWO_TOKENS = Vocab("gpt2", "gpt-2", ("a", "b"), (1, 1), merges=("a b",), special={"eos": 1})


def refused(path: Path, *needles: str) -> None:
    """Opening `path` must fail as promised: a FormatError with these words, in 100 MB, without hanging."""
    tracemalloc.start()
    with pytest.raises(FormatError) as caught:
        GGUFFile.open(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith(str(path)) and len(message) < 1000, message
    for needle in needles:
        assert needle in message
    assert peak < 100e6


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GGUFFile.open(tmp_path / "none.gguf")
    refused(tmp_path, "a directory")


def nested(depth: int) -> bytes:
    return b"".join(u32(ARRAY) + u64(1) for _ in range(depth)) + u32(U8) + u64(1) + b"\0"


N, S = [32], "general.alignment"
MALFORMED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("empty",)),
    "short magic": (b"GG", ("4 bytes expected at byte 0",)),
    "wrong magic": (raw_gguf(magic=b"ABCD"), ("b'ABCD'",)),
    "GGML": (raw_gguf(magic=b"lmgg"), ("GGML",)),
    "GGJT": (raw_gguf(magic=b"tjgg"), ("GGJT",)),
    "zip": (raw_gguf(magic=b"PK\3\4"), ("zip",)),
    "version 1": (raw_gguf(version=1), ("version 1 at byte 4",)),
    "version 4": (raw_gguf(version=4), ("version 4 at byte 4",)),
    "big-endian": (raw_gguf(version=3 << 24), ("big-endian",)),
    "2^63 tensors": (raw_gguf(n_tensors=1 << 63), ("tensor count 9223372036854775808 at byte 8",)),
    "2^63 keys": (raw_gguf(n_keys=1 << 63), ("key count 9223372036854775808 at byte 16",)),
    "more keys than bytes": (raw_gguf(n_keys=9), ("key count 9 at byte 16",)),
    "more tensors than bytes": (raw_gguf(n_tensors=9), ("tensor count 9 at byte 8",)),
    "key past the end": (raw_gguf([u64(1 << 40) + bytes(20)]), ("key 0", "1099511627776 at byte 24")),
    "key too long": (raw_gguf([key("k" * 70_000, U8, b"\0")]), ("70000", "limit 65535")),
    "key not UTF-8": (raw_gguf([key(b"\xff\xfe", U8, b"\0")]), ("key 0", "not UTF-8", "xff")),
    "empty key": (raw_gguf([key("", U8, b"\0\0\0")]), ("key 0 has an empty name",)),
    "duplicate key": (raw_gguf([key("a.b", U8, b"\0")] * 2), ("'a.b'", "twice")),
    "string past the end": (raw_gguf([key("a", STRING, u64(1 << 62))]), ("'a'", "length of its value")),
    "string not UTF-8": (raw_gguf([key("a", STRING, text(b"\xc3("))]), ("'a'", "not UTF-8")),
    "bool of 2": (raw_gguf([key("a", BOOL, b"\2")]), ("'a'", "neither 0 nor 1")),
    "unknown type": (raw_gguf([key("a", 13, bytes(8))]), ("'a'", "unknown value type 13")),
    "unknown item type": (raw_gguf([key("a", ARRAY, u32(99) + u64(1))]), ("'a'", "unknown value type 99")),
    "array of 2^63": (raw_gguf([key("a", ARRAY, u32(U8) + u64(1 << 63))]), ("'a'", "array length 9223372036854775808")),
    "array past the end": (raw_gguf([key("a", ARRAY, u32(U64) + u64(99))]), ("'a'", "array length 99")),
    "strings past the end": (
        raw_gguf([key("a", ARRAY, u32(STRING) + u64(2) + text("x") + u64(1 << 63))]),
        ("'a'", "item 1"),
    ),
    "item not UTF-8": (raw_gguf([key("a", ARRAY, u32(STRING) + u64(2) + text("x") + text(b"\xff"))]), ("item 1",)),
    "nested too deep": (raw_gguf([key("a", ARRAY, nested(5))]), ("'a'", "nested more than 4")),
    "nested very deep": (raw_gguf([key("a", ARRAY, nested(50_000))]), ("'a'", "nested more than 4")),
    "alignment 0": (raw_gguf([key(S, U32, u32(0))]), (S, "not 0")),
    "alignment 48": (raw_gguf([key(S, U32, u32(48))]), (S, "not 48")),
    "alignment 2^31": (raw_gguf([key(S, U32, u32(1 << 31))]), (S, "not 2147483648")),
    "alignment a string": (raw_gguf([key(S, STRING, text("32"))]), (S, "str")),
    "split": (raw_gguf([key("split.count", 2, b"\3\0")]), ("split.tensors.count", "missing")),
    "tensor name not UTF-8": (raw_gguf([], [tensor(b"\xff", N)]), ("tensor 0", "not UTF-8")),
    "tensor name too long": (raw_gguf([], [tensor("t" * 65, N)]), ("tensor 0", "limit 64")),
    "empty tensor name": (raw_gguf([], [tensor("", N) + bytes(8)]), ("tensor 0 has an empty name",)),
    "duplicate tensor": (raw_gguf([], [tensor("t", N)] * 2, bytes(128)), ("'t'", "twice")),
    "0 dimensions": (raw_gguf([], [tensor("t", []) + bytes(8)]), ("'t'", "0 dimensions")),
    "5 dimensions": (raw_gguf([], [tensor("t", [1] * 5)]), ("'t'", "5 dimensions")),
    "2^32-1 dimensions": (raw_gguf([], [text("t") + u32(2**32 - 1) + bytes(40)]), ("'t'", "4294967295 dimensions")),
    "dimension 0": (raw_gguf([], [tensor("t", [32, 0])]), ("'t'", "[32, 0]")),
    "overflowing": (raw_gguf([], [tensor("t", [1 << 62] * 4)], bytes(64)), ("'t'", "pass the file's end")),
    "overflow to 0": (raw_gguf([], [tensor("t", [1 << 32, 1 << 32])], bytes(64)), ("'t'", "pass the file's end")),
    "unknown tensor type": (raw_gguf([], [tensor("t", N, 77)], bytes(64)), ("'t'", "type 77 (unknown)", "Q4_K")),
    "IQ3_S": (raw_gguf([], [tensor("t", [256], 21)], bytes(110)), ("'t'", "IQ3_S", "not supported")),
    "no block multiple": (raw_gguf([], [tensor("t", [48, 2], 8)], bytes(128)), ("'t'", "48 columns", "Q8_0")),
    "offset past the end": (raw_gguf([], [tensor("t", N, 0, 1 << 50)]), ("'t'", "pass the file's end")),
    "offset 2^64-32": (raw_gguf([], [tensor("t", N, 0, 2**64 - 32)], bytes(128)), ("'t'", "pass the file's end")),
    "misaligned": (raw_gguf([], [tensor("t", N, 0, 4)], bytes(256)), ("'t'", "offset 4 is not 32-aligned")),
    "overlapping": (
        raw_gguf([], [tensor("t", [64], 0, 0), tensor("u", N, 0, 96)], bytes(256)),
        ("'t'", "'u'", "overlap at byte"),
    ),
    "same place": (raw_gguf([], [tensor("t", N), tensor("u", N)], bytes(256)), ("'t'", "'u'", "overlap")),
    "one byte short": (raw_gguf([], [tensor("t", N)], bytes(127)), ("'t'", "128 bytes", "end at byte")),
    "very long key": (raw_gguf([key("\n" * 60_000, 99, b"")]), ("...", "unknown value type 99")),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_one_error(tmp_path: Path, name: str) -> None:
    data, needles = MALFORMED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refused(path, *needles)


def test_special_file_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")


def test_a_file_that_was_not_fetched_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000000000\n")
    refused(tmp_path / "model.gguf", "git lfs pull")


@pytest.mark.parametrize("kind", [U8, STRING, ARRAY, F64])
def test_hostile_array_in_a_sparse_file(tmp_path: Path, kind: int) -> None:
    """Zeros for 40 GB are five thousand million empty strings; the limits stop there, not the memory."""
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw_gguf([key("a", ARRAY, u32(kind) + u64(3 << 30))]))
    try:
        with path.open("r+b") as out:
            out.truncate(40 * 10**9)
    except OSError:
        pytest.skip("no room for a sparse file of 40 GB")
    refused(path, "'a'", "array length 3221225472")


def test_truncation_anywhere(tmp_path: Path) -> None:
    shape: Any = {"n_layers": 1, "d_model": 32, "d_ffn": 32, "n_heads": 2, "n_kv_heads": 1}
    path = write_tiny_llama(tmp_path / "m.gguf", **shape, vocab=TWO_TOKENS, weight_type="Q4_0")
    with GGUFFile.open(path) as file:
        end = max(info.offset + info.nbytes for info in file.tensors.values())
    for length in range(end - 1, -1, -1):
        with path.open("r+b") as out:
            out.truncate(length)
        with pytest.raises(FormatError):
            GGUFFile.open(path)
