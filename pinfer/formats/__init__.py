"""Files in and out: GGUF, its model configuration, tokenizers and templates."""
