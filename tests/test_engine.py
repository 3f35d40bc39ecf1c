"""Loading and generating on tiny models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import Engine, Generation, load, load_engine, prepared
from pinfer.engine.step import DecodeStep
from pinfer.kernels import ops, planes
from pinfer.kernels.cpp import core_problem
from pinfer.kernels.registry import use_backend
from pinfer.quant import QuantTensor
from tests.gguf_files import write_tiny_gemma3, write_tiny_llama

GREEDY = SamplingConfig(temperature=0)
PROMPT = [104, 101, 108, 108, 111]
pytestmark = pytest.mark.usefixtures("quick_fits")


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


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("gemma3", {"method": "dense"}),
        ("llama", {"method": "exact"}),
        ("llama", {"method": "exact", "cold_fraction": 0.5}),
        ("gemma3", {"method": "gate_threshold", "sparsity": 0.4}),
        ("llama", {"method": "low_rank", "predictor_rank": 32}),
        ("llama", {"method": "input_threshold", "sparsity": 0.4}),
    ],
    ids=str,
)
def test_triton_has_its_weights_laid_out_when_loaded(
    tmp_path: Path, family: str, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    made_once = (load, "fit_predictors"), (load, "fit_input_thresholds"), (prepared, "transpose_weights")
    for module, name in made_once:
        monkeypatch.setattr(module, name, on_the_reference(getattr(module, name)))
    write = write_tiny_llama if family == "llama" else write_tiny_gemma3  # gemma3's head is its embedding
    path = str(write(tmp_path / "m.gguf", weight_type="Q8_0", n_layers=1))
    engine = load_engine(RunConfig(model=path, backend="triton", **method))
    weights = weights_of(engine.model)
    assert len(weights) >= 2 + 7
    assert {weight.layout for weight in weights} == {"planes"}
    assert (engine.model.head is engine.model.embedding) == (family == "gemma3")

    def logits(computed: Engine, backend: str) -> torch.Tensor:
        cache = computed.model.new_cache()
        with computed.computing(), use_backend(backend):
            parts = [computed.model(torch.tensor(tokens), cache) for tokens in ([7, 3], [5])]
        return torch.cat(parts)

    def refuse(*_: object) -> None:
        raise AssertionError("repacked after loading")

    monkeypatch.setattr(planes, "_rearrange", refuse)
    result = logits(engine, "triton")
    torch.testing.assert_close(result, logits(engine, "reference"), rtol=1e-4, atol=1e-4)
    if method["method"] in ("dense", "exact"):  # calibrated thresholds differ by the backends' rounding
        monkeypatch.undo()
        in_blocks = load_engine(RunConfig(model=path, backend="reference", **method))
        assert {weight.layout for weight in weights_of(in_blocks.model)} == {"blocks"}
        torch.testing.assert_close(result, logits(in_blocks, "reference"), rtol=1e-4, atol=1e-4)


def on_the_reference(calibrate: Callable[..., Any]) -> Callable[..., Any]:
    """The same, without the interpreter, which would take minutes."""

    def calibrated(*args: Any) -> Any:
        with use_backend("reference"):
            return calibrate(*args)

    return calibrated


def weights_of(model: torch.nn.Module) -> list[QuantTensor]:
    """Every matrix that the modules hold, one that is held twice counted twice."""
    seen = []
    for module in model.modules():
        held = list(vars(module).values())
        held += [part for one in held if dataclasses.is_dataclass(one) for part in vars(one).values()]
        seen += [one for one in held if isinstance(one, QuantTensor)]
    return seen


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
    assert (beyond.finish_reason, beyond.ids) == ("context", generation.ids)
    exact = run(llama, max_tokens=11, context=16, ignore_eos=True)
    assert exact.finish_reason == "length"


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
    assert first not in ignoring.ids


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


def test_density_is_that_of_decode_or_else_of_the_prompt(llama: Path) -> None:
    prompt_only, one, two = (run(llama, max_tokens=n, ignore_eos=True).stats for n in (0, 1, 2))
    assert one.density == prompt_only.density < 1
    assert one.tokens_per_s == 0
    assert two.decode_steps == 1
    assert two.density != one.density


def test_a_generation_runs_once(llama: Path) -> None:
    generation = run(llama)
    with pytest.raises(RuntimeError, match="once"):
        list(generation)


def test_a_generation_goes_on_from_another(llama: Path) -> None:
    engine = load_engine(RunConfig(model=str(llama)))
    first = Generation(engine, PROMPT, max_tokens=6, sampling=GREEDY, ignore_eos=True)
    list(first)
    prompt = [*PROMPT, *first.ids, 50, 60]
    with pytest.raises(ValueError, match="does not continue"):
        Generation(engine, [*PROMPT, 1, 2, 3, 4, 5, 6, 7], max_tokens=6, sampling=GREEDY, before=first)
    second = Generation(engine, prompt, max_tokens=6, sampling=GREEDY, ignore_eos=True, before=first)
    with pytest.raises(ValueError, match="already"):
        Generation(engine, prompt, max_tokens=6, sampling=GREEDY, before=first)
    list(second)
    assert second.ids == run(llama, prompt=prompt, max_tokens=6, ignore_eos=True).ids
    assert second.stats.prompt_tokens == 3, "the two new tokens and the last drawn one"
    with pytest.raises(RuntimeError, match="once"):
        list(first)


def test_held_back_text_comes_out_at_the_end(llama: Path) -> None:
    free = run(llama, max_tokens=6)
    assert run(llama, max_tokens=6, stop=[free.text[-1] + "never"]).text == free.text


def test_the_penalty_sees_the_prompt(llama: Path) -> None:
    first = run(llama, max_tokens=1).ids
    sampling = SamplingConfig(temperature=0, repeat_penalty=100.0)
    assert run(llama, prompt=[*PROMPT, *first], max_tokens=1, sampling=sampling).ids != first
    assert run(llama, prompt=first * 3, max_tokens=1, sampling=sampling).ids != first


def test_padding_behind_the_vocabulary_is_never_drawn(tmp_path: Path) -> None:
    """Some embeddings have more rows than the tokenizer has tokens."""
    path = write_tiny_llama(tmp_path / "m.gguf", padding=300)
    generation = run(
        path, max_tokens=40, sampling=SamplingConfig(temperature=50.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)
    )
    assert max(generation.ids) < 264


def test_damaged_weights_show_in_the_sparse_path_too(llama: Path) -> None:
    """A NaN gate must not pass for an inactive neuron."""
    engine = load_engine(RunConfig(model=str(llama)))
    ffn = engine.model.ffns()[0]
    broken = ffn.weights.gate.blocks.clone()
    broken[3] = 255
    gate = QuantTensor(broken, ffn.weights.gate.type, ffn.weights.gate.columns)
    for backend in ("reference", "cpu", "triton"):
        ffn.predictor.gate = gate
        engine = dataclasses.replace(engine, run=dataclasses.replace(engine.run, backend=backend))
        with pytest.raises(RuntimeError, match="not finite"):
            list(Generation(engine, PROMPT, max_tokens=1, sampling=GREEDY))


def test_calibration_does_not_depend_on_the_context(tmp_path: Path) -> None:
    path = write_tiny_gemma3(tmp_path / "g.gguf")
    short, long = (load_engine(RunConfig(model=str(path), sparsity=0.5, context=n)) for n in (4, 200))
    for a, b in zip(short.model.ffns(), long.model.ffns(), strict=True):
        assert torch.equal(a.predictor.threshold, b.predictor.threshold)


def test_auto_computes_on_the_core_where_there_is_one(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    engine = load_engine(RunConfig(model=str(llama)))
    monkeypatch.setitem(ops.quant_matmul.__dict__, "reference", None)
    with engine.computing():
        engine.model(torch.tensor(PROMPT), engine.model.new_cache())


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


def test_low_rank_generates_and_says_what_it_reaches(llama: Path) -> None:
    engine = load_engine(RunConfig(model=str(llama), method="low_rank", predictor_rank=64))
    assert engine.method == "low_rank"
    assert any("low_rank catches" in note and "asked 99 %" in note for note in engine.notes)
    generation = run(llama, method="low_rank", predictor_rank=64, recall=0.9, ignore_eos=True)
    assert len(generation.ids) == 12
    assert generation.stats.density < 0.9
    with pytest.raises(ValueError, match=r"predictor_rank.*at most 64.*not 96"):
        run(llama, method="low_rank", predictor_rank=96)


@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_low_rank_predicts_without_a_host_sync(llama: Path, sparsity: float | None) -> None:
    """Its step is ops alone: what a step program can record."""
    if core_problem():
        pytest.skip(f"no CPU core: {core_problem()}")
    activation = None if sparsity is None else "silu"
    engine = load_engine(
        RunConfig(model=str(llama), method="low_rank", predictor_rank=64, sparsity=sparsity, activation=activation)
    )
    assert engine.model.ffns()[0].predictor.by_magnitude is (sparsity is not None)
    with engine.computing():
        step = DecodeStep(engine.model, engine.model.new_cache())
        expected = engine.model(torch.tensor([5]), engine.model.new_cache())
        torch.testing.assert_close(step(5), expected, rtol=1e-3, atol=1e-3)
    assert step.reason is None
