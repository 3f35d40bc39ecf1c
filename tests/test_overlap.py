"""Hybrid FFNs on an emulated device: what one device computes, whatever is slow, and errors instead of hangs."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from pinfer import sparsify
from pinfer.config import RunConfig
from pinfer.engine import SHIPPED_MODEL, Engine, load_engine
from pinfer.engine.step import DecodeStep
from pinfer.ffn import HybridFFN, SparseFFN
from pinfer.kernels import ops
from pinfer.kernels.cpp import core_problem, load_core
from pinfer.kernels.cpp.binding import StepFailed
from pinfer.kernels.registry import Op, observe_ops
from pinfer.overlap import Delays, Lane, Place, PrefillCosts, emulated
from pinfer.predictors import Prediction, split_prediction
from tests.gguf_files import write_tiny_llama

pytestmark = [
    pytest.mark.skipif(core_problem() is not None, reason=f"no CPU core: {core_problem()}"),
    pytest.mark.usefixtures("quick_fits"),
]
SPLITS = (0, 1, 25, 50, 99, 100)
DELAYS = (Delays(to_cpu_s=3e-4, to_gpu_s=1e-4), Delays(kernel_s=5e-4, bandwidth=2e9))
PROMPT, STEPS = [5, 40, 7, 260], 16
GEMMA_STEPS = 6  # its head alone takes 40 ms


@pytest.fixture(scope="module")
def lane() -> Iterator[Lane]:
    one = emulated([Place(), Place()], timeout_s=30.0)
    yield one
    one.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sixteenth of Llama-2-13B's layer shape, in Q4_0."""
    path = tmp_path_factory.mktemp("wide") / "m.gguf"
    return write_tiny_llama(path, n_layers=4, d_model=320, d_ffn=864, n_heads=5, n_kv_heads=5, weight_type="Q4_0")


def engine_for(path: Path, **run: Any) -> Engine:
    return load_engine(RunConfig(model=str(path), threads=1, **run))


def split(
    engine: Engine, lane: Lane | None, cold_percent: int, *, one_predictor: bool = False, n_cold: int = 1
) -> list[HybridFFN]:
    """Put hybrids in place of the model's sparse FFNs: a random share of the neurons is cold, in `n_cold` shards."""
    hybrids = []
    for layer, block in enumerate(engine.model.blocks):
        whole = cast(SparseFFN, block.ffn)
        order = torch.randperm(whole.weights.n_neurons, generator=torch.Generator().manual_seed(layer))
        at = len(order) * cold_percent // 100
        cold = [part.sort().values for part in order[:at].tensor_split(n_cold)]
        block.ffn = HybridFFN.of(whole, order[at:].sort().values, cold, lane, one_predictor=one_predictor)
        hybrids.append(block.ffn)
    return hybrids


def greedy(engine: Engine, *, record: bool = True, steps: int = STEPS) -> tuple[list[int], DecodeStep]:
    cache = engine.model.new_cache()
    ids = [int(t) % engine.config.vocab_size for t in PROMPT]
    with engine.computing():
        token = int(engine.model(torch.tensor(ids), cache, last_only=True).argmax())
        step, drawn = DecodeStep(engine.model, cache, record=record), [token]
        for _ in range(steps):
            token = int(step(token).argmax())
            drawn.append(token)
    return drawn, step


# float32 where logits lie close: int8 rounds sums whose last bits differ to other numbers (4 % of Gemma's logits).
RUNS: dict[str, dict[str, Any]] = {
    "shipped": {},
    "13B-shaped": {"method": "exact", "precision": "float32"},
    "shifted": {"method": "shift_threshold", "activation": "silu", "sparsity": 0.5, "precision": "float32"},
    "Gemma": {"method": "shift_threshold", "sparsity": 0.5, "context": 256, "precision": "float32"},
}


@pytest.fixture(
    scope="module", params=[pytest.param(run, marks=[pytest.mark.real_model] * (run == "Gemma")) for run in RUNS]
)
def told(request: pytest.FixtureRequest, wide: Path) -> tuple[Engine, list[SparseFFN], list[int]]:
    """A model, its whole FFNs, and what one device draws."""
    path = {"shipped": SHIPPED_MODEL, "Gemma": None}.get(request.param, wide) or request.getfixturevalue("gemma")
    engine = engine_for(path, **RUNS[request.param])
    drawn, _ = greedy(engine, steps=GEMMA_STEPS if request.param == "Gemma" else STEPS)
    return engine, [cast(SparseFFN, block.ffn) for block in engine.model.blocks], drawn


@pytest.mark.parametrize(
    ("cold_percent", "delays", "flipped"),
    [*zip(SPLITS, cycle(DELAYS), cycle((False, False, True, True)), strict=False)],
)
def test_same_tokens_as_one_device(
    told: tuple[Engine, list[SparseFFN], list[int]],
    cold_percent: int,
    delays: Delays,
    flipped: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Every split with either delay or either predictor, by turns of model and split."""
    engine, whole, expected = told
    model = list(RUNS).index(request.node.callspec.params["told"])
    one_predictor = flipped != bool(model % 2)
    for block, ffn in zip(engine.model.blocks, whole, strict=True):
        block.ffn = ffn
    lane = emulated(1, delays=delays, timeout_s=30.0)
    split(engine, lane, cold_percent, one_predictor=one_predictor)
    for record in (False, True):
        drawn, step = greedy(engine, record=record, steps=len(expected) - 1)
        assert drawn == expected
        assert step.recorded == record
    lane.close()


@pytest.mark.parametrize("one_predictor", [False, True])
@pytest.mark.parametrize("n_cold", [1, 2])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_lane_changes_no_bit(wide: Path, n_cold: int, one_predictor: bool, threads: int) -> None:
    """Of what the shards give one after the other; for one token and several, recorded or not."""
    logits = []
    for one in (None, emulated([Place()] * n_cold)):
        engine = engine_for(wide, method="exact", precision="float32")
        split(engine, one, 60, one_predictor=one_predictor, n_cold=n_cold)
        torch.set_num_threads(threads)
        with engine.computing():
            cache = engine.model.new_cache()
            given = [engine.model(torch.tensor(PROMPT) % 200, cache)]
            step = DecodeStep(engine.model, cache)
            given += [step(token).clone() for token in (3, 9, 4, 7)]
        assert step.recorded
        logits.append(torch.cat(given))
    torch.set_num_threads(1)
    assert torch.equal(*logits)


def test_a_split_of_a_prediction_keeps_masks_and_values() -> None:
    flags = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    values = torch.arange(10.0).view(2, 5)
    whole = Prediction(ops.select_active(flags.float(), torch.zeros(1)), flags, values, torch.arange(5.0))
    first, last = split_prediction(whole, (3, 2))
    assert first.active.indices[: int(first.active.count)].tolist() == [0, 2]
    assert last.active.indices[: int(last.active.count)].tolist() == [0]
    assert torch.equal(cast(torch.Tensor, last.mask), flags[:, 3:])
    assert torch.equal(cast(torch.Tensor, last.gate_values), values[:, 3:])
    assert cast(torch.Tensor, last.shift).tolist() == [3, 4]


@pytest.mark.parametrize("one_predictor", [False, True])
@pytest.mark.parametrize("record", [False, True])
def test_activity_is_that_of_one_device(wide: Path, lane: Lane, one_predictor: bool, record: bool) -> None:
    counts = []
    for hybrid in (False, True):
        engine = engine_for(wide, method="exact", precision="float32")
        if hybrid:
            split(engine, lane, 30, one_predictor=one_predictor, n_cold=2)
        greedy(engine, record=record)
        counts.append([(one.active, one.tokens, one.n_neurons) for one in sparsify.layer_densities(engine.model)])
    assert counts[0] == counts[1]
    assert counts[0][0][0] > 0


def test_every_shard_observes_its_neurons(wide: Path) -> None:
    engine = engine_for(wide, method="exact", precision="float32")
    seen: list[torch.Tensor] = []
    hybrid = split(engine, emulated(1), 30, one_predictor=True)[0]
    for shard in (hybrid.hot, cast(SparseFFN, hybrid.cold[0])):
        shard.observe = lambda x, prediction: seen.append(prediction.active.count.clone())
    with engine.computing():
        engine.model(torch.tensor([3]), engine.model.new_cache())
    assert sum(map(int, seen)) == sparsify.layer_densities(engine.model)[0].active
    assert len(seen) == 2


@pytest.mark.parametrize("one_predictor", [False, True])
def test_the_opening_token_is_whole_and_compensated_once(wide: Path, lane: Lane, one_predictor: bool) -> None:
    run = {"method": "shift_threshold", "activation": "silu", "sparsity": 0.6, "precision": "float32"}
    logits = []
    for hybrid in (False, True):
        engine = engine_for(wide, **run)
        if hybrid:
            split(engine, lane, 40, one_predictor=one_predictor, n_cold=2)
        with engine.computing():
            cache = engine.model.new_cache()
            logits.append(torch.cat([engine.model(torch.tensor(part), cache) for part in ([3], [4, 5, 6], [7])]))
        assert sparsify.layer_densities(engine.model)[0].tokens == 5
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("one_predictor", [False, True])
@pytest.mark.parametrize(
    "run", [{"method": "exact"}, {"method": "shift_threshold", "activation": "silu", "sparsity": 0.5}]
)
def test_a_prompt_whose_weights_are_brought_to_the_device_gives_the_same(
    wide: Path, one_predictor: bool, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pinfer.ffn.STREAMED_NEURONS", 100)  # several pieces a shard, the last one short
    results = []
    for costs in (None, PrefillCosts(cpu_bandwidth=1e9, to_gpu_bandwidth=2e9)):
        lane = emulated([Place(), Place()], prefill=costs, delays=Delays(to_gpu_bandwidth=1e10))
        engine = engine_for(wide, precision="float32", **run)
        brought: list[int] = []
        original = lane.brought

        def counted(pieces: Any, into: list[int] = brought, original: Any = original) -> Any:
            for piece in original(pieces):
                into.append(piece[0].shape[0])
                yield piece

        monkeypatch.setattr(lane, "brought", counted)
        split(engine, lane, 60, one_predictor=one_predictor, n_cold=2)
        with engine.computing():
            logits = engine.model(torch.tensor([3, 4, 5, 6, 7]), engine.model.new_cache())
        counts = [(one.active, one.tokens) for one in sparsify.layer_densities(engine.model)]
        results.append((logits, counts))
        assert sorted(set(brought)) == ([] if costs is None else [59, 100]), "259 neurons a shard"
        n_before = len(brought)
        _, step = greedy(engine)
        assert step.recorded
        assert costs is None or len(brought) > n_before, "the prompt of the generation too, but no decoded token"
        lane.close()
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-3)
    assert results[0][1] == results[1][1]


def test_fewer_cold_neurons_than_workers_make_fewer_shards(wide: Path) -> None:
    """Prompts too, whose weights are brought: of a shard without a neuron there would be no piece."""
    lane = emulated([Place()] * 3, prefill=PrefillCosts(cpu_bandwidth=1e9, to_gpu_bandwidth=2e9))
    engine = engine_for(wide, method="exact", precision="float32")
    whole = cast(SparseFFN, engine.model.ffns()[0])
    n = whole.weights.n_neurons
    hybrid = HybridFFN.of(whole, torch.arange(n - 2), [torch.arange(n - 2, n)], lane)
    assert [shard.weights.n_neurons for shard in hybrid._cold] == [1, 1]
    with engine.computing():
        x = torch.randn(4, engine.config.d_model, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(hybrid(x, x), whole(x, x), rtol=1e-4, atol=1e-4)
    lane.close()


def test_a_batch_is_streamed_where_that_is_faster() -> None:
    """A 70B layer's cold half in 4.5 bits: 176 M weights, 99 MB, at 25 GB/s over the bus, 1 TFLOP/s of the CPU."""
    costs = PrefillCosts(cpu_bandwidth=60e9, to_gpu_bandwidth=25e9, cpu_flops=1e12, gpu_flops=100e12)
    weights, nbytes = 176_000_000, 99_000_000
    assert costs.cpu_s(1, weights, nbytes) == nbytes / 60e9
    assert costs.cpu_s(64, weights, nbytes) == 2 * 64 * weights / 1e12
    assert costs.streamed_s(64, weights, nbytes) == nbytes / 25e9
    assert [costs.streams(tokens, weights, nbytes) for tokens in (1, 8, 16, 512)] == [False, False, True, True]
    for field in ("cpu_bandwidth", "to_gpu_bandwidth", "cpu_flops", "gpu_flops"):
        with pytest.raises(ValueError, match=f"{field} must be above 0, not 0"):
            PrefillCosts(**{"cpu_bandwidth": 1.0, "to_gpu_bandwidth": 1.0, field: 0.0})


def test_shards_of_nodes_lie_in_their_memory_and_change_nothing(wide: Path) -> None:
    """Two nodes emulated by processors of one; each shard's rows are in pages that its own threads touched first."""
    cpus = sorted(os.sched_getaffinity(0))
    node = load_core().pinfer_node_of(torch.ones(1).data_ptr())
    if node < 0:
        pytest.skip("this system does not say which node memory is of")
    places = [Place(1, (cpus[i % len(cpus)],), node) for i in range(2)]
    lane = emulated(places)
    engine = engine_for(wide, method="exact", precision="float32")
    expected = greedy(engine)[0]
    for hybrid in split(engine, lane, 60, n_cold=2):
        for shard in cast(list[SparseFFN], list(hybrid.cold)):
            for matrix in shard.weights.matrices:
                assert load_core().pinfer_node_of(matrix.blocks.data_ptr()) == node
                assert matrix.blocks.data_ptr() % 4096 == 0, "pages of its own"
            assert shard.predictor.gate is shard.weights.gate
    assert greedy(engine)[0] == expected
    lane.close()


def test_a_cold_part_is_dealt_to_the_workers_of_a_lane(wide: Path, lane: Lane) -> None:
    engine = engine_for(wide, method="exact", precision="float32")
    expected = greedy(engine)[0]
    hybrid = split(engine, lane, 50)[0]
    assert [cast(SparseFFN, shard).weights.n_neurons for shard in hybrid.cold] == [216, 216]
    assert greedy(engine)[0] == expected


class Stumbling(torch.nn.Module):
    """A shard that raises after some calls."""

    def __init__(self, shard: SparseFFN, problem: BaseException, after: int = 0) -> None:
        super().__init__()
        self.shard, self.problem, self.left = shard, problem, after
        self.traffic, self.weights, self.predictor = shard.traffic, shard.weights, shard.predictor

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.problem
        return self.shard(*args, **kwargs)


@pytest.mark.parametrize("part", ["hot", "cold", "second cold"])
@pytest.mark.parametrize("problem", [ValueError("on purpose"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_exception_in_a_part_ends_the_others_and_is_raised(
    wide: Path, lane: Lane, part: str, problem: BaseException, after: int
) -> None:
    """Before, while and after the step is recorded; the lane then works on."""
    engine = engine_for(wide, method="exact")
    hybrid = split(engine, lane, 50, n_cold=2)[1]
    if part == "hot":
        stumbling = hybrid.hot = Stumbling(hybrid.hot, problem, after)  # type: ignore[assignment]
    else:
        at = 0 if part == "cold" else 1
        stumbling = hybrid.cold[at] = Stumbling(cast(SparseFFN, hybrid.cold[at]), problem, after)
    with pytest.raises(type(problem)):
        greedy(engine, record=after != 2)
    stumbling.left = 10**6  # type: ignore[union-attr]
    expected = engine_for(wide, method="exact")
    assert greedy(engine)[0] == greedy(expected)[0]


def test_a_slow_cold_part_is_an_error_and_the_next_step_works(wide: Path) -> None:
    lane = emulated(1, delays=Delays(to_cpu_s=0.4), timeout_s=0.1)
    engine = engine_for(wide, method="exact")
    split(engine, lane, 50)
    cache = engine.model.new_cache()
    step = DecodeStep(engine.model, cache)
    with engine.computing(), pytest.raises(StepFailed, match="did not end in time"):
        step(3)
    assert cache.length == 0
    lane.close()


def test_a_lane_that_is_closed_refuses(wide: Path) -> None:
    lane = emulated(1)
    engine = engine_for(wide, method="exact")
    split(engine, lane, 50)
    _, step = greedy(engine)
    lane.close()
    with engine.computing(), pytest.raises(StepFailed, match="stopped"):
        step(3)
    with pytest.raises(StepFailed, match="stopped"):
        greedy(engine)


def test_more_cold_shards_than_workers_are_refused(wide: Path) -> None:
    engine = engine_for(wide, method="exact")
    with pytest.raises(ValueError, match="2 cold shards need a worker each; this lane has 1"):
        split(engine, emulated(1), 50, n_cold=2)
    split(engine, None, 50, n_cold=2)
    for block in engine.model.blocks:
        block.ffn.lane = emulated(1)
    with pytest.raises(ValueError, match="2 cold shards need a worker each; this lane has 1"):
        greedy(engine)


@pytest.mark.parametrize("field", ["to_cpu_s", "kernel_s", "bandwidth", "cpu_bandwidth"])
def test_impossible_delays_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be above 0, not -1"):
        Delays(**{field: -1.0})


def test_a_model_may_go_before_its_lane_and_a_lane_before_its_model(wide: Path, lane: Lane) -> None:
    engine = engine_for(wide, method="exact")
    split(engine, lane, 50)
    _, step = greedy(engine)
    model = weakref.ref(engine.model)
    del engine, step
    gc.collect()
    assert model() is None
    engine = engine_for(wide, method="exact")
    own: Lane | None = emulated(1)
    split(engine, own, 50)
    expected = greedy(engine)[0]
    del own
    gc.collect()
    assert greedy(engine)[0] == expected


@pytest.mark.parametrize("record", [False, True])
def test_two_engines_share_a_lane_at_once(wide: Path, lane: Lane, record: bool) -> None:
    engines = [engine_for(wide, method="exact") for _ in range(2)]
    for engine in engines:
        split(engine, lane, 50)
    expected = greedy(engines[0])[0]
    drawn: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda e=engine: drawn.extend(greedy(e, record=record)[0] for _ in range(5)))
        for engine in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert drawn == [expected] * 10


def test_the_decode_step_calls_no_python_between_its_layers(wide: Path, lane: Lane) -> None:
    engine = engine_for(wide, method="exact")
    split(engine, lane, 50)
    _, step = greedy(engine)
    seen: list[str] = []

    def observer(op: Op) -> Any:
        seen.append(op.name)
        raise AssertionError("no op is to be called")

    with engine.computing(), observe_ops(observer):
        step(3)
    assert seen == []
