"""Held-out perplexity, firing statistics, and text samples of a trained model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from experiments.tiny.corpus import END_OF_TEXT_ID
from experiments.tiny.model import TinyLlama
from experiments.tiny.sparsity import firing_summary

WINDOWS_PER_DOMAIN = 40  # 40 x 512 tokens a domain; more changes perplexity by less than 1 %
EVAL_BATCH = 8
TEMPERATURE = 0.7
PROMPTS = (
    "And the LORD said unto",
    "Emma was",
    "The function returns",
    "A database is",
    "hacker:",
)


@dataclass(frozen=True)
class Evaluation:
    """Loss and firing counts over held-out text."""

    loss: dict[str, float]  # nats a token, a domain
    tokens: dict[str, int]
    counts: np.ndarray  # int64 [layers, N], positions at which a neuron fired

    def summary(self) -> dict[str, Any]:
        """Return perplexities and per-layer firing statistics, ready for JSON."""
        total = sum(self.tokens.values())
        mean_loss = sum(self.loss[name] * self.tokens[name] for name in self.loss) / total
        layers = firing_summary(self.counts, total)
        return {
            "perplexity": math.exp(mean_loss),
            "loss_nats": mean_loss,
            "perplexity_by_domain": {name: math.exp(loss) for name, loss in self.loss.items()},
            "tokens": total,
            "density": sum(layer["density"] for layer in layers) / len(layers),
            "dead": sum(layer["dead"] for layer in layers) / len(layers),
            "layers": layers,
        }


@torch.no_grad()
def evaluate(model: TinyLlama, heldout: dict[str, np.ndarray]) -> Evaluation:
    """Run the model over the first windows of each domain's held-out tokens (uint16).

    A token counts a neuron as active when its gate is above 0, no threshold.
    """
    model.eval()
    length = model.config.context
    counts = torch.zeros(model.config.n_layers, model.config.n_neurons, dtype=torch.int64)
    losses, tokens = {}, {}
    for name, array in heldout.items():
        n_windows = min(WINDOWS_PER_DOMAIN, (array.size - 1) // length)
        starts = np.arange(n_windows)[:, None] * length
        windows = torch.from_numpy(array[starts + np.arange(length + 1)].astype(np.int64))
        total = 0.0
        for batch in windows.split(EVAL_BATCH):
            logits, gates = model(batch[:, :-1])
            targets = batch[:, 1:].flatten()
            total += F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
            counts += torch.stack([(gate > 0).sum(dim=(0, 1)) for gate in gates])
        tokens[name] = n_windows * length
        losses[name] = total / tokens[name]
    return Evaluation(losses, tokens, counts.numpy())


@torch.no_grad()
def generate(model: TinyLlama, tokenizer: Tokenizer, prompt: str, n_tokens: int, seed: int) -> str:
    """Return the prompt continued by n_tokens sampled tokens (fewer at the end of a text)."""
    generator = torch.Generator().manual_seed(seed)
    ids = [END_OF_TEXT_ID, *tokenizer.encode(prompt).ids]
    for _ in range(n_tokens):
        logits, _ = model(torch.tensor([ids[-model.config.context :]]))
        shares = torch.softmax(logits[0, -1] / TEMPERATURE, dim=-1)
        ids.append(int(torch.multinomial(shares, 1, generator=generator)))
        if ids[-1] == END_OF_TEXT_ID:
            break
    return tokenizer.decode(ids[1:])


def samples(model: TinyLlama, tokenizer: Tokenizer, n_tokens: int = 60) -> list[str]:
    """Return one sample for each of PROMPTS."""
    return [generate(model, tokenizer, p, n_tokens, seed) for seed, p in enumerate(PROMPTS)]
