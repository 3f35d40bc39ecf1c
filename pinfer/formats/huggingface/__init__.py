"""Model folders as Hugging Face libraries write them."""
