"""`pinfer convert`: every family from folder to GGUF and back, what is written and what is refused."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pinfer.cli.main import run
from pinfer.config import RunConfig
from pinfer.engine import SHIPPED_MODEL, load_engine
from pinfer.engine.mapped import fingerprint
from pinfer.files import appearing_folder
from pinfer.formats import open_model
from pinfer.formats.huggingface.rope import llama3_factors
from pinfer.formats.huggingface.write import write_folder
from pinfer.formats.model_config import model_config
from pinfer.formats.standard import computed_otherwise, write_standard
from pinfer.kernels.ops import dequantize
from pinfer.quant import BF16, F16, Q8_0, QuantType
from tests.hf_folders import IDS, folder_of
from tests.hf_models import FAMILIES, load_reference, make_folder, reference_logits
from tests.powerinfer_files import write_powerinfer

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# What config.json may have that says nothing about the function.
UNSAID = {
    "_sliding_window_pattern", "attention_dropout", "classifier_dropout", "dropout", "embd_pdrop", "hidden_dropout",
    "init_std", "initializer_range", "layerdrop", "max_window_layers", "output_router_logits", "pretraining_tp",
    "resid_pdrop", "router_aux_loss_coef", "router_jitter_noise", "transformers_version", "use_cache",
    "bos_token_id", "eos_token_id", "pad_token_id", "rope_theta", "rope_scaling", "rope_parameters",
}  # fmt: skip


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def there_and_back(folder: Path, out: Path) -> tuple[Path, Path]:
    """The folder as GGUF, and that as a folder again."""
    gguf, back = out / "model.gguf", out / "back"
    with open_model(folder) as file:
        write_standard(file, gguf, None, dequantize)
    with open_model(gguf) as file:
        write_folder(file, back, None, dequantize)
    return gguf, back


@pytest.mark.parametrize(
    ("name", "said"),
    [("prosparse", "silu in place of relu"), ("mistral-window", "attention without the window of 8"), ("gemma2", None)],
)
def test_what_llama_cpp_computes_otherwise_is_said(
    name: str, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(name, tmp_path / "hf")
    assert run(["convert", str(folder), "-o", str(tmp_path / "m.gguf")]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert ("llama.cpp will read the file, but compute" in told) == (said is not None)
    assert said is None or said in told


def test_weights_of_experts_that_llama_cpp_normalises_are_said() -> None:
    config = model_config(open_model(folder_of("qwen3-moe")))
    assert config.experts is not None and computed_otherwise(config) == []
    plain = dataclasses.replace(config, experts=dataclasses.replace(config.experts, normalised=False))
    assert computed_otherwise(plain) == ["experts' weights normalised"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_keeps_every_tensor(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = folder_of(name, dtype)
    _, back = there_and_back(folder, tmp_path)
    before, after = tensors_of(folder), tensors_of(back)
    assert before.keys() == after.keys()
    for tensor in before:
        one, two = before[tensor], after[tensor]
        assert (one.dtype, one.shape) == (two.dtype, two.shape), tensor
        if name.startswith("gemma") and "norm" in tensor and dtype is torch.float32:
            one, two = one + 1, two + 1  # all that the model sees of them, and all that GGUF has
        assert torch.equal(one, two), tensor


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_keeps_the_function(name: str, tmp_path: Path) -> None:
    """transformers computes the same, bit for bit, of both folders."""
    folder = folder_of(name)
    _, back = there_and_back(folder, tmp_path)
    expected = reference_logits(load_reference(name, folder), IDS)
    if FAMILIES[name].patch is None:
        model = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32, attn_implementation="eager").eval()
    else:
        model = load_reference(name, back)
    assert torch.equal(reference_logits(model, IDS), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_keeps_the_config(name: str, tmp_path: Path) -> None:
    folder = folder_of(name)
    _, back = there_and_back(folder, tmp_path)
    before, after = (json.loads((one / "config.json").read_text()) for one in (folder, back))
    names = {"num_local_experts": "num_experts"} if name == "qwen3-moe" else {}
    for key in before.keys() - UNSAID:
        stated = after.get(names.get(key, key))
        usual = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "multi_query": None}
        if stated is None and before[key] == usual.get(key):
            continue
        if key == "head_dim" and before[key] is None:  # width over heads
            continue
        if key in ("multi_query", "num_kv_heads", "layer_types", "enable_bias", "layer_norm_elementwise_affine"):
            continue  # spelled in several ways; the function is compared above
        if key in ("_remove_final_layer_norm", "ffn_hidden_size", "use_bidirectional_attention"):
            continue
        assert stated == before[key], key


@pytest.mark.parametrize("kind", [F16, BF16])
def test_types_are_converted(kind: object, tmp_path: Path) -> None:
    with open_model(folder_of("phi3")) as file:
        write_standard(file, tmp_path / "a.gguf", kind, dequantize)
        expected = dequantize(file.tensor("blk.1.ffn_up.weight"))
    with open_model(tmp_path / "a.gguf") as file:
        assert {str(info.type) for info in file.tensors.values() if len(info.shape) == 1} == {"F32"}
        assert file.info("blk.1.ffn_up.weight").type is kind
        found = dequantize(file.tensor("blk.1.ffn_up.weight"))
    dtype = torch.float16 if kind is F16 else torch.bfloat16
    assert torch.equal(found, expected.to(dtype).float())


def test_shards_hold_what_the_index_says(tmp_path: Path) -> None:
    with open_model(folder_of("qwen2")) as file:
        write_folder(file, tmp_path / "out", None, dequantize, shard_bytes=60_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert {name for name, where in index["weight_map"].items() if where == path.name} == load_file(path).keys()
    assert torch.equal(tensors_of(tmp_path / "out")["lm_head.weight"], tensors_of(folder_of("qwen2"))["lm_head.weight"])


def test_llama3_factors_are_those_of_transformers() -> None:
    rotary = load_reference("llama3", folder_of("llama3")).model.rotary_emb
    freqs = 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    factors = llama3_factors(10000.0, 16, 8.0, 64, 1.0, 4.0)
    torch.testing.assert_close(freqs / factors, rotary.inv_freq, rtol=1e-6, atol=0)
    assert factors.min() == 1 and factors.max() == 8 and len(factors.unique()) > 2


def test_command_writes_gguf_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf, back = tmp_path / "m.gguf", tmp_path / "back"
    assert run(["convert", str(folder_of("llama2")), "-o", str(gguf), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == gguf.stat().st_size
    assert run(["convert", str(gguf), "-o", str(back), "--type", "bf16"]) == 0
    assert (back / "tokenizer.json").is_file()
    assert {tensor.dtype for tensor in tensors_of(back).values()} == {torch.bfloat16}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "m.gguf"]


def test_forms_and_floats_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(SHIPPED_MODEL), "-o", str(tmp_path / "M.GGUF")]) == 0
    assert (tmp_path / "M.GGUF").is_file()
    for kind, said in (("keep", True), ("f16", False)):
        capsys.readouterr()
        assert run(["convert", str(SHIPPED_MODEL), "-o", str(tmp_path / kind), "--type", kind]) == 0
        assert ("Q8_0 became F16: a folder has floats alone" in capsys.readouterr().err) is said


def test_an_activation_that_llama_cpp_ignores_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It opens the file without a word and computes SiLU."""
    said = "llama.cpp will read the file, but compute silu in place of relu"
    for name, expected in (("relu-llama", True), ("llama2", False)):
        gguf = tmp_path / f"{name}.gguf"
        assert run(["convert", str(folder_of(name)), "-o", str(gguf)]) == 0
        assert (said in capsys.readouterr().err) is expected
        assert run(["quantize", str(gguf), "-o", str(tmp_path / "q"), "--type", "q8_0", "--force"]) == 0
        assert (said in capsys.readouterr().err) is expected
        assert run(["convert", str(gguf), "-o", str(tmp_path / name)]) == 0
        assert "llama.cpp" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="file systems of others hold Unicode names alone")
def test_a_folder_whose_name_is_no_unicode(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"model \xff")
    folder.symlink_to(folder_of("llama2"))
    assert run(["convert", str(folder), "-o", str(tmp_path / "m.gguf")]) == 0
    with open_model(tmp_path / "m.gguf") as file:
        assert file.metadata["general.name"] == "model ?"


def refused(arguments: list[object], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """The one line that a command line ends with."""
    assert run([str(one) for one in arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_what_is_there_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, said = folder_of("llama2"), partial(refused, capsys=capsys)
    old = tmp_path / "old.gguf"
    old.write_bytes(b"kept")
    assert "exists; --force" in said(["convert", source, "-o", old])
    assert old.read_bytes() == b"kept"
    assert run(["convert", str(source), "-o", str(old), "--force"]) == 0
    assert old.read_bytes()[:4] == b"GGUF"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    assert "is no model's folder" in said(["convert", old, "-o", mine, "--force"])
    assert (mine / "letter.txt").read_text() == "dear"
    assert "read from it" in said(["convert", old, "-o", old, "--force"])
    assert "read from it" in said(["convert", source, "-o", source, "--to", "hf", "--force"])
    assert "is a folder" in said(["convert", old, "-o", mine, "--to", "gguf", "--force"])


def test_outputs_that_cannot_be_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    for to in ("gguf", "hf"):
        below = tmp_path / "file" / "out"
        line = refused(["convert", SHIPPED_MODEL, "-o", below, "--to", to], capsys)
        assert line.endswith(f"{below}: {tmp_path / 'file'} is no folder")
    assert "-o is empty" in refused(["convert", SHIPPED_MODEL, "-o", ""], capsys)

    def read_only(*_: object, **__: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / ".out.1234.tmp"))

    monkeypatch.setattr("pinfer.files.tempfile.mkdtemp", read_only)
    line = refused(["convert", SHIPPED_MODEL, "-o", tmp_path / "out"], capsys, code=1)
    assert line.endswith(f"{tmp_path / 'out'}: Read-only file system")


@pytest.mark.parametrize(("name", "to"), [("SIGINT", "gguf"), ("SIGTERM", "hf"), ("SIGHUP", "gguf")])
def test_a_signal_leaves_nothing_half_written(name: str, to: str, tmp_path: Path) -> None:
    """As a scheduler, a closed terminal and Ctrl-C end a run; it is held where the file is half-written."""
    script = (
        "import os, signal\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # these tests may run under nohup
        "from pinfer.__main__ import main\n"
        "from pinfer.cli import convert\n"
        f"convert.dequantize = lambda _: os.kill(os.getpid(), signal.{name})\n"
        "main()\n"
    )
    arguments = ["convert", str(SHIPPED_MODEL), "-o", str(tmp_path / "out"), "--to", to, "--type", "f16"]
    process = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, timeout=120)
    assert process.returncode == 128 + getattr(signal, name)
    assert process.stderr.endswith(b"pinfer: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "model" and not str(source).endswith(".old"):
            raise PermissionError(errno.EACCES, "Permission denied", str(source))
        rename(source, target)

    monkeypatch.setattr("pinfer.files.os.rename", fails)
    with pytest.raises(PermissionError), appearing_folder(tmp_path / "model", replace=True) as made:
        (made / "config.json").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_a_device_is_not_replaced_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rename would put a file in the place of /dev/null for everyone; a pipe stands for it here."""
    device = tmp_path / "null"
    os.mkfifo(device)
    for command in (["convert", "--to", "gguf", "--force"], ["convert", "--to", "pinfer", "--force"]):
        assert f"{device}: this is no regular file" in refused([*command, SHIPPED_MODEL, "-o", device], capsys)
    assert run(["quantize", str(SHIPPED_MODEL), "-o", str(device), "--type", "q4_0"]) == 2
    assert device.is_fifo()
    assert list(tmp_path.iterdir()) == [device]


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_a_failure_leaves_nothing(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A weight that F16 cannot hold stops the writing in its middle."""
    folder = make_folder("qwen2", tmp_path / "big")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e6
    save_file(weights, folder / "model.safetensors")
    out = tmp_path / "out" / "new"
    line = refused(["convert", folder, "-o", out, "--to", to, "--type", "f16"], capsys)
    assert "ffn_down" in line and "1e+06" in line
    assert list(out.parent.iterdir()) == []


def test_what_a_killed_run_left_goes_once_it_is_old(tmp_path: Path) -> None:
    stale, fresh = tmp_path / ".out.a.tmp", tmp_path / ".out.b.tmp"
    for folder in (stale, fresh):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    for path in (stale / "model.safetensors", stale):
        os.utime(path, (0, 0))
    assert run(["convert", str(folder_of("llama2")), "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.b.tmp", "out"]


@pytest.mark.parametrize("to", ["gguf", "hf"])
def test_an_interrupt_leaves_what_was_there(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["convert", str(folder_of("llama2")), "-o", str(out), "--to", to, "--force"]
    assert run(command) == 0
    before = fingerprint(open_model(out))

    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("pinfer.cli.progress._Tenths.__call__", interrupted)
    assert run(command) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert fingerprint(open_model(out)) == before


def test_a_full_disk_is_said_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("pinfer.files.shutil.disk_usage", lambda _: usage(1000))
    for to in ("gguf", "hf"):
        line = refused(["convert", folder_of("llama2"), "-o", tmp_path / "out", "--to", to], capsys, code=1)
        assert "out" in line and "no room" in line.lower()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "value"), [("--type", "q4_k"), ("--to", "onnx")])
def test_unknown_values_are_named(option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert value in refused(["convert", folder_of("llama2"), "-o", tmp_path / "x", option, value], capsys)


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_powerinfers_files_become_standard(kind: QuantType, tmp_path: Path) -> None:
    """`down` is turned back, predictors and PowerInfer's keys go, and the model computes the same."""
    path = write_powerinfer(tmp_path / "model.powerinfer.gguf", "llama", kind)
    assert run(["convert", str(path), "-o", str(tmp_path / "model.gguf")]) == 0
    assert run(["convert", str(path), "-o", str(tmp_path / "folder"), "--type", "f32"]) == 0
    logits = []
    for one in (path, tmp_path / "model.gguf", tmp_path / "folder"):
        engine = load_engine(RunConfig(model=str(one), method="dense", precision="float32", threads=1))
        assert engine.config.activation == "relu"
        with engine.computing():
            logits.append(engine.model(torch.tensor([1, 5, 9]), engine.model.new_cache()))
    with open_model(tmp_path / "model.gguf") as file:
        assert not any(name.endswith(("fc1.weight", "ffn_down_t.weight")) for name in file.tensors)
        assert not any(key.startswith("powerinfer") for key in file.metadata)
    for found in logits[1:]:
        assert torch.cosine_similarity(found, logits[0]).min() > 0.999  # rows of Q8_0 are rounded anew where turned


def test_a_quantised_model_becomes_a_folder(tmp_path: Path) -> None:
    """The shipped model, whose Q8_0 becomes F16 where no type is asked for."""
    with open_model(SHIPPED_MODEL) as file:
        write_folder(file, tmp_path / "out", None, dequantize)
        expected = dequantize(file.tensor("blk.2.ffn_down.weight"))
        norm = file.vector("output_norm.weight")
    found = tensors_of(tmp_path / "out")
    assert torch.equal(found["model.layers.2.mlp.down_proj.weight"], expected.half())
    assert torch.equal(found["model.norm.weight"].float(), norm)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"], config["dtype"]) == ("llama", "relu", "float16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    engine = load_engine(RunConfig(method="dense", precision="float32", threads=1))
    with engine.computing():
        logits = engine.model(torch.tensor(IDS), engine.model.new_cache())
    assert torch.cosine_similarity(logits, reference_logits(model, IDS)).min() > 0.9999
