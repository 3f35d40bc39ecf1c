"""tokenizer.json (or vocab.json with merges.txt): what of it a GGUF file can say, checked; the rest is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pinfer.formats.errors import FormatError, shown
from pinfer.formats.huggingface.json_file import Node
from pinfer.formats.huggingface.pre_tokenizers import find_pre, is_byte_level

MAX_BYTES = 256 * 2**20
MAX_ID = 2**20  # the largest vocabularies have 2^18 tokens; every id takes a row, tokens in gaps as well
SPACE = "▁"

SpacePrefix = Literal["always", "first", "never"]


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of a text before anything else; `lstrip` and `rstrip` swallow the white space beside it."""

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False


@dataclass
class JsonTokenizer:
    """A BPE tokenizer: `pre` is None for one on characters with byte fallback, as SentencePiece has it.

    `around` is (BOS, EOS) as the post-processor puts them around a text, None where it does not
    say. `space_prefix` tells before which parts of a text a space goes.
    """

    path: Path
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    pre: str | None
    unknown: str | None = None
    nfc: bool = False
    space_prefix: SpacePrefix = "never"
    added: list[AddedToken] = field(default_factory=list)
    around: tuple[str | None, str | None] | None = None


def read_tokenizer_json(path: Path) -> JsonTokenizer:
    """Read tokenizer.json; FormatError naming the file and the key for what is faulty or not supported."""
    root = Node.read(path, MAX_BYTES)
    model, pre_tokenizer = root.at("model"), root.at("pre_tokenizer")
    kind = model.get("type", str, "BPE")  # files of old have no type
    if kind != "BPE":
        raise model.fault(f"is of type {shown(kind)}; only BPE is supported")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key, str):
            raise model.at(key).fault("is not empty, which is not supported")
    vocab, merges = read_vocab(model.at("vocab")), read_merges(model.at("merges"))
    tokenizer = JsonTokenizer(path, vocab, merges, None, model.get("unk_token", str))
    if is_byte_level(pre_tokenizer):
        tokenizer.pre = find_pre(pre_tokenizer, model.get("ignore_merges", bool, False))
        tokenizer.nfc = _read_nfc(root.at("normalizer"))
    elif model.get("byte_fallback", bool, False):
        tokenizer.space_prefix = _read_space_prefix(root.at("normalizer"), pre_tokenizer)
    else:
        raise model.fault("has neither byte_fallback nor a ByteLevel pre_tokenizer: it would lose text")
    tokenizer.added = [_read_added(node) for node in root.at("added_tokens").items()]
    tokenizer.around = _read_around(root.at("post_processor"))
    return tokenizer


def read_vocab(node: Node) -> dict[str, int]:
    """Token texts and their ids, each once."""
    vocab = node.as_(dict)
    if not vocab:
        raise node.fault("is missing or empty")
    if set(map(type, vocab.values())) != {int} or not 0 <= min(vocab.values()) <= max(vocab.values()) < MAX_ID:
        text = next(text for text, i in vocab.items() if type(i) is not int or not 0 <= i < MAX_ID)
        raise node.fault(f"gives {shown(text)} the id {shown(repr(vocab[text]))}, not one from 0 to {MAX_ID - 1}")
    node.check_text("".join(vocab))
    if len(set(vocab.values())) != len(vocab):
        texts: dict[int, str] = {}
        for text, i in vocab.items():
            if i in texts:
                raise node.fault(f"gives the id {i} to both {shown(texts[i])} and {shown(text)}")
            texts[i] = text
    return vocab


def read_merges(node: Node) -> list[tuple[str, str]]:
    """Pairs, each written as "left right" or as a list of two."""
    merges = []
    for index, value in enumerate(node.as_(list, [])):
        pair = value.split(" ") if isinstance(value, str) else value
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)):
            raise FormatError(f"{node.where}[{index}] is {shown(repr(value))}, not two texts")
        merges.append((pair[0], pair[1]))
    node.check_text("".join(left + right for left, right in merges))
    return merges


def _read_added(node: Node) -> AddedToken:
    content, token_id = node.get("content", str), node.get("id", int)
    if not content:
        raise node.fault("has no content")
    if token_id is None or not 0 <= token_id < MAX_ID:
        raise node.at("id").fault(f"is {token_id}, not from 0 to {MAX_ID - 1}")
    special, left, right = (node.get(key, bool, False) for key in ("special", "lstrip", "rstrip"))
    return AddedToken(token_id, content, special, left, right)


def _parts(node: Node, key: str) -> list[Node]:
    """The steps of a normalizer or pre-tokenizer, of which a sequence has many and null none."""
    if node.value is None:
        return []
    return list(node.at(key).items()) if node.get("type", str) == "Sequence" else [node]


def _read_nfc(normalizer: Node) -> bool:
    parts = _parts(normalizer, "normalizers")
    for part in parts:
        if part.get("type", str) != "NFC":
            raise part.fault(f"is of type {shown(str(part.get('type', str)))}; a byte-level BPE may have NFC alone")
    return bool(parts)


def _read_space_prefix(normalizer: Node, pre_tokenizer: Node) -> SpacePrefix:
    """How spaces become marks: by the normalizer (Llama 2, Gemma) or the pre-tokenizer (Mistral v0.3)."""
    prefix: SpacePrefix = "never"
    marked = False
    for part in _parts(normalizer, "normalizers"):
        kind = part.get("type", str)
        if kind == "Prepend" and part.get("prepend", str) == SPACE:
            prefix = "always"
        elif kind == "Replace" and (part.at("pattern").get("String", str), part.get("content", str)) == (" ", SPACE):
            marked = True
        else:
            raise part.fault(f"is of type {shown(str(kind))}, which is not supported with byte fallback")
    for part in _parts(pre_tokenizer, "pretokenizers"):
        kind = part.get("type", str)
        if kind == "Metaspace" and part.get("replacement", str) == SPACE:
            scheme = part.get("prepend_scheme", str, "always" if part.get("add_prefix_space", bool, True) else "never")
            if scheme not in ("always", "first", "never"):
                raise part.at("prepend_scheme").fault(f"is {shown(scheme)}, not always, first or never")
            prefix, marked = scheme, True
        elif kind == "Split" and part.at("pattern").get("String", str) == " " and marked:
            continue  # Gemma's, which finds nothing: the normalizer has replaced every space
        else:
            raise part.fault(f"is of type {shown(str(kind))}, which is not supported with byte fallback")
    if not marked:
        raise normalizer.fault("does not replace spaces by '▁', nor does the pre_tokenizer")
    return prefix


def _read_around(processor: Node) -> tuple[str | None, str | None] | None:
    """(BOS, EOS) of the single-text template, None for a file that does not say."""
    parts = _parts(processor, "processors")
    for part in parts:
        kind = part.get("type", str)
        if kind == "TemplateProcessing":
            names = [item.at("SpecialToken").get("id", str) for item in part.at("single").items()]
            text = names.index(None) if None in names else -1
            if text not in (0, 1) or None in names[text + 1 :] or len(names) > text + 2:
                raise part.at("single").fault("is not one text with at most one token before and one after it")
            first, last = (names[0] if text else None), (names[-1] if len(names) > text + 1 else None)
            return first, last
        if kind != "ByteLevel":
            raise part.fault(f"is of type {shown(str(kind))}, which is not supported")
    return (None, None) if parts else None


def read_vocab_files(folder: Path, pre: str, nfc: bool) -> JsonTokenizer:
    """vocab.json with merges.txt, as GPT-2 and OPT have them, for a pre-tokenizer that the caller knows."""
    path = folder / "vocab.json"
    merges_path = folder / "merges.txt"
    root = Node.read(path, MAX_BYTES)
    try:
        lines = merges_path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(f"{merges_path}: not UTF-8 at byte {error.start}") from None
    # "#version: 0.2" opens the file; a merge may begin with "#" as well.
    kept = [line.rstrip("\r") for line in lines[lines[0].startswith("#version") :]]
    merges = read_merges(Node([line for line in kept if line], f"{merges_path}: merges"))
    return JsonTokenizer(path, read_vocab(root), merges, pre, nfc=nfc)
