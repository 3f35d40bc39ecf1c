"""How each byte-level BPE splits text into words before any merge: one row per `tokenizer.ggml.pre`.

A text is split by the first pattern (matches and the gaps between them), each piece by the next,
and so on. The patterns are those of llama.cpp (src/llama-vocab.cpp), with two kinds of exception.
Where llama.cpp notes that it had to simplify a model's own pattern for lack of Unicode classes in
its engine (tekken, gpt-4o), the model's own stands here. Left out are its hand-written splitters
(afmoe, kimi-k2, tiny_aya, superbpe) and models that are no byte-level BPE (gemma4, sarvam-moe).
"""

from __future__ import annotations

from dataclasses import dataclass

CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
_SPACES = r"\s+(?!\S)|\s+"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+|" + _SYMBOLS + "|" + _SPACES
_DIGITS_3 = "[0-9][0-9][0-9]"


def _modern(numbers: str, contraction: str = CONTRACTION + "|", spaces: str = _SPACES) -> str:
    """The pattern of Llama 3 and its many variants, which differ in how many digits make a word."""
    return rf"{contraction}{_WORD}|{numbers}|{_SYMBOLS}[\r\n]*|\s*[\r\n]+|{spaces}"


_LLAMA3 = _modern(r"\p{N}{1,3}")
_QWEN2 = _modern(r"\p{N}")
_QWEN35 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    rf"|\s*[\r\n]+|{_SPACES}"
)
_SEED = rf"{CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|{_SPACES}"
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|"
    rf"{_WORD}|\p{{N}}|{_SYMBOLS}[\r\n]*|\s*[\r\n]|{_SPACES}"
)
_EXAONE_MOE = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    rf"|{_SYMBOLS}[\r\n/]?|\s*[\r\n]|{_SPACES}"
)
_JAIS2_SPACES = r"\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)"
_JAIS2_SPACES += r"|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"

# Bloom's own class, brackets and bar included: text up to the full stops and commas of many scripts.
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(numbers: str, ending: str) -> str:
    """Words that a change from lower to upper case ends, perhaps with a contraction as `ending`."""
    head = r"[^\r\n\p{L}\p{N}]?"
    words = f"{head}{_UPPER}*{_LOWER}+{ending}|{head}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{numbers}|{_SYMBOLS}[\r\n/]*|\s*[\r\n]+|{_SPACES}"


_GPT4O = _cased(r"\p{N}{1,3}", CONTRACTION + "?")
_TEKKEN = _cased(r"\p{N}", "")

_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# DeepSeek LLM lists the cased letters of its Unicode version instead of naming the class.
_DEEPSEEK_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_PUNCTUATION = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_DEEPSEEK_CASED}]+", rf"\s?[{_DEEPSEEK_PUNCTUATION}]+", r"\s+$", _CJK, r"\p{N}+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|" + _SPACES,
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split: `patterns` in order; `ignore_merges` takes a word that is a token whole.

    joins_words: a word may hold spaces between letters.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    joins_words: bool = False


def _rows() -> dict[str, PreTokenizer]:
    gpt2 = PreTokenizer((GPT2,))
    digitwise = PreTokenizer((r"\p{N}", GPT2))
    llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
    qwen2 = PreTokenizer((_QWEN2,))
    rows = {
        gpt2: "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert",
        digitwise: "starcoder refact command-r smollm codeshell exaone minerva-7b mellum2",
        llama3: "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        PreTokenizer((_LLAMA3,)): "dbrx smaug-bpe chatglm-bpe",
        PreTokenizer((_LLAMA3,), ignore_merges=True): "glm4 glm5",
        qwen2: "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 hunyuan solar-open megrez grok-2",
        PreTokenizer((_QWEN35,)): "qwen35",
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", _DIGITS_3)): "default",
        PreTokenizer((r"[\p{P}\$\+<=>\^~\|`]+", GPT2, _DIGITS_3)): "falcon",
        PreTokenizer(_DEEPSEEK_LLM): "deepseek-llm",
        PreTokenizer(_DEEPSEEK_CODER): "deepseek-coder",
        PreTokenizer(_DEEPSEEK_V3): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        PreTokenizer((_BLOOM,)): "bloom poro-chat gpt3-finnish",
        PreTokenizer((_BLOOM, r"\p{N}")): "viking",
        PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): "tekken",
        PreTokenizer((_GPT4O,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
        PreTokenizer((_BAILING,)): "bailingmoe bailingmoe2 llada-moe",
        PreTokenizer((_SEED,)): "seed-coder",
        PreTokenizer((_EXAONE_MOE,), joins_words=True): "exaone-moe",
        PreTokenizer((r"\p{N}{1,3}", _modern(r"\p{N}+")), ignore_merges=True): "minicpm5",
        PreTokenizer((_modern(r"\p{N}{1,3}", spaces=_JAIS2_SPACES),)): "jais-2",
        PreTokenizer((_modern(r"\p{N}", contraction=""),)): "ufakzeka",
    }
    return {name: row for row, names in rows.items() for name in names.split()}


PRE_TOKENIZERS = _rows()
