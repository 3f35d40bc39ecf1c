"""Model families: a file for each kind of wiring over shared layers, and the table that names the families."""

from pinfer.config import ModelConfig
from pinfer.models.falcon import FalconBlock
from pinfer.models.ffns import Experts
from pinfer.models.gemma import GemmaBlock
from pinfer.models.layers import KVCache
from pinfer.models.llama import LlamaBlock
from pinfer.models.transformer import BlockBuilder, Transformer
from pinfer.models.walk import LayerWalk
from pinfer.models.weights import WeightSource, replace_weights

FAMILIES: dict[str, BlockBuilder] = {
    "llama": LlamaBlock,
    "qwen2": LlamaBlock,
    "qwen3": LlamaBlock,
    "qwen3moe": LlamaBlock,
    "gemma2": GemmaBlock,
    "gemma3": GemmaBlock,
    "phi3": LlamaBlock,
    "falcon": FalconBlock,
    "opt": LlamaBlock,
    "bamboo": LlamaBlock,
}


def build_model(weights: WeightSource, config: ModelConfig, context: int) -> Transformer:
    """The dense model over `weights`, with room for `context` positions.

    ValueError for a family that is not in FAMILIES or a context above the model's own.
    """
    if config.architecture not in FAMILIES:
        raise ValueError(f"architecture {config.architecture!r} is not supported; supported: {', '.join(FAMILIES)}")
    if not 1 <= context <= config.context_length:
        raise ValueError(f"context must lie in [1, {config.context_length}], the model's limit, not {context}")
    return Transformer(weights, config, FAMILIES[config.architecture], context)


__all__ = [
    "FAMILIES",
    "Experts",
    "KVCache",
    "LayerWalk",
    "Transformer",
    "WeightSource",
    "build_model",
    "replace_weights",
]
