"""A sparse run beside the same checkpoint dense, window by window, teacher-forced on the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pinfer.models import Transformer
from pinfer.quality.distance import compare_logits
from pinfer.quality.losses import Estimate, Perplexity, over_windows
from pinfer.quality.neurons import NeuronCounts, NeuronObserver, total
from pinfer.quality.sliding import Window

LOGIT_BYTES = 64 << 20  # of one model's logits at a time: 64 positions of Gemma's 262,144 tokens
KL_QUANTILE = 0.99


@dataclass(frozen=True)
class WindowScores:
    """One window's figures.

    tokens: float32 [scored] by name: dense_nll, and the others of `compare_logits` where a sparse model runs too;
    layers: one NeuronCounts a layer of the sparse model over the scored positions, or none.
    """

    window: Window
    tokens: dict[str, torch.Tensor]
    layers: tuple[NeuronCounts, ...] = ()


def evaluate(
    dense: Transformer, windows: Sequence[Window], sparse: Transformer | None = None
) -> Iterator[WindowScores]:
    """Run both models, or the dense one alone, over each window, yielding its figures as soon as it is done.

    Of a window the final states [T, D] are held, and the logits of some positions at a time. To be
    run under inference mode and the run's backend and precision. ValueError for a `sparse` with a dense layer.
    """
    if sparse is None:
        for window in windows:
            yield WindowScores(window, _score(window, (dense,), (_states(dense, window),)))
        return
    observer = NeuronObserver(sparse)
    for window in windows:
        ours = _states(dense, window)
        with observer.watch(window.scored) as layers:
            theirs = _states(sparse, window)
        yield WindowScores(window, _score(window, (dense, sparse), (ours, theirs)), tuple(layers))


def _states(model: Transformer, window: Window) -> torch.Tensor:
    """float32 [scored, D]: the states that predict the window's scored targets."""
    return model.states(window.inputs, model.new_cache(len(window.inputs)))[-window.scored :]


def _score(
    window: Window, models: tuple[Transformer, ...], states: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """The figures of the scored positions, their logits made a few positions at a time."""
    targets = window.targets[-window.scored :]
    step = max(1, LOGIT_BYTES // (4 * models[0].head.rows))
    pieces = []
    for at in range(0, window.scored, step):
        logits = [model.logits(of_model[at : at + step]).cpu() for model, of_model in zip(models, states, strict=True)]
        here = targets[at : at + step]
        if len(logits) == 1:
            pieces.append({"dense_nll": F.cross_entropy(logits[0], here, reduction="none")})
        else:
            pieces.append(compare_logits(logits[0], logits[1], here))
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


@dataclass(frozen=True)
class SparseSummary:
    """A sparse run against dense, over all windows. `added` and `kl` are in nats a token; `added` is paired.

    layers: the sums of each layer; neurons: of all of them.
    """

    perplexity: Perplexity
    added: Estimate
    kl: Estimate
    kl_p99: float
    argmax_agreement: Estimate
    argmax_in_dense_top5: Estimate
    top5_overlap: Estimate
    layers: tuple[NeuronCounts, ...]
    neurons: NeuronCounts


@dataclass(frozen=True)
class Summary:
    """All windows together; `sparse` is None where the dense model ran alone."""

    windows: int
    tokens: int
    dense: Perplexity
    sparse: SparseSummary | None


def summarise(scores: Sequence[WindowScores]) -> Summary:
    """The figures of a whole text from those of its windows, at least one."""

    def of(name: str) -> list[torch.Tensor]:
        return [one.tokens[name] for one in scores]

    dense = _perplexity(of("dense_nll"))
    if "sparse_nll" not in scores[0].tokens:
        return Summary(len(scores), dense.tokens, dense, None)
    pairs = zip(of("sparse_nll"), of("dense_nll"), strict=True)
    layers = tuple(total(of_layer) for of_layer in zip(*(one.layers for one in scores), strict=True))
    sparse = SparseSummary(
        perplexity=_perplexity(of("sparse_nll")),
        added=over_windows([ours - theirs for ours, theirs in pairs]),
        kl=over_windows(of("kl")),
        kl_p99=quantile(torch.cat(of("kl")), KL_QUANTILE),
        argmax_agreement=over_windows(of("argmax_agreement")),
        argmax_in_dense_top5=over_windows(of("argmax_in_dense_top5")),
        top5_overlap=over_windows(of("top5_overlap")),
        layers=layers,
        neurons=total(layers),
    )
    return Summary(len(scores), dense.tokens, dense, sparse)


def quantile(values: torch.Tensor, share: float) -> float:
    """The value that a share of `values` [n] does not exceed, interpolated; of any number of them."""
    ordered = values.double().sort().values  # torch.quantile refuses more than 2^24
    at = share * (len(ordered) - 1)
    low = ordered[int(at)]
    return float(low + (at - int(at)) * (ordered[min(int(at) + 1, len(ordered) - 1)] - low))


def _perplexity(losses: list[torch.Tensor]) -> Perplexity:
    mean = over_windows(losses)
    return Perplexity(mean.value, mean.standard_error, sum(loss.numel() for loss in losses))
