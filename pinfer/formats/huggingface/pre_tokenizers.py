"""Which `tokenizer.ggml.pre` a tokenizer.json's pre-tokenizer is, by its structure and patterns, never by a name."""

from __future__ import annotations

from collections.abc import Iterator

from pinfer.formats.errors import shown
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.tokenizer_pre import CONTRACTION, GPT2, PRE_TOKENIZERS

# The same matches as tokenizer.json and as llama.cpp, whose engine lacks (?i:) and possessive
# quantifiers, write them.
_SPELLINGS = {
    "\r": r"\r",
    "\n": r"\n",
    r"[^\r\n\p{L}\p{N}]?+": r"[^\r\n\p{L}\p{N}]?",
    r"[^\s\p{L}\p{N}]++": r"[^\s\p{L}\p{N}]+",
    r"\p{N}{1}": r"\p{N}",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)": CONTRACTION,
    "(?i:[sdmt]|ll|ve|re)": "(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
}
_EACH_DIGIT, _DIGITS, _PUNCTUATION = "each digit", "runs of digits", "runs of punctuation"
# Falcon looks for digits after bytes have become characters, some of which count as digits. The
# row of llama.cpp splits the text alone and gives the same ids: a vocabulary that was trained
# behind these steps has no merge across such a character.
_FALCON = (_PUNCTUATION, GPT2, _DIGITS, "[0-9][0-9][0-9]")
# What is written where several names have the same patterns.
_PREFERRED = ("gpt-2", "llama-bpe", "qwen2", "starcoder", "deepseek-v3", "gpt-4o", "dbrx", "glm4", "bloom")
_DEPTH = 8


def find_pre(pre_tokenizer: Node, ignore_merges: bool) -> str:
    """The name of the row for a byte-level BPE; FormatError naming the patterns that no row has."""
    steps = tuple(_steps(pre_tokenizer, 0))
    if steps == _FALCON and not ignore_merges:
        return "falcon"
    patterns = tuple(_spelled(r"\p{N}" if step == _EACH_DIGIT else step) for step in steps)
    names = [
        name for name, row in PRE_TOKENIZERS.items() if row.patterns == patterns and row.ignore_merges == ignore_merges
    ]
    if not names:
        raise pre_tokenizer.fault(
            f"splits by {', then by '.join(shown(step, 400) for step in steps) or 'nothing'}, "
            f"with ignore_merges {str(ignore_merges).lower()}: no known pre-tokenizer"
        )
    return next((name for name in _PREFERRED if name in names), names[0])


def _digits_together(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """DeepSeek LLM's row has runs of digits where the model splits each off; its tokens hold but one digit."""
    several = len(patterns) > 2 and patterns[-1] == r"\p{N}"
    return (*patterns[:-1], r"\p{N}+") if several else patterns


def is_byte_level(pre_tokenizer: Node) -> bool:
    """Whether some step spells bytes as characters."""
    if pre_tokenizer.value is None:
        return False
    if pre_tokenizer.get("type", str) == "Sequence":
        return any(node.get("type", str) == "ByteLevel" for node in pre_tokenizer.at("pretokenizers").items())
    return pre_tokenizer.get("type", str) == "ByteLevel"


def _steps(node: Node, depth: int) -> Iterator[str]:
    kind = node.get("type", str)
    if kind == "Sequence" and depth < _DEPTH:
        for inner in node.at("pretokenizers").items():
            yield from _steps(inner, depth + 1)
    elif kind == "ByteLevel":
        if node.get("add_prefix_space", bool, False):
            raise node.fault("has add_prefix_space true, which is not supported")
        if node.get("use_regex", bool, True):
            yield GPT2
    elif kind == "Digits":
        yield _EACH_DIGIT if node.get("individual_digits", bool, False) else _DIGITS
    elif kind == "Punctuation" and node.get("behavior", str) == "Contiguous":
        yield _PUNCTUATION
    elif kind == "Split":
        yield _split_pattern(node)
    else:
        raise node.fault(f"is of type {shown(str(kind))}, which is not supported in a byte-level BPE")


def _split_pattern(node: Node) -> str:
    """The pattern; what it matches and what lies between must both be kept as words."""
    behavior, invert = node.get("behavior", str), node.get("invert", bool, False)
    # The second form keeps matches alone: the same for patterns that leave nothing between.
    if (behavior, invert) not in (("Isolated", False), ("Removed", True)):
        raise node.fault(f"has behavior {shown(str(behavior))}, invert {str(invert).lower()}, which is not supported")
    pattern = node.at("pattern").get("Regex", str)
    if pattern is None:
        raise node.fault("has no pattern.Regex")
    return pattern


def _spelled(pattern: str) -> str:
    for there, here in _SPELLINGS.items():
        pattern = pattern.replace(there, here)
    return pattern
