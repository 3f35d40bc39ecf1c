"""Sliding windows over a text: each token is predicted once, from as much context as stride and window leave.

As in Hugging Face's guide to the perplexity of fixed-length models and in llama.cpp's `perplexity`:
a window advances by `stride` tokens, and what an earlier one has scored is context only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Window(NamedTuple):
    """One pass of a model.

    inputs, targets: int64 [T]; targets[i] is the token that follows inputs[i] in the text.
    scored:          how many of the targets count, the last ones; those before are context.
    start:           where in the text's tokens the first scored target lies.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    scored: int
    start: int


def sliding_windows(tokens: Sequence[int], length: int, stride: int, bos: int | None) -> list[Window]:
    """Cut a text's tokens (without BOS) into windows of `length` inputs, each opened by BOS where the model uses one.

    Window k begins k · stride tokens into the text, BOS taking the place of the token before that (as
    in llama.cpp), and every token is scored in exactly one window; without a BOS all but the first, which
    nothing precedes. stride = length: disjoint windows. The last window may be shorter.

    ValueError for a length below 2, a stride outside 1..length, or a text that fills no window.
    """
    if length < 2:
        raise ValueError(f"a window of {length} tokens is too short to predict from: at least 2")
    if not 1 <= stride <= length:
        raise ValueError(f"the stride must lie in [1, {length}], the window, not {stride}")
    text = torch.tensor(tokens if bos is None else [bos, *tokens], dtype=torch.int64)
    n_targets = max(0, len(text) - 1)
    if n_targets < length:
        needed = length + (bos is None)
        raise ValueError(f"the text has {len(tokens)} tokens, too few for a window of {length}: at least {needed}")
    found: list[Window] = []
    done = 0  # targets scored so far
    for begin in range(0, n_targets, stride):
        end = min(begin + length, n_targets)
        inputs = text[begin:end].clone()
        if bos is not None:
            inputs[0] = bos
        found.append(Window(inputs, text[begin + 1 : end + 1], end - done, done + (bos is None)))
        done = end
        if done == n_targets:
            break
    return found


def spread(found: Sequence[Window], count: int | None) -> list[Window]:
    """`count` of the windows, taken evenly from all over the text; None for all. ValueError if there are fewer."""
    if count is None:
        return list(found)
    if not 1 <= count <= len(found):
        raise ValueError(f"the text gives {len(found)} windows: {count} cannot be taken of them")
    return [found[i * len(found) // count] for i in range(count)]
