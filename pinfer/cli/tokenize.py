"""pinfer tokenize: the token ids of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pinfer.cli import options
from pinfer.cli.console import emit_json, read_prompt
from pinfer.engine import SHIPPED_MODEL
from pinfer.formats import open_model
from pinfer.formats.tokenizer import load_tokenizer


def tokenize(
    model: options.Model = None,
    prompt: options.Prompt = None,
    file: options.PromptFile = None,
    special: options.Special = False,
    no_bos: Annotated[bool, typer.Option("--no-bos", help="Leave out the opening token.")] = False,
    json: options.Json = False,
) -> None:
    """Print the token ids of a text, one line each with the token's text."""
    text = read_prompt(prompt, file)
    if text is None:
        raise ValueError("no text: give -p TEXT, -f FILE or -f -")
    tokenizer = load_tokenizer(open_model(SHIPPED_MODEL if model is None else Path(model)).metadata)
    ids = tokenizer.encode(text, add_bos=False if no_bos else None, parse_special=special)
    if json:
        emit_json({"ids": ids, "tokens": [tokenizer.token_text(token) for token in ids]})
        return
    for token in ids:
        print(f"{token:>8}  {tokenizer.token_text(token)!r}")
