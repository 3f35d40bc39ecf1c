"""The sign bits of a weight matrix, packed once at load: 1/32 of an fp32 matrix's bytes, 1/4.5 of Q4_0's."""

from __future__ import annotations

import torch

from pinfer.kernels.dequantize import OP as dequantize
from pinfer.kernels.sign_select.reference import pack_bits, words_for
from pinfer.quant import QuantTensor

CHUNK_WEIGHTS = 4 * 1024 * 1024  # 16 MB of floats at a time: a 70B model's gate would be 940 MB


def pack_signs(weight: QuantTensor) -> torch.Tensor:
    """The signs of a QuantTensor [N, D] as `sign_select` reads them.

    Returns int32 [N, ceil(D / 32)] on its device: bit j of word w is set where the weight in column
    32 w + j is less than zero (so zeros and NaN count as positive); bits past D are 0.
    """
    words = torch.empty(weight.rows, words_for(weight.columns), dtype=torch.int32, device=weight.device)
    chunk = max(1, CHUNK_WEIGHTS // weight.columns)
    for first in range(0, weight.rows, chunk):
        words[first : first + chunk] = pack_bits(dequantize(weight[first : first + chunk]) < 0)
    return words
