"""Compaction and the sign-bit predictor beyond the registry's cases: properties, forged flags, float sign products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.kernels import cases, ops
from pinfer.kernels.dequantize.reference import dequantize
from pinfer.kernels.select_active import Active, passes
from pinfer.kernels.select_active.reference import listed
from pinfer.kernels.sign_select import pack, pack_signs
from pinfer.kernels.sign_select.reference import pack_bits, sign_scores
from pinfer.quant import BY_NAME, QuantTensor

pytest.importorskip("triton", reason="Triton is not installed on this platform")

from pinfer.kernels.select_active import gpu
from pinfer.kernels.sign_select.gpu import sign_select

TILES = st.sampled_from([1, 8, 64, 256, 512])


def chosen(active: Active) -> list[int]:
    assert active.indices.dtype == active.count.dtype == torch.int32
    assert active.count.shape == (1,)
    return active.indices[: int(active.count)].tolist()


def counts_of(flags: torch.Tensor, tile: int) -> torch.Tensor:
    """int32 [tiles]: what `store_flags` would have counted."""
    padded = torch.nn.functional.pad((flags != 0).int(), (0, -flags.numel() % tile))
    return padded.view(-1, tile).sum(dim=1, dtype=torch.int32)


@settings(deadline=None, max_examples=40)
@given(
    neurons=st.integers(0, 1100), tile=TILES, density=st.sampled_from([0.0, 0.02, 0.5, 1.0]), seed=st.integers(0, 99)
)
def test_compact_lists_the_flags_in_order(neurons: int, tile: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    flags = torch.randint(1, 256, (neurons,), generator=generator, dtype=torch.uint8)
    flags *= torch.rand(neurons, generator=generator) < density
    counts = counts_of(flags, tile)
    first, second = gpu.compact(flags, counts, tile), gpu.compact(flags, counts, tile)
    assert first.indices.shape == (neurons,)
    assert chosen(first) == chosen(second) == flags.nonzero().flatten().tolist()


@pytest.mark.parametrize("per_step", [32, 64])
def test_compact_adds_more_counts_than_one_step_takes(per_step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "MAX_COUNTS_BLOCK", per_step)
    flags = (torch.arange(700) % 3 == 0).to(torch.uint8)
    assert chosen(gpu.compact(flags, counts_of(flags, 2), 2)) == list(range(0, 700, 3))


def test_compact_writes_its_whole_result_and_reads_nothing_else(poisoned_memory: None) -> None:
    """Behind and before the flags, the counts lie wild bytes, as in a buffer that holds more."""
    neurons, tile = 431, 64
    flags = torch.full((neurons + 512,), 255, dtype=torch.uint8)
    flags[256 : 256 + neurons] = torch.arange(neurons) % 5 == 1
    flags = flags[256 : 256 + neurons]
    counts = torch.full((64,), -(2**30), dtype=torch.int32)
    counts[8:15] = counts_of(flags, tile)
    active = gpu.compact(flags, counts[8:15], tile)
    assert chosen(active) == list(range(1, neurons, 5))
    # Nothing behind the list is written, so no program writes into another's piece either.
    assert set(active.indices[int(active.count) :].tolist()) == {113}


@pytest.mark.parametrize(
    ("flags", "counts", "tile"),
    [
        (torch.zeros(64, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), 64),
        (torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32), 64),
        (torch.zeros(128, dtype=torch.uint8)[::2], torch.zeros(1, dtype=torch.int32), 64),
        (torch.zeros(65, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32), 64),
        (torch.zeros(64, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), 64),
        (torch.zeros(48, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32), 48),
        (torch.zeros(48, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32), 0),
    ],
)
def test_flags_and_counts_that_do_not_belong_together_are_refused(
    flags: torch.Tensor, counts: torch.Tensor, tile: int
) -> None:
    with pytest.raises(ValueError, match="expected"):
        gpu.compact(flags, counts, tile)


@pytest.mark.parametrize(("tokens", "neurons"), [(1, 256), (1, 257), (3, 431), (5, 7), (16, 300), (0, 9), (2, 0)])
@pytest.mark.parametrize("offset", [0, -2])  # below 0, whatever is read outside the scores would pass
def test_the_mask_comes_out_of_the_same_pass(
    tokens: int, neurons: int, offset: int, generator: torch.Generator, poisoned_memory: None
) -> None:
    scores = torch.rand(tokens, neurons, generator=generator) + offset
    threshold = 0.4 + 0.5 * torch.rand(neurons, generator=generator) + offset
    if scores.numel():
        scores[-1, -1] = float("nan")
        scores[0, 0] = threshold[0]
    for bar in (threshold, torch.tensor([0.7 + offset])):
        active, mask = gpu.select_with_mask(scores, bar)
        expected = passes(scores, bar)
        assert torch.equal(mask, expected)
        assert chosen(active) == chosen(gpu.select_active(scores, bar)) == chosen(listed(expected.any(dim=0)))


@pytest.mark.parametrize("tokens", [1, 3])
def test_kernels_count_the_flags_that_they_write(
    tokens: int, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    """The count of the last tile too, which compaction itself never reads."""
    seen = []

    def checked(flags: torch.Tensor, counts: torch.Tensor, tile: int) -> Active:
        seen.append(flags)
        assert counts.tolist() == counts_of(flags, tile).tolist()
        return listed(flags)

    monkeypatch.setattr(gpu, "compact", checked)
    monkeypatch.setattr("pinfer.kernels.sign_select.gpu.compact", checked)
    scores = torch.rand(tokens, 431, generator=generator)
    for bar in (0.5, -1.0):
        gpu.select_active(scores, torch.tensor([bar]))
    inputs = ops.sign_select.make_inputs(generator, tokens=tokens, neurons=431, width=96, density=0.5)
    for lower in (0, 200):
        sign_select(inputs["x"], inputs["signs"], inputs["threshold"] - lower)
    assert len(seen) == 4


def float_scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    def sign(values: torch.Tensor) -> torch.Tensor:
        return torch.where(values < 0, -1.0, 1.0)

    return sign(x) @ sign(weight).T


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.sampled_from([1, 2, 5]),
    neurons=st.integers(1, 150),
    width=st.integers(1, 140),
    each=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sign_select_follows_a_float_sign_product(tokens: int, neurons: int, width: int, each: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(neurons, width, generator=generator), torch.randn(tokens, width, generator=generator)
    weight[:, ::5], x[:, ::3] = 0, -0.0
    signs = pack_signs(QuantTensor.from_dense(weight))
    scores = float_scores(x, weight)
    assert torch.equal(sign_scores(x, signs), scores.int())
    bars = torch.randint(-width - 1, width + 1, (neurons if each else 1,), generator=generator, dtype=torch.int32)
    for bar in (bars, scores[0].int() if each else scores[0, :1].int()):  # below, among, above; then ties
        selection, expected = sign_select(x, signs, bar), scores > bar
        assert chosen(selection.active) == expected.any(dim=0).nonzero().flatten().tolist()
        if tokens == 1:
            assert selection.mask is None
        else:
            assert selection.mask is not None
            assert torch.equal(selection.mask, expected)


def test_signs_of_zeros_and_nan_are_positive_in_weights_and_in_x() -> None:
    values = torch.tensor([[0.0, -0.0, float("nan"), -float("nan"), -1e-45, -float("inf"), 1.0]])
    signs = pack_signs(QuantTensor.from_dense(values))
    assert signs.tolist() == [[0b110000]]
    for x in (values, values.repeat(2, 1)):
        for bar, count in ((6, 1), (7, 0)):  # every sign agrees: the score is D
            active = sign_select(x, signs, torch.tensor([bar], dtype=torch.int32)).active
            assert int(active.count) == count


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_score_goes_down_to_minus_the_width(tokens: int) -> None:
    signs = pack_bits(torch.ones(3, 64, dtype=torch.bool))  # words of 32 differing bits
    for bar, count in ((-64, 0), (-65, 3)):
        selection = sign_select(torch.ones(tokens, 64), signs, torch.tensor([bar], dtype=torch.int32))
        assert int(selection.active.count) == count


def test_bit_31_is_a_column_and_padding_is_none() -> None:
    bits = torch.zeros(1, 33, dtype=torch.bool)
    bits[0, 31:] = True
    words = pack_bits(bits)
    assert words.tolist() == [[-(2**31), 1]]
    x = torch.where(bits, -1.0, 1.0)
    for tokens in (1, 2):
        for bar, count in ((32, 1), (33, 0)):
            selection = sign_select(x.repeat(tokens, 1), words, torch.tensor([bar], dtype=torch.int32))
            assert int(selection.active.count) == count


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K"])
def test_pack_signs_in_chunks_is_the_sign_of_every_weight(
    name: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = cases.random_blocks(generator, BY_NAME[name], 11, 256)
    at_once = pack_signs(weight)
    monkeypatch.setattr(pack, "CHUNK_WEIGHTS", 3 * 256 + 1)
    assert torch.equal(pack_signs(weight), at_once)
    unpacked = (at_once[:, :, None] >> torch.arange(32)) & 1
    assert torch.equal(unpacked.reshape(11, 256).bool(), dequantize(weight) < 0)


def test_half_precision_and_strided_inputs_give_the_same_selection(generator: torch.Generator) -> None:
    inputs = ops.sign_select.make_inputs(generator, tokens=1, neurons=100, width=96, density=0.3)
    expected = chosen(ops.sign_select.reference(**inputs).active)
    wide = torch.zeros(1, 192).half()
    wide[:, ::2] = inputs["x"].half()
    spread = torch.zeros(100, 6, dtype=torch.int32)
    spread[:, ::2] = inputs["signs"]
    assert chosen(sign_select(wide[:, ::2], spread[:, ::2], inputs["threshold"]).active) == expected


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_token_and_no_neuron_select_nothing(backend: str) -> None:
    select = ops.sign_select.implementation(backend)
    bar = torch.tensor([-99], dtype=torch.int32)
    nobody = select(torch.zeros(0, 40), torch.zeros(5, 2, dtype=torch.int32), bar)
    assert int(nobody.active.count) == 0
    assert nobody.mask.shape == (0, 5)
    for tokens in (1, 3):
        assert int(select(torch.zeros(tokens, 40), torch.zeros(0, 2, dtype=torch.int32), bar).active.count) == 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(123)},
        {"x": torch.zeros(1, 123, dtype=torch.int32)},
        {"x": torch.zeros(1, 97)},
        {"signs": torch.zeros(431, 4)},
        {"threshold": torch.zeros(1)},
        {"threshold": torch.zeros(430, dtype=torch.int32)},
    ],
    ids=str,
)
def test_inputs_that_do_not_belong_together_are_refused(
    backend: str, wrong: dict[str, torch.Tensor], generator: torch.Generator
) -> None:
    inputs = ops.sign_select.make_inputs(generator, **ops.sign_select.cases[0]) | wrong
    if inputs["x"].shape == (1, 97):
        inputs["signs"] = inputs["signs"][:, :3]
    with pytest.raises(ValueError, match="expected"):
        ops.sign_select.implementation(backend)(**inputs)
