"""Running a model: load it, read the prompt, draw tokens, stream text."""

from pinfer.engine.conversation import Conversation
from pinfer.engine.generate import Generation, GenerationStats
from pinfer.engine.load import SHIPPED_MODEL, Engine, load_engine

__all__ = ["SHIPPED_MODEL", "Conversation", "Engine", "Generation", "GenerationStats", "load_engine"]
