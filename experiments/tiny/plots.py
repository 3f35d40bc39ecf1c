"""The two figures of a run: its loss curve and each layer's firing frequencies."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from pinfer.files import write_atomically

DPI = 90


def plot_losses(log: list[dict[str, float]], path: Path) -> None:
    """Draw training loss and density over tokens."""
    tokens = [entry["tokens"] / 1e6 for entry in log]
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(7, 6), sharex=True)
    upper.plot(tokens, [entry["loss"] for entry in log], linewidth=0.8)
    upper.set_ylabel("training loss, nats a token")
    lower.plot(tokens, [entry["density"] for entry in log], linewidth=0.8)
    lower.set(ylabel="density", xlabel="tokens, millions", ylim=(0, None))
    _save(figure, path)


def plot_frequencies(counts: np.ndarray, tokens: int, path: Path) -> None:
    """Draw firing counts [layers, N] over `tokens` positions, sorted, and their cumulated share."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    n_neurons = counts.shape[1]
    for layer, row in enumerate(counts):
        descending = np.sort(row)[::-1]
        left.loglog(np.arange(1, n_neurons + 1), np.maximum(descending, 0.5) / tokens)
        share = np.arange(1, n_neurons + 1) / n_neurons
        right.plot(share, np.cumsum(descending) / descending.sum(), label=f"layer {layer}")
    left.set(xlabel="neuron, by rank", ylabel="share of tokens on which it fires")
    right.set(xlabel="share of neurons, hottest first", ylabel="share of firings")
    right.axhline(0.8, color="gray", linewidth=0.5)
    right.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    plt.close(figure)
    write_atomically(path, buffer.getvalue())
