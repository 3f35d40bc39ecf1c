"""sign_select on the CPU core: xor and popcount, then the pass of select_active."""

from __future__ import annotations

import torch

from pinfer.kernels.cpp.binding import SignScores, floats, pointer, run
from pinfer.kernels.select_active.cpu import select_active
from pinfer.kernels.select_active.reference import Selection
from pinfer.kernels.sign_select.reference import check_inputs, words_for


def sign_select(x: torch.Tensor, signs: torch.Tensor, threshold: torch.Tensor) -> Selection:
    check_inputs(x, signs, threshold)
    tokens, columns = x.shape
    x, signs = floats(x), signs.contiguous()
    scores = torch.empty(tokens, signs.shape[0])
    packed = torch.empty(tokens, words_for(columns), dtype=torch.int32)
    arguments = SignScores(
        pointer(x), pointer(signs), tokens, signs.shape[0], columns, pointer(scores), pointer(packed)
    )
    run(arguments, tokens * signs.numel(), x, signs, scores, packed)
    bar = threshold.float()  # whole numbers up to D: exact
    return Selection(select_active(scores, bar), None if tokens == 1 else scores > bar)
