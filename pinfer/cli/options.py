"""Options that several commands share, under llama.cpp's names."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Option("-m", "--model", help="GGUF file or Hugging Face folder; the shipped model if left out.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Prompt = Annotated[str | None, typer.Option("-p", "--prompt", help="Text to start from.")]
PromptFile = Annotated[str | None, typer.Option("-f", "--file", help="Read it from a file; - is standard input.")]
Special = Annotated[bool, typer.Option("--special", help="Take text that spells a special token for that token.")]
