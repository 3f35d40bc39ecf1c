"""Loading and generating on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import Generation, load_engine
from pinfer.engine.load import calibration_tokens
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

GREEDY = SamplingConfig(temperature=0)
PROMPT = [104, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama") / "m.gguf")


def run(path: Path, prompt: list[int] = PROMPT, max_tokens: int | None = 12, **config: Any) -> Generation:
    options = {key: config.pop(key) for key in ("stop", "ignore_eos") if key in config}
    sampling = config.pop("sampling", GREEDY)
    engine = load_engine(RunConfig(model=str(path), **config))
    generation = Generation(engine, prompt, max_tokens=max_tokens, sampling=sampling, **options)
    pieces = list(generation)
    assert "".join(pieces) == generation.text
    return generation


def test_greedy_equals_repeated_whole_prefills(llama: Path) -> None:
    generation = run(llama, ignore_eos=True)
    engine = load_engine(RunConfig(model=str(llama), method="dense"))
    ids = list(PROMPT)
    with engine.computing():
        for _ in range(12):
            ids.append(int(engine.model(torch.tensor(ids), engine.model.new_cache(), last_only=True).argmax()))
    assert generation.ids == ids[len(PROMPT) :]
    assert generation.finish_reason == "length"
    assert generation.text == engine.tokenizer.decode(generation.ids)


def test_auto_runs_a_relu_model_sparse_with_the_dense_text(llama: Path) -> None:
    sparse, dense = run(llama), run(llama, method="dense")
    assert sparse.ids == dense.ids
    assert sparse.stats.density < 0.9
    assert dense.stats.density == 1.0


def test_hybrid_gives_the_same_text(llama: Path) -> None:
    assert run(llama, cold_fraction=0.4).ids == run(llama).ids


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_backend_gives_the_same_text(llama: Path, backend: str) -> None:
    assert run(llama, max_tokens=3, backend=backend).ids == run(llama, max_tokens=3).ids


def test_gate_threshold_runs_any_model_without_training(tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "g.gguf", d_ffn=256)
    half = run(path, sparsity=0.5, ignore_eos=True)
    assert 0.2 < half.stats.density < 0.8
    assert run(path, ignore_eos=True).stats.density == 1.0
    assert run(path, sparsity=0.0, ignore_eos=True).ids == run(path, ignore_eos=True).ids


def test_a_long_prompt_is_read_in_chunks(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(llama, prompt=PROMPT * 8)
    monkeypatch.setattr("pinfer.engine.generate.PREFILL_CHUNK", 7)
    assert run(llama, prompt=PROMPT * 8).ids == whole.ids


def test_the_context_ends_an_endless_generation(llama: Path) -> None:
    generation = run(llama, max_tokens=None, context=16, ignore_eos=True)
    assert len(generation.ids) == 16 - len(PROMPT)
    assert generation.finish_reason == "context"
    beyond = run(llama, max_tokens=50, context=16, ignore_eos=True)
    assert beyond.finish_reason == "context"


def test_end_of_text_ends_and_can_be_ignored(llama: Path) -> None:
    engine = load_engine(RunConfig(model=str(llama)))
    first = run(llama).ids[0]
    engine.tokenizer.eog_ids = frozenset({first})
    generation = Generation(engine, PROMPT, max_tokens=5, sampling=GREEDY)
    assert list(generation) == []
    assert (generation.finish_reason, generation.ids) == ("eos", [])
    ignoring = Generation(engine, PROMPT, max_tokens=5, sampling=GREEDY, ignore_eos=True)
    list(ignoring)
    assert len(ignoring.ids) == 5


def test_a_stop_string_ends(llama: Path) -> None:
    free = run(llama, max_tokens=12)
    stop = next(character for character in free.text[2:] if character.isascii())
    stopped = run(llama, max_tokens=12, stop=[stop])
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert len(stopped.ids) < len(free.ids)


def test_zero_tokens_reads_the_prompt_alone(llama: Path) -> None:
    generation = run(llama, max_tokens=0)
    assert generation.ids == []
    assert generation.stats.prefill_tokens_per_s > 0
    assert generation.stats.tokens_per_s == 0
    assert generation.stats.density < 1


def test_equal_seeds_give_equal_texts(llama: Path) -> None:
    sampling = SamplingConfig(temperature=2.0, seed=11)
    assert run(llama, sampling=sampling).ids == run(llama, sampling=sampling).ids
    assert run(llama, sampling=SamplingConfig(temperature=2.0, seed=12)).ids != run(llama, sampling=sampling).ids


def test_bad_prompts_are_refused_before_any_compute(llama: Path) -> None:
    with pytest.raises(ValueError, match="the prompt is empty"):
        run(llama, prompt=[])
    with pytest.raises(ValueError, match=r"16 tokens.*holds 16.*limit is 256"):
        run(llama, prompt=[1] * 16, context=16)
    with pytest.raises(ValueError, match="at least 0, not -3"):
        run(llama, max_tokens=-3)


def test_activation_can_be_overridden(llama: Path) -> None:
    engine = load_engine(RunConfig(model=str(llama), activation="silu"))
    assert engine.config.activation == "silu"
    assert engine.method == "dense"


def test_context_defaults_to_the_models_limit_when_that_is_small(llama: Path) -> None:
    assert load_engine(RunConfig(model=str(llama))).model.context == 256
    assert load_engine(RunConfig(model=str(llama), context=0)).model.context == 256
    with pytest.raises(ValueError, match="256"):
        load_engine(RunConfig(model=str(llama), context=257))


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(b"llama.vocab_size") + len("llama.vocab_size") + 4
    data[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"tokenizer has 264 tokens|token_embd"):
        load_engine(RunConfig(model=str(path)))


def test_calibration_tokens_come_from_all_over_the_text(llama: Path) -> None:
    tokenizer = load_engine(RunConfig(model=str(llama))).tokenizer
    text = "a" * 300 + "b" * 300 + "c" * 300 + "d" * 300
    tokens = calibration_tokens(tokenizer, text, 41)
    assert len(tokens) <= 41
    assert set(tokenizer.decode(tokens.tolist())) == set("abcd")
    short = calibration_tokens(tokenizer, "abc", 100)
    assert tokenizer.decode(short.tolist()) == "abc"
