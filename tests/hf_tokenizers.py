"""Tokenizer folders in the form of each published family, with small vocabularies trained on a shipped text.

`build(name, folder)` writes the files that a repository of the family has; what is trained is kept.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

TEXT = Path(__file__).parent.parent / "pinfer" / "assets" / "calibration.txt"
CODE = Path(__file__).parent / "hf_tokenizers.py"
OTHER = "日本語のテキスト、中文文字。 Ünïcödé ñandú été 1234567890 ½ x² 12ò 34ó\r\n\r\n\t\tfoo()  ... naïve\u0301\n"

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _REPLACE]}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _lines() -> list[str]:
    texts = [TEXT.read_text(encoding="utf-8"), CODE.read_text(encoding="utf-8"), OTHER * 20]
    return [line for text in texts for line in text.splitlines(keepends=True)]


def added(token_id: int, content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": content, **plain, **flags, "special": special}


def around(first: str | None, token_id: int = 0) -> dict[str, Any]:
    """A post-processor that puts one token before a text."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    start = [] if first is None else [{"SpecialToken": {"id": first, "type_id": 0}}]
    known = {} if first is None else {first: {"id": first, "ids": [token_id], "tokens": [first]}}
    return {
        "type": "TemplateProcessing",
        "single": [*start, text],
        "pair": [*start, text, text],
        "special_tokens": known,
    }


@cache
def sentencepiece_model(
    user_defined: tuple[str, ...] = (), control: tuple[str, ...] = (), gemma: bool = False
) -> bytes:
    """A SentencePiece BPE with the settings of Llama (or Gemma: other ids, no space in front)."""
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if gemma else {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    names = {"bos_piece": "<bos>", "eos_piece": "<eos>"} if gemma else {}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line.rstrip("\n") for line in _lines()]),
        model_writer=out,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.99,
        add_dummy_prefix=not gemma,
        user_defined_symbols=list(user_defined),
        control_symbols=list(control),
        minloglevel=2,
        **ids,
        **names,
    )
    return out.getvalue()


def _pieces(model: bytes) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of a model: every split of a token into two, by falling score of the token."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(len(processor))}
    scores = {
        text: processor.get_score(i)
        for text, i in vocab.items()
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
    }
    merges = [
        (score, [text[:at], text[at:]])
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    return vocab, [pair for _, pair in sorted(merges, key=lambda item: -item[0])]


def _json(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, "added_tokens": [], **parts, "model": model}


def _write(folder: Path, files: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            (folder / name).write_text(text, encoding="utf-8", newline="")


def _spm_json(model: bytes, extra: list[dict[str, Any]], heads: list[str], **parts: Any) -> dict[str, Any]:
    vocab, merges = _pieces(model)
    extra = [added(vocab[text], text) for text in heads] + extra
    vocab |= {token["content"]: token["id"] for token in extra}
    spec = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return _json(
        spec | {"ignore_merges": False, "vocab": vocab, "merges": merges},
        added_tokens=extra,
        decoder={"type": "Sequence", "decoders": decoders},
        **parts,
    )


def _llama_like(
    folder: Path, extra: list[dict[str, Any]], bos: bool = True, with_model: bool = False, **config: Any
) -> None:
    model = sentencepiece_model()
    post = around("<s>", 1) if bos else around(None)
    content = _spm_json(model, extra, ["<unk>", "<s>", "</s>"], normalizer=_PREPEND, post_processor=post)
    settings = {
        "add_bos_token": bos,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    _write(folder, {"tokenizer.json": content, "tokenizer_config.json": settings | config})
    if with_model:
        _write(folder, {"tokenizer.model": model})


def llama2(folder: Path) -> None:
    _llama_like(folder, [], tokenizer_class="LlamaTokenizer")


def llama2_both(folder: Path) -> None:
    _llama_like(folder, [], with_model=True, tokenizer_class="LlamaTokenizer")


def codellama(folder: Path) -> None:
    marks = [added(900 + i, text) for i, text in enumerate(["▁<SUF>", "▁<PRE>", "▁<MID>", "▁<EOT>"])]
    _llama_like(folder, marks, tokenizer_class="CodeLlamaTokenizer")


def mistral_v1(folder: Path) -> None:
    _llama_like(folder, [], tokenizer_class="LlamaTokenizer", sp_model_kwargs={}, use_default_system_prompt=False)


def mistral_v3(folder: Path) -> None:
    """The first of the family with a Metaspace pre-tokenizer, which prefixes the first text alone."""
    marks = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    model = sentencepiece_model(control=marks)
    pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    heads = ["<unk>", "<s>", "</s>", *marks]
    content = _spm_json(model, [], heads, pre_tokenizer=pre, post_processor=around("<s>", 1))
    settings = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>"}
    _write(
        folder, {"tokenizer.json": content, "tokenizer_config.json": settings | {"tokenizer_class": "LlamaTokenizer"}}
    )


def phi3(folder: Path) -> None:
    marks = ["<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]
    tokens = [added(900, "<|endoftext|>"), *(added(901 + i, text, rstrip=True) for i, text in enumerate(marks))]
    _llama_like(folder, tokens, bos=False, tokenizer_class="LlamaTokenizer", eos_token="<|endoftext|>")


def gemma(folder: Path) -> None:
    """Runs of spaces and newlines are tokens of their own, cut out before anything is joined."""
    runs = ("\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>")
    model = sentencepiece_model(runs, ("<start_of_turn>", "<end_of_turn>"), gemma=True)
    vocab, _ = _pieces(model)
    heads = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    ordinary = [added(vocab[text], text, special=False, normalized="▁" in text) for text in runs]
    pre = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    post = around("<bos>", 2)
    content = _spm_json(model, ordinary, heads, normalizer=_REPLACE, pre_tokenizer=pre, post_processor=post)
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write(folder, {"tokenizer.json": content, "tokenizer_config.json": settings | {"add_bos_token": True}})
    _write(folder, {"generation_config.json": {"bos_token_id": 2, "eos_token_id": [1, vocab["<end_of_turn>"]]}})


@cache
def _byte_level(kind: str) -> dict[str, Any]:
    """The model of a byte-level BPE that was trained behind a family's pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt2", "falcon"))
    steps: dict[str, list[Any]] = {
        "gpt2": [byte_level],
        "llama3": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), byte_level],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN2), "isolated"), byte_level],
        "falcon": [
            pre_tokenizers.Punctuation("contiguous"),
            byte_level,
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ],
    }
    parts = steps[kind]
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    content = json.loads(tokenizer.to_str())
    return {"model": content["model"], "pre_tokenizer": content["pre_tokenizer"]}


def _byte_level_json(kind: str, specials: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    trained = _byte_level(kind)
    model = trained["model"] | {"ignore_merges": kind == "llama3", "fuse_unk": False, "byte_fallback": False}
    return _json(model, pre_tokenizer=trained["pre_tokenizer"], added_tokens=specials, decoder=_BYTE_LEVEL, **parts)


def _numbered(texts: list[str], special: bool = True, start: int = 900) -> list[dict[str, Any]]:
    return [added(start + i, text, special) for i, text in enumerate(texts)]


def llama3(folder: Path) -> None:
    texts = [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
    ]
    post = {"type": "Sequence", "processors": [_BYTE_LEVEL, around("<|begin_of_text|>", 900)]}
    content = _byte_level_json("llama3", _numbered(texts), post_processor=post)
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(folder, {"tokenizer.json": content, "tokenizer_config.json": config})
    _write(folder, {"generation_config.json": {"bos_token_id": 900, "eos_token_id": [901, 904, 905]}})


def _qwen(folder: Path, more: list[str]) -> None:
    specials = _numbered(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) + _numbered(more, False, 903)
    content = _byte_level_json("qwen2", specials, normalizer={"type": "NFC"}, post_processor=_BYTE_LEVEL)
    config = {"add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    _write(folder, {"tokenizer.json": content, "tokenizer_config.json": config | {"tokenizer_class": "Qwen2Tokenizer"}})


def qwen2(folder: Path) -> None:
    _qwen(folder, [])


def qwen3(folder: Path) -> None:
    _qwen(folder, ["<tool_call>", "</tool_call>", "<think>", "</think>"])


def falcon(folder: Path) -> None:
    texts = [">>TITLE<<", ">>QUESTION<<", "<|endoftext|>"]
    content = _byte_level_json("falcon", _numbered(texts), post_processor=_BYTE_LEVEL)
    config = {"add_prefix_space": False, "eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    _write(folder, {"tokenizer.json": content, "tokenizer_config.json": config})


def gpt2(folder: Path) -> None:
    content = _byte_level_json("gpt2", _numbered(["<|endoftext|>"]), post_processor=_BYTE_LEVEL)
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "tokenizer_class": "GPT2Tokenizer"}
    _write(folder, {"tokenizer.json": content, "tokenizer_config.json": config})


def opt(folder: Path) -> None:
    """No tokenizer.json; </s> opens and ends a text."""
    model = _byte_level("gpt2")["model"]
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {text: 4 + i for text, i in model["vocab"].items()}
    merges = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"

    def mark(text: str) -> dict[str, Any]:
        return {"__type": "AddedToken", "content": text, "special": True}

    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>"}
    config = {name: mark(text) for name, text in names.items()} | {"pad_token": "<pad>"}
    config |= {"add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer"}
    _write(folder, {"vocab.json": vocab, "merges.txt": merges, "tokenizer_config.json": config})
    _write(folder, {"special_tokens_map.json": names | {"pad_token": "<pad>"}})


FAMILIES: dict[str, Callable[[Path], None]] = {
    build.__name__: build
    for build in (
        *(llama2, llama2_both, codellama, mistral_v1, mistral_v3, phi3, gemma),
        *(llama3, qwen2, qwen3, falcon, gpt2, opt),
    )
}
