"""Hugging Face folders as model files: what is read of them, what runs on them, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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
from tests.hf_folders import IDS, edit, folder_of, refused
from tests.hf_models import FAMILIES, FATRELU_CUTOFF, load_reference, make_folder, reference_logits


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


def test_folders_are_known_by_their_class(llama: Path) -> None:
    file = open_model(llama)
    assert isinstance(file, HFFolder)
    assert file.format == "Hugging Face folder (llama, 1 shard)"
    with pytest.raises(FileNotFoundError):
        open_model(llama / "nothing")
