"""The training loop: a budget of tokens (or minutes, whichever ends first), resumable."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.tiny.corpus import Batches
from experiments.tiny.model import TinyConfig, TinyLlama
from experiments.tiny.optim import make_optimizers, rate_at, set_rate
from experiments.tiny.sparsity import Controller, firing_shares, neuron_weights, penalty

CHECKPOINT_SECONDS = 120
LOG_STEPS = 20
SHORT_SHARE = 0.6  # of the budget is trained on half the context, whose attention costs half
CLIP_NORM = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """What a run depends on, besides the corpus."""

    tokens: int
    minutes: float | None = None  # wall-clock cap; it shortens the schedule, not only the run
    batch_tokens: int = 4096
    target_density: float = 0.08
    weight_span: float = 10.0  # of the per-neuron L1 weights; 1 imposes no tail
    sparsity: bool = True  # False: the plain-ReLU comparison
    bf16: bool = False
    compile: bool = True
    seed: int = 0


@dataclass
class Progress:
    """The mutable part of a run that a checkpoint keeps beside the tensors."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)

    def share(self, config: TrainConfig) -> float:
        """Return the share of the budget used, 0 to 1."""
        by_tokens = self.tokens / config.tokens
        by_time = self.seconds / (60 * config.minutes) if config.minutes else 0.0
        return min(1.0, max(by_tokens, by_time))


class Trainer:
    """Owns the model, the optimizers and the sparsity controller of one run."""

    def __init__(self, model_config: TinyConfig, config: TrainConfig, tokens: np.ndarray, folder: Path) -> None:
        torch.manual_seed(config.seed)
        self.config, self.model_config, self.folder = config, model_config, folder
        self.model = TinyLlama(model_config)
        self.optimizers = make_optimizers(self.model)
        self.weights = neuron_weights(model_config.n_layers, model_config.n_neurons, config.weight_span, config.seed)
        self.controller = Controller(model_config.n_layers, model_config.n_neurons, config.target_density)
        self.progress = Progress()
        lengths = (model_config.context // 2, model_config.context)
        self.batches = [Batches(tokens, t, config.batch_tokens // t, config.seed) for t in lengths]
        self.losses = torch.compile(self._losses) if config.compile else self._losses

    def _losses(
        self, inputs: Tensor, targets: Tensor, strength: Tensor, warmth: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return cross-entropy, sparsity term and firing shares of tokens and targets [B, T]."""
        logits, gates = self.model(inputs)
        entropy = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        sparsity = penalty(gates, self.weights, strength, warmth)
        return entropy, sparsity, firing_shares([gate.detach() for gate in gates])

    def run(self) -> None:
        """Train until the budget is used, writing checkpoints."""
        checkpointed = time.monotonic()
        self.model.train()
        while (share := self.progress.share(self.config)) < 1:
            started = time.monotonic()
            self._step(share, started)
            if time.monotonic() - checkpointed > CHECKPOINT_SECONDS:
                self.save()
                checkpointed = time.monotonic()
        self.save()

    def _step(self, share: float, started: float) -> None:
        progress = self.progress
        batch = torch.from_numpy(self.batches[share >= SHORT_SHARE].at(progress.step))
        set_rate(self.optimizers, rate := rate_at(progress.step, share))
        controller = self.controller
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
            entropy, sparsity, fired = self.losses(
                batch[:, :-1], batch[:, 1:], controller.strength, controller.warmth()
            )
        (entropy + sparsity * self.config.sparsity).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        controller.update(fired, share)
        progress.tokens += batch[:, 1:].numel()
        progress.seconds += time.monotonic() - started
        if progress.step % LOG_STEPS == 0:
            self._log(entropy.item(), fired, rate)
        progress.step += 1

    def _log(self, loss: float, fired: Tensor, rate: float) -> None:
        progress = self.progress
        entry = {
            "step": progress.step,
            "tokens": progress.tokens,
            "seconds": round(progress.seconds, 1),
            "loss": round(loss, 4),
            "density": round(fired.mean().item(), 4),
            "l1_strength": round(self.controller.strength.mean().item(), 5),
            "cold": round((self.controller.warmth() < 1).float().mean().item(), 4),
            "rate": round(rate, 4),
        }
        progress.log.append(entry)
        print(" ".join(f"{key} {value}" for key, value in entry.items()), flush=True)

    def save(self) -> None:
        """Write the checkpoint atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "controller": self.controller.state(),
            "progress": asdict(self.progress),
            "model_config": asdict(self.model_config),
        }
        path = self.folder / "checkpoint.pt"
        staging = path.with_suffix(f".{os.getpid()}")
        torch.save(state, staging)
        os.replace(staging, path)

    def resume(self) -> None:
        """Continue from the checkpoint; raises FileNotFoundError or ValueError if it cannot."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}")
        state = torch.load(path, weights_only=True)
        if state["model_config"] != asdict(self.model_config):
            raise ValueError(f"{path} holds another model shape: {state['model_config']}")
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.controller.load(state["controller"])
        self.progress = Progress(**state["progress"])
