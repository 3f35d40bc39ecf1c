"""Hugging Face folders as model files: what is read of them, what runs on them, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pinfer.cli.main import run
from pinfer.config import RunConfig
from pinfer.engine import load_engine
from pinfer.engine.mapped import _pieces, fingerprint
from pinfer.engine.prepared import Prepared
from pinfer.formats import open_model
from pinfer.formats.errors import FormatError
from pinfer.formats.huggingface.folder import HFFolder
from pinfer.formats.model_config import check_tensors, model_config
from pinfer.formats.model_file import MADE
from tests.hf_models import FAMILIES, FATRELU_CUTOFF, load_reference, make_folder, reference_logits

IDS = [1, 17, 300, 42, 42, 260, 99, 401, 7, 311, 28, 133, 8, 9, 10, 11]


@cache
def folder_of(name: str) -> Path:
    return make_folder(name, Path(mkdtemp(prefix="folder-")) / name)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A folder to be spoiled: one shard, ten tensors a layer."""
    return Path(shutil.copytree(folder_of("relu-llama"), tmp_path / "llama"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_transformers_does(name: str) -> None:
    """Prefill at once and token by token, straight from the folder."""
    folder = folder_of(name)
    expected = reference_logits(load_reference(name, folder), IDS)
    # Up to Phi-3's original context it is the short factors, as transformers takes them for a short text.
    engine = load_engine(RunConfig(model=str(folder), precision="float32", method="dense", context=32, threads=1))
    ids = torch.tensor(IDS)
    with engine.computing():
        cache = engine.model.new_cache()
        prefill = engine.model(ids[:-4], cache)
        steps = [engine.model(ids[place : place + 1], cache) for place in range(len(IDS) - 4, len(IDS))]
    found = torch.cat([prefill, *steps])
    assert torch.cosine_similarity(found, expected).min() >= 0.9999
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama2", "qwen2", "phi3", "falcon-7b"])
def test_what_need_not_change_is_a_view(name: str) -> None:
    with open_model(folder_of(name)) as file:
        mapped = {part.data.untyped_storage().data_ptr() for part in file.parts}
        for tensor, info in file.tensors.items():
            is_view = file.raw(tensor).untyped_storage().data_ptr() in mapped
            changed = name == "llama2" and tensor.endswith(("attn_q.weight", "attn_k.weight"))
            assert is_view is not changed, tensor
            assert (info.part == MADE) is changed, tensor
            assert file.raw(tensor).numel() == info.nbytes


def test_metadata_are_those_of_llama_cpps_converter() -> None:
    with open_model(folder_of("gemma3")) as file:
        assert file.architecture == "gemma3"
        stated = {key: value for key, value in file.metadata.items() if key.startswith("gemma3.")}
    assert stated == {
        "gemma3.vocab_size": 512,
        "gemma3.embedding_length": 64,
        "gemma3.block_count": 4,
        "gemma3.attention.head_count": 4,
        "gemma3.attention.head_count_kv": 2,
        "gemma3.feed_forward_length": 96,
        "gemma3.context_length": 128,
        "gemma3.attention.layer_norm_rms_epsilon": 1e-5,
        "gemma3.attention.sliding_window": 8,
        "gemma3.attention.sliding_window_pattern": [True, True, False, True],
        "gemma3.attention.key_length": 32,
        "gemma3.attention.value_length": 32,
        "gemma3.attention.scale": 24**-0.5,
        "gemma3.rope.freq_base": 1e6,
        "gemma3.rope.freq_base_swa": 10000.0,
        "gemma3.rope.dimension_count": 32,
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": 8.0,
    }


def test_own_functions_of_sparse_models() -> None:
    prosparse, bamboo = (model_config(open_model(folder_of(name))) for name in ("prosparse", "bamboo"))
    assert (prosparse.activation, prosparse.cutoff) == ("relu", FATRELU_CUTOFF)
    assert bamboo.activation == "drelu"


def test_the_text_part_of_a_model_with_images(tmp_path: Path) -> None:
    """As Gemma 3 from 4B on is published: the text model's config and tensors one level down."""
    text = folder_of("gemma3")
    weights = {f"language_model.{name}": weight for name, weight in load_file(text / "model.safetensors").items()} | {
        "vision_tower.vision_model.post_layernorm.weight": torch.zeros(4)
    }
    save_file(weights, tmp_path / "model.safetensors")
    inner = json.loads((text / "config.json").read_text())
    for usual in ("tie_word_embeddings", "hidden_activation"):
        del inner[usual]
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    with open_model(tmp_path) as file, open_model(text) as alone:
        check_tensors(file, model_config(file))
        assert file.tensors.keys() == alone.tensors.keys()
        assert all(torch.equal(file.raw(name), alone.raw(name)) for name in alone.tensors)
        stated = {key: value for key, value in alone.metadata.items() if key.startswith("gemma3.")}
        assert {key: file.metadata.get(key) for key in stated} == stated
    edit(tmp_path, quantization_config={"quant_method": "awq"})
    refused(tmp_path, "awq")


def test_turbosparse_predictors_are_left_aside(tmp_path: Path) -> None:
    folder = make_folder("turbosparse", tmp_path / "turbo")
    path = folder / "model.safetensors"
    extra = {
        f"model.layers.{layer}.mlp.predictor.fc{n}.weight": torch.zeros(32, 64) for layer in range(3) for n in (1, 2)
    }
    save_file(load_file(path) | extra, path)
    with open_model(folder) as file:
        check_tensors(file, model_config(file))


def test_config_json_names_the_folder_too(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(llama / "config.json") as file:
        assert file.path == llama
    monkeypatch.chdir(llama)
    with open_model(".") as file:
        assert file.path == llama.resolve()


def test_a_closed_folder_says_so(llama: Path) -> None:
    file = open_model(llama)
    kept = file.tensor("blk.0.ffn_up.weight")
    file.close()
    for name in ("blk.0.ffn_up.weight", "blk.0.attn_q.weight"):
        with pytest.raises(ValueError, match="is closed"):
            file.tensor(name)
    assert kept.blocks.sum() > 0


def test_unaligned_tensors_are_copied(llama: Path) -> None:
    """A header whose length is odd, which the library does not write but allows."""
    path = llama / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    with open_model(llama) as file, open_model(folder_of("relu-llama")) as sound:
        for name in sound.tensors:
            assert torch.equal(file.raw(name), sound.raw(name))
            assert file.raw(name).storage_offset() % 4 == 0


def test_fingerprint_is_over_config_and_weights(llama: Path) -> None:
    before = fingerprint(open_model(llama), timed=False)
    assert fingerprint(open_model(llama), timed=False) == before
    config = llama / "config.json"
    config.write_text(config.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 10001.0'))
    assert fingerprint(open_model(llama), timed=False) != before


def test_a_fingerprint_reads_headers_alone_of_what_is_made(tmp_path: Path) -> None:
    """A shard of experts holds nothing that is shown where it lies, and may be of any size."""
    folder = Path(shutil.copytree(folder_of("mixtral"), tmp_path / "mixtral"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: "experts.safetensors" if "experts" in name else "others.safetensors" for name in weights}
    for shard in set(where.values()):
        save_file({name: one for name, one in weights.items() if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with open_model(folder) as file:
        assert [part.path.name for part in file.parts] == ["experts.safetensors", "others.safetensors", "config.json"]
        pieces = list(_pieces(file.parts[0], [info for info in file.tensors.values() if info.part == 0], 8))
        assert len(pieces[0]) == 8 + int.from_bytes((folder / "experts.safetensors").read_bytes()[:8], "little")
        expert = weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
        found = file.expert("blk.1.ffn_down_exps.weight", 2)
        assert torch.equal(found.blocks.view(torch.float32), expert)
        mapped = {part.data.untyped_storage().data_ptr() for part in file.parts}
        assert found.blocks.untyped_storage().data_ptr() in mapped
        for number in (-1, 4):
            with pytest.raises(FormatError, match="has no matrix"):
                file.expert("blk.1.ffn_down_exps.weight", number)


def test_kept_files_lie_beside_the_folder(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pinfer.engine.prepared.CACHE_FROM_BYTES", 0)
    monkeypatch.delenv("PINFER_NO_CACHE", raising=False)
    with open_model(llama) as file:
        config = model_config(file)
        prepared = Prepared(file, config)
        down, _ = prepared.downs()(1, None)
        assert not prepared.notes
        expected = load_file(llama / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert down.shape == tuple(expected.shape[::-1])
    assert (llama.parent / "llama.pinfer-down.gguf").is_file()


def test_commands_take_folders(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(llama), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["architecture"], figures["layers"], figures["tensor_count"]) == ("llama", 3, 30)
    assert figures["weights_bytes"] == sum(tensor.nbytes for tensor in load_file(llama / "model.safetensors").values())
    options = ["-m", str(llama), "-p", "Once", "-n", "4", "--temp", "0", "-t", "1"]
    assert run(["generate", *options, "--method", "exact"]) == 0
    sparse = capsys.readouterr().out
    assert run(["generate", *options, "--method", "dense"]) == 0
    assert capsys.readouterr().out == sparse


# What is refused.


def refused(folder: Path, *said: str) -> str:
    """The one typed error of a folder, which names what `said` names."""
    with pytest.raises(FormatError) as caught, open_model(folder) as file:
        check_tensors(file, model_config(file))
    text = str(caught.value)
    for one in said:
        assert one in text, text
    assert "\n" not in text
    return text


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


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


def test_folders_are_known_by_their_class(llama: Path) -> None:
    file = open_model(llama)
    assert isinstance(file, HFFolder)
    assert file.format == "Hugging Face folder (llama, 1 shard)"
    with pytest.raises(FileNotFoundError):
        open_model(llama / "nothing")
