"""Chat templates for models that bring none, by family, and which of them suits a vocabulary."""

from __future__ import annotations

from pathlib import Path

from pinfer.formats.errors import shown
from pinfer.formats.tokenizer import Tokenizer

FOLDER = Path(__file__).with_name("templates")
MAX_BYTES = 2**20
# The tokens by which a vocabulary is known for a family's; the first row that it has is taken.
_KNOWN_BY = {
    "llama-3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "phi-3": ("<|user|>", "<|assistant|>", "<|end|>"),
    "mistral-v3": ("[INST]", "[/INST]"),
    "falcon": (">>QUESTION<<", ">>ANSWER<<"),
}
DEFAULT = "alpaca"  # plain words alone, so that it suits every vocabulary
_TURN_MARKS = {"alpaca": "### Instruction:", "falcon": "\nUser:"}


def template_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def built_in(name: str) -> str:
    """The template of a family; ValueError naming those that there are."""
    if name not in template_names():
        raise ValueError(f"no chat template is called {shown(name)}; there are {', '.join(template_names())}")
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def suitable(tokenizer: Tokenizer) -> str:
    """The name of the built-in template for a vocabulary."""
    for name, tokens in _KNOWN_BY.items():
        if all(token in tokenizer.control_tokens for token in tokens):
            return name
    return DEFAULT


def find_template(tokenizer: Tokenizer, with_tools: bool = False) -> str:
    """The model's own template (some have one of its own for tools), or the built-in one that suits its vocabulary."""
    own = tokenizer.chat_templates
    if with_tools and "tool_use" in own:
        return own["tool_use"]
    return built_in(suitable(tokenizer)) if tokenizer.chat_template is None else tokenizer.chat_template


def read_template(name_or_path: str) -> str:
    """A built-in template by its name, or one in a file; ValueError or OSError if it is neither."""
    path = Path(name_or_path)
    if name_or_path in template_names():
        return built_in(name_or_path)
    if not path.is_file():
        raise ValueError(f"{name_or_path} is no file, nor a chat template's name ({', '.join(template_names())})")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: a chat template may have at most {MAX_BYTES} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None


def stop_strings(template: str) -> list[str]:
    """Where answers end under a template that marks turns by plain words: no token of the model does it there."""
    return [mark for name, mark in _TURN_MARKS.items() if template == built_in(name)]
