"""Hugging Face folders that are refused: one typed error, which names file and field."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pinfer.cli.main import run
from pinfer.formats import open_model
from pinfer.formats.errors import FormatError
from pinfer.formats.model_config import check_tensors, model_config
from tests.hf_folders import edit, folder_of, refused


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder to be spoiled: one shard, ten tensors a layer."""
    return Path(shutil.copytree(folder_of("relu-llama"), tmp_path / "llama"))


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "gptq": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("quantization_config", "gptq")),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, ("awq",)),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, ("quantization_config",)),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, ("fp8",)),
    "model_type": ({"model_type": "mamba"}, ("model_type", "'mamba'", "llama")),
    "no model_type": ({"model_type": None}, ("model_type is missing",)),
    "missing": ({"hidden_size": None}, ("config.json: hidden_size is missing",)),
    "text": ({"hidden_size": "64"}, ("hidden_size", "int")),
    "negative": ({"hidden_size": -64}, ("hidden_size", "-64")),
    "boolean": ({"num_hidden_layers": True}, ("num_hidden_layers",)),
    "layers": ({"num_hidden_layers": 2**31 - 1}, ("num_hidden_layers", "at most")),
    "few layers": ({"num_hidden_layers": 2}, ("model.layers.2.", "is not supported for llama")),
    "many layers": ({"num_hidden_layers": 4}, ("'model.layers.3.input_layernorm.weight' is missing",)),
    "heads": ({"num_key_value_heads": 3}, ("num_attention_heads", "multiple")),
    "odd heads": ({"head_dim": 15}, ("must be even",)),
    "width": ({"intermediate_size": 128}, ("mlp.gate_proj.weight", "[96, 64]", "[128, 64]")),
    "vocabulary": ({"vocab_size": 600}, ("model.embed_tokens.weight", "[512, 64]", "[600, 64]")),
    "epsilon": ({"rms_norm_eps": 0.0}, ("rms_norm_eps",)),
    "activation": ({"hidden_act": "mish"}, ("hidden_act", "'mish'", "silu")),
    "cutoff": ({"hidden_act": "fatrelu", "hidden_act_param": -1}, ("hidden_act_param", "-1")),
    "bias": ({"attention_bias": True}, ("attention_bias",)),
    "scaling": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, ("rope_scaling", "'dynamic'", "yarn")),
    "factor": ({"rope_scaling": {"rope_type": "linear"}}, ("rope_scaling.factor",)),
    "factor text": ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, ("rope_scaling.factor", "not a number")),
    "factor zero": ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ("rope_scaling.factor", "positive")),
    "scaling list": ({"rope_scaling": [1]}, ("rope_scaling", "not an object")),
    "mscale": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, ("mscale", "not supported")),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}},
        ("low_freq_factor",),
    ),
    "longrope": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        ("short_factor must hold 8",),
    ),
    "theta": ({"rope_theta": -1.0}, ("rope_theta",)),
    "partial": ({"partial_rotary_factor": 0.2}, ("partial_rotary_factor", "3 of 16")),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(case: str, llama: Path) -> None:
    fields, said = CONFIGS[case]
    edit(llama, **fields)
    refused(llama, "config.json" if "model.layers" not in said[0] and "gate_proj" not in said[0] else "llama", *said)


FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "alibi": ("falcon-7b", {"alibi": True}, "alibi"),
    "sequential": ("falcon-7b", {"parallel_attn": False}, "parallel_attn"),
    "post-norm": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    "projection": ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim"),
    "window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    "dense layers": ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    "layer types": ("gemma3", {"layer_types": ["full_attention"]}, "layer_types has 1 items for 4 layers"),
    "layer type": ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "layer_types[0]"),
    "caps": ("gemma3", {"attn_logit_softcapping": 5.0}, "attn_logit_softcapping"),
    "both ways": ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "experts": ("mixtral", {"num_local_experts": 5}, "block_sparse_moe.gate.weight' has shape [4, 64]"),
    "many experts": ("mixtral", {"num_local_experts": 2**30}, "num_local_experts"),
}


@pytest.mark.parametrize("case", FAMILY_CONFIGS)
def test_configs_of_families_that_are_refused(case: str, tmp_path: Path) -> None:
    name, fields, said = FAMILY_CONFIGS[case]
    folder = Path(shutil.copytree(folder_of(name), tmp_path / name))
    edit(folder, **fields)
    refused(folder, said)


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _gguf_folder(folder: Path) -> None:
    (folder / "config.json").rename(folder / "model-q4_k_m.gguf")


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"')


def _config_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def _index(weight_map: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def _pointer(name: str) -> Callable[[Path], None]:
    """What git clone without LFS leaves of a large file."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4000000000\n"

    def write(folder: Path) -> None:
        (folder / name).write_text(text)

    return write


def _dangling(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/0123")


def _drop(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors")

    return write


def _add(**tensors: torch.Tensor) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")

    return write


NORM = "model.norm.weight"
FOLDERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no weights": (_without_weights, ("neither model.safetensors nor model.safetensors.index.json",)),
    "pickled": (_pickled, ("pytorch_model.bin", "could run code")),
    "no config": (_no_config, ("no config.json",)),
    "a GGUF in it": (_gguf_folder, ("model-q4_k_m.gguf",)),
    "broken config": (_broken_config, ("config.json", "not JSON")),
    "config list": (_config_list, ("config.json", "not an object")),
    "index outside": (_index({NORM: "../other/model.safetensors"}), ("index.json", NORM, "in the folder")),
    "index absolute": (_index({NORM: "/etc/passwd"}), ("'/etc/passwd'",)),
    "index windows": (_index({NORM: "..\\model.safetensors"}), ("in the folder",)),
    "index dots": (_index({NORM: ".."}), ("in the folder",)),
    "index pickle": (_index({NORM: "pytorch_model.bin"}), ("only safetensors",)),
    "index number": (_index({NORM: 3}), ("weight_map", "str")),
    "index list": (_index([NORM]), ("weight_map",)),
    "index empty": (_index({}), ("weight_map names 0 files",)),
    "index missing shard": (
        _index({NORM: "model-00002-of-00002.safetensors"}),
        ("'model-00002-of-00002.safetensors'",),
    ),
    "index long name": (_index({NORM: "n" * 300 + ".safetensors"}), ("312 bytes", "at most 255")),
    "weights not fetched": (_pointer("model.safetensors"), ("model.safetensors", "git lfs pull")),
    "config not fetched": (_pointer("config.json"), ("config.json", "git lfs pull")),
    "dangling link": (_dangling, ("model.safetensors is a link to '../blobs/0123'", "missing")),
    "index wrong": (_index({"model.other": "model.safetensors"}), ("'model.other'", "does not hold it")),
    "index short": (_index({NORM: "model.safetensors"}), ("does not place there",)),
    "missing tensor": (_drop("model.layers.1.mlp.up_proj.weight"), ("'model.layers.1.mlp.up_proj.weight' is missing",)),
    "missing head": (_drop("lm_head.weight"), ("'lm_head.weight' is missing",)),
    "extra tensor": (_add(**{"model.layers.0.adapter": torch.zeros(2)}), ("'model.layers.0.adapter'", "llama")),
    "integers": (_add(**{NORM: torch.zeros(64, dtype=torch.int64)}), (NORM, "'I64'")),
    "fp8": (_add(**{NORM: torch.zeros(64).to(torch.float8_e4m3fn)}), (NORM, "quantised")),
    "misshapen": (_add(**{NORM: torch.zeros(64, 1)}), (NORM, "[64, 1]", "[64]")),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(case: str, llama: Path) -> None:
    spoil, said = FOLDERS[case]
    spoil(llama)
    refused(llama, str(llama), *said)


def with_header(folder: Path, header: Any, *, length: int | None = None, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    announced = len(raw) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", announced) + raw + data)


def entry(dtype: Any = "F32", shape: Any = (1,), ends: Any = (0, 4)) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": ends}}


HEADERS: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "short file": (b"", {"length": 2}, ("a header of 2 bytes",)),
    "long header": ({}, {"length": 2**63}, ("a header of",)),
    "past the end": ({}, {"length": 1000}, ("a header of 1000 bytes",)),
    "not JSON": (b"{{{{", {}, ("not JSON",)),
    "not UTF-8": (b'{"\xff": 1}', {}, ("not JSON",)),
    "nested": (b"[" * 100000, {}, ("not JSON",)),
    "a list": ([1], {}, ("no object but list",)),
    "twice": (b'{"a": {}, "a": {}}', {}, ("'a' twice",)),
    "entry": ({"a": 3}, {}, ("'a'", "no object")),
    "dtype": (entry(dtype=3), {}, ("dtype",)),
    "shape": (entry(shape=[-1]), {}, ("shape",)),
    "shape float": (entry(shape=[1.5]), {}, ("shape",)),
    "shape dimensions": (entry(shape=[1] * 99), {}, ("shape",)),
    "offsets": (entry(ends=[4, 0]), {"data": bytes(8)}, ("data_offsets",)),
    "offsets one": (entry(ends=[4]), {"data": bytes(8)}, ("data_offsets",)),
    "beyond": (entry(ends=[0, 4]), {"data": bytes(2)}, ("data_offsets end at 4", "2 bytes")),
    "huge": (entry(shape=[2**62], ends=[0, 4]), {"data": bytes(4)}, ("takes",)),
    "size": (entry(shape=[3], ends=[0, 4]), {"data": bytes(4)}, ("takes 12 bytes",)),
    "many": (
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(2**16 + 1)},
        {},
        ("65537 tensors", "at most 65536"),
    ),
    "overlap": (
        entry(ends=[0, 4]) | {"b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}},
        {"data": bytes(8)},
        ("overlaps",),
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_that_are_refused(case: str, llama: Path) -> None:
    header, options, said = HEADERS[case]
    with_header(llama, header, **options)
    refused(llama, "model.safetensors", *said)


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_one_file_of_a_folder_is_no_model(name: str, llama: Path) -> None:
    refused(llama / name, name, "name the folder")


def test_random_damage_to_a_header_is_a_typed_error(llama: Path) -> None:
    """Any byte of the header or the config may be any other; nothing else than FormatError comes of it."""
    random = torch.Generator().manual_seed(0)
    for name in ("model.safetensors", "config.json"):
        path = llama / name
        sound = path.read_bytes()
        end = 8 + int.from_bytes(sound[:8], "little") if name.endswith(".safetensors") else len(sound)
        for _ in range(150):
            raw = bytearray(sound)
            raw[int(torch.randint(end, (), generator=random))] = int(torch.randint(256, (), generator=random))
            path.write_bytes(raw)
            try:
                with open_model(llama) as file:
                    check_tensors(file, model_config(file))
            except FormatError as error:
                assert str(llama) in str(error)
        path.write_bytes(sound)


def test_the_command_line_says_it_in_one_line(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pickled(llama)
    for command in (
        ["inspect", str(llama)],
        ["generate", "-m", str(llama), "-p", "x"],
        ["convert", str(llama), "-o", str(llama.parent / "x.gguf")],
    ):
        assert run(command) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and len(captured.err.splitlines()) == 1
