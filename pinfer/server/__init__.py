"""The OpenAI-compatible server over a batcher."""
