"""A small Llama with a ReGLU FFN, laid out exactly as GGUF's `llama` architecture stores it.

FFN: `down(relu(gate(x)) * up(x))`. Rope turns interleaved pairs (2i, 2i+1), as GGUF's llama
expects, so the exporter copies q and k without a permutation. The head is tied to the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # GPT-2's; the two projections into the residual are scaled by 1/sqrt(2 * layers)


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the model; `D` and `N` must be multiples of 32, the Q8_0 block."""

    vocab_size: int = 4096
    d_model: int = 256
    n_neurons: int = 1024
    n_layers: int = 6
    n_heads: int = 4
    n_kv_heads: int = 2
    context: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, size in (("d_model", self.d_model), ("n_neurons", self.n_neurons)):
            if size % 32:
                raise ValueError(f"{name} is {size}, not a multiple of 32 (the Q8_0 block)")
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{self.n_heads} heads must divide d_model {self.d_model} "
                f"and be a multiple of {self.n_kv_heads} kv heads"
            )

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads


class RMSNorm(nn.Module):
    """RMS normalisation with a learned scale [D]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps)


def rope_table(config: TinyConfig, length: int) -> Tensor:
    """Return cosines and sines [2, T, 1, head_dim / 2] for positions 0..T-1."""
    exponent = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = torch.outer(torch.arange(length).float(), config.rope_base**-exponent)
    return torch.stack((angles.cos(), angles.sin()))[:, :, None, :]


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [B, T, heads, head_dim]; same shape and dtype out."""
    cos, sin = table
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return pairs.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention without biases."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        kv_dim = config.n_kv_heads * config.head_dim
        self.head_dim = config.head_dim
        self.group = config.n_heads // config.n_kv_heads
        self.q = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k = nn.Linear(config.d_model, kv_dim, bias=False)
        self.v = nn.Linear(config.d_model, kv_dim, bias=False)
        self.output = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Mix x [B, T, D] over earlier positions; [B, T, D] out."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        # Expanded by hand: scaled_dot_product_attention's own grouping leaves the fast CPU path.
        k, v = (t.repeat_interleave(self.group, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class ReGLU(nn.Module):
    """`down(relu(gate(x)) * up(x))`; a neuron is active where its gate is positive."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.n_neurons, bias=False)
        self.up = nn.Linear(config.d_model, config.n_neurons, bias=False)
        self.down = nn.Linear(config.n_neurons, config.d_model, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From x [B, T, D] return the output [B, T, D] and the gate before its relu [B, T, N]."""
        gate = self.gate(x)
        return self.down(F.relu(gate) * self.up(x)), gate


class Block(nn.Module):
    """Pre-norm attention and FFN, each added to the residual."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = ReGLU(config)

    def forward(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """From the residual x [B, T, D] return the new residual and the gate [B, T, N]."""
        x = x + self.attention(self.attention_norm(x), rope)
        out, gate = self.ffn(self.ffn_norm(x))
        return x + out, gate


class TinyLlama(nn.Module):
    """The whole model; returns the gate activations too, for the sparsity loss."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.output_norm = RMSNorm(config.d_model, config.norm_eps)
        self.register_buffer("rope", rope_table(config, config.context), persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        residual_std = INIT_STD / (2 * self.config.n_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                into_residual = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=residual_std if into_residual else INIT_STD)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """From tokens [B, T] return logits [B, T, V] and the gate [B, T, N] of each layer.

        Raises ValueError when T exceeds the context.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens exceed the context of {self.config.context}")
        x = self.embedding(tokens)
        rope, gates = self.rope[:, :length], []
        for block in self.blocks:
            x, gate = block(x, rope)
            gates.append(gate)
        return F.linear(self.output_norm(x), self.embedding.weight), gates
