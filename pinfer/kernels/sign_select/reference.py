"""Which neurons a ReLU will keep, from the signs of weights and input alone, in plain torch."""

from __future__ import annotations

import torch

from pinfer.kernels.select_active.reference import Selection, listed

WORD_BITS = 32
_BITS_SET = torch.tensor([value.bit_count() for value in range(256)], dtype=torch.uint8)


def sign_select(x: torch.Tensor, signs: torch.Tensor, threshold: torch.Tensor) -> Selection:
    """List the neurons whose products with x have enough more positive than negative terms, for at least one token.

    x: float [T, D]; signs: int32 [N, ceil(D / 32)] of `pack_signs`; threshold: int32 [1] or [N].
    The score of a token and a neuron is Σ_d sign(x_d) · sign(w_d), from -D to D, and the neuron is
    active where it exceeds the threshold. Zeros and NaN count as positive.

    SparseInfer (Shin et al. 2024): its α, by which agreeing signs count more than disagreeing ones,
    is a threshold of floor(D (1 - α) / (1 + α)), as α · agreeing > disagreeing where the score exceeds it.
    """
    check_inputs(x, signs, threshold)
    mask = sign_scores(x, signs) > threshold
    return Selection(listed(mask.any(dim=0)), None if x.shape[0] == 1 else mask)


def sign_scores(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """int32 [T, N]: D minus twice the number of columns in which x's sign and the neuron's differ."""
    bits_set = _BITS_SET.to(x.device)
    differing = [
        bits_set[(signs ^ token).view(torch.uint8).int()].sum(dim=1, dtype=torch.int32) for token in pack_bits(x < 0)
    ]
    return x.shape[1] - 2 * torch.stack(differing) if differing else signs.new_empty(0, signs.shape[0])


def pack_bits(bits: torch.Tensor) -> torch.Tensor:
    """int32 [rows, ceil(columns / 32)] of bool [rows, columns]: bit j of word w is column 32 w + j, padding is 0."""
    rows, columns = bits.shape
    words = words_for(columns)
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, words * WORD_BITS - columns))
    places = torch.tensor([1 << j for j in range(8)], dtype=torch.uint8, device=bits.device)
    packed = (padded.view(rows, words * 4, 8) * places).sum(dim=2, dtype=torch.uint8)
    return packed.view(torch.int32)  # the bytes of a word are in little-endian order, as GGUF's are


def words_for(columns: int) -> int:
    """How many words hold a row's signs."""
    return -(-columns // WORD_BITS)


def check_inputs(x: torch.Tensor, signs: torch.Tensor, threshold: torch.Tensor) -> None:
    """ValueError unless shapes and types belong together; every implementation calls it."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {list(x.shape)}, expected float [T, D]")
    if signs.dtype != torch.int32 or signs.dim() != 2 or signs.shape[1] != words_for(x.shape[1]):
        raise ValueError(
            f"signs are {signs.dtype} {list(signs.shape)}, expected torch.int32 [N, {words_for(x.shape[1])}] "
            f"for x {list(x.shape)}"
        )
    if threshold.dtype != torch.int32 or threshold.dim() != 1 or threshold.numel() not in (1, signs.shape[0]):
        raise ValueError(
            f"threshold is {threshold.dtype} {list(threshold.shape)}, expected torch.int32 [1] or [{signs.shape[0]}]"
        )
