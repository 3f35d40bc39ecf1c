"""Tiny tokenizers of each family's kind, as tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (Path(__file__).parents[1] / "pinfer" / "assets" / "calibration.txt").read_text(encoding="utf-8")
_SPACE = "▁"
_CLASS = {"spm": "LlamaTokenizerFast", "gemma": "GemmaTokenizerFast", "qwen2": "Qwen2TokenizerFast"}
_LLAMA3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True)
class Kind:
    """A family's tokenizer: SentencePiece-like (`bytes_as` "fallback") or byte-level; specials come first or last."""

    bytes_as: str
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    words: str | None = None
    size: int = 512
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    add_bos: bool = False
    prepends_space: bool = False
    template: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def special_ids(self) -> dict[str, int]:
        """`bos_token_id`, `eos_token_id` and `pad_token_id`, those that there are."""
        names = {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}
        listed = [*self.first, *[""] * (self.size - len(self.first) - len(self.last)), *self.last]
        return {key: listed.index(name) for key, name in names.items() if name is not None}


_LLAMA2 = Kind(
    "fallback", ("<unk>", "<s>", "</s>"), bos="<s>", eos="</s>", unk="<unk>", add_bos=True, prepends_space=True
)
TOKENIZERS: dict[str, Kind] = {
    "spm": _LLAMA2,
    "phi3": Kind(
        "fallback",
        ("<unk>", "<s>", "</s>"),
        ("<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        unk="<unk>",
        prepends_space=True,
    ),
    "gemma": Kind(
        "fallback",
        ("<pad>", "<eos>", "<bos>", "<unk>"),
        ("<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        eos="<eos>",
        pad="<pad>",
        unk="<unk>",
        add_bos=True,
    ),
    "llama3": Kind(
        "level",
        last=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        words=_LLAMA3_WORDS,
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        add_bos=True,
    ),
    "qwen2": Kind(
        "level",
        last=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        words=_QWEN2_WORDS,
        eos="<|im_end|>",
        pad="<|endoftext|>",
    ),
    "falcon": Kind("level", ("<|endoftext|>",), bos="<|endoftext|>", eos="<|endoftext|>"),
    "opt": Kind(
        "level", ("<s>", "<pad>", "</s>", "<unk>"), bos="</s>", eos="</s>", pad="<pad>", unk="</s>", add_bos=True
    ),
}


def save_tokenizer(name: str, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json of a kind."""
    kind = TOKENIZERS[name]
    folder.joinpath("tokenizer.json").write_text(_trained(name), encoding="utf-8")
    tokens = {
        key: token
        for key, token in {
            "bos_token": kind.bos,
            "eos_token": kind.eos,
            "pad_token": kind.pad,
            "unk_token": kind.unk,
        }.items()
        if token is not None
    }
    settings = tokens | {"tokenizer_class": _CLASS.get(name, "PreTrainedTokenizerFast"), "model_max_length": 128}
    if kind.add_bos:
        settings |= {"add_bos_token": True, "add_eos_token": False}
    folder.joinpath("tokenizer_config.json").write_text(json.dumps(settings | kind.extra, indent=2))
    folder.joinpath("special_tokens_map.json").write_text(json.dumps(tokens, indent=2))


@cache
def _trained(name: str) -> str:
    kind = TOKENIZERS[name]
    built = _fallback(kind) if kind.bytes_as == "fallback" else _byte_level(kind)
    built.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in (*kind.first, *kind.last)])
    if kind.add_bos:
        assert kind.bos is not None
        built.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", special_tokens=[(kind.bos, built.token_to_id(kind.bos))]
        )
    assert built.get_vocab_size() == kind.size, (name, built.get_vocab_size())
    return built.to_str(pretty=True)


def _fallback(kind: Kind) -> Tokenizer:
    """As a converted SentencePiece model: spaces are ▁, unknown characters fall back to bytes, merges by rank."""
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    fixed = [*kind.first, *bytes_]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if kind.prepends_space else "never")
    n_learned = kind.size - len(fixed) - len(kind.last)
    learner.train_from_iterator(
        TEXT.splitlines(), trainers.BpeTrainer(vocab_size=n_learned, show_progress=False, limit_alphabet=80)
    )
    learned = json.loads(learner.to_str())["model"]
    pieces = sorted(learned["vocab"], key=learned["vocab"].get)
    # SentencePiece lists merged pieces before single characters.
    pieces = [one for one in pieces if len(one) > 1] + [one for one in pieces if len(one) == 1]
    vocabulary = {piece: index for index, piece in enumerate([*fixed, *pieces])}
    merges = [tuple(pair) for pair in learned["merges"]]
    built = Tokenizer(models.BPE(vocabulary, merges, unk_token=kind.unk, fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", _SPACE)
    if kind.prepends_space:
        built.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace])
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        built.normalizer, strip = replace, []
    built.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return built


def _byte_level(kind: Kind) -> Tokenizer:
    """As GPT-2: bytes are printable characters, words are split by a pattern, merges by rank."""
    built = Tokenizer(models.BPE())
    if kind.words is None:
        built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        built.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(kind.words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=kind.size - len(kind.last),
        special_tokens=list(kind.first),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator([TEXT], trainer)
    return built
