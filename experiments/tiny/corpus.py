"""Split the sources into training and held-out text, learn the tokenizer, store token arrays."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.tiny.clean import is_prose, normalise
from experiments.tiny.sources import SOURCES, Document, Source, unpack

HELDOUT_STRIDE = 33  # every 33rd document, so that 3 % of each domain is never trained on
HELDOUT_OFFSET = 16
MAX_PARAGRAPHS = 60  # longer documents are cut, so that a held-out one is a few pages
END_OF_TEXT = "<|endoftext|>"  # starts every document; BOS and EOS at once
END_OF_TEXT_ID = 0
SAMPLE_PIECE_CHARS = 1500  # a sample file takes this much of a document, for variety
SAMPLE_SLACK_CHARS = 300  # by which a domain may exceed its share to end with a whole paragraph


@dataclass(frozen=True)
class Split:
    """Texts of one domain, a document an item; held-out documents are never trained on."""

    train: list[str]
    heldout: list[str]


@dataclass(frozen=True)
class Corpus:
    """Token arrays (uint16), the tokenizer and the number of training tokens in each domain."""

    tokenizer: Tokenizer
    train: np.ndarray
    heldout: dict[str, np.ndarray]
    train_tokens: dict[str, int]


def split_documents(documents: Iterable[Document], seen: set[int], max_chars: int) -> Split:
    """Clean, deduplicate and split documents, training text capped at max_chars.

    Held-out documents go first, so that a paragraph in both parts stays held out only. Beyond the
    cap, documents are dropped in a seeded random order. `seen` collects paragraph hashes.
    """
    listed = [
        (identifier, paragraphs[start : start + MAX_PARAGRAPHS])
        for identifier, paragraphs in documents
        for start in range(0, len(paragraphs), MAX_PARAGRAPHS)
    ]
    heldout = [doc for i, doc in enumerate(listed) if i % HELDOUT_STRIDE == HELDOUT_OFFSET]
    train = [doc for i, doc in enumerate(listed) if i % HELDOUT_STRIDE != HELDOUT_OFFSET]
    random.Random(0).shuffle(train)
    heldout_texts = [text for doc in heldout if (text := _clean(doc[1], seen))]
    train_texts, size = [], 0
    for _, paragraphs in train:
        if size >= max_chars:
            break
        if text := _clean(paragraphs, seen):
            train_texts.append(text)
            size += len(text)
    return Split(train_texts, heldout_texts)


def _clean(paragraphs: list[str], seen: set[int]) -> str:
    kept = []
    for paragraph in map(normalise, paragraphs):
        digest = int.from_bytes(hashlib.blake2b(paragraph.encode(), digest_size=8).digest(), "big")
        if is_prose(paragraph) and digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return "\n\n".join(kept)


def read_sources(cache: Path, sources: tuple[Source, ...] = SOURCES) -> dict[str, Split]:
    """Return the split of every source, downloading packages that `cache` lacks."""
    seen: set[int] = set()
    splits = {}
    for source in sources:
        documents = source.read(unpack(source.packages, cache))
        splits[source.name] = split_documents(documents, seen, source.max_chars)
    return splits


def synthetic_splits(seed: int) -> dict[str, Split]:
    """Return two small invented domains, for a smoke run without network."""
    rng = random.Random(seed)
    nouns = ["river", "table", "garden", "letter", "winter", "engine", "sailor", "window"]
    verbs = ["finds", "watches", "repairs", "follows", "remembers", "paints"]

    def sentence(joint: str) -> str:
        return f"The {rng.choice(nouns)} {rng.choice(verbs)} {joint} {rng.choice(nouns)} again."

    return {
        name: split_documents(
            [(str(i), [" ".join(sentence(joint) for _ in range(4))]) for i in range(300)],
            set(),
            1_000_000,
        )
        for name, joint in (("near", "this"), ("far", "that distant"))
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a byte-level BPE with GPT-2's pre-tokenisation; END_OF_TEXT gets id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Return the tokens (uint16) of all texts, END_OF_TEXT before each."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    pieces = [np.array([END_OF_TEXT_ID, *encoding.ids], np.uint16) for encoding in encodings]
    return np.concatenate(pieces)


def build_corpus(splits: dict[str, Split], vocab_size: int) -> Corpus:
    """Train the tokenizer on the training texts and encode everything.

    Training documents of all domains are shuffled together with a fixed seed.
    """
    train_texts = [text for split in splits.values() for text in split.train]
    random.Random(1).shuffle(train_texts)
    tokenizer = train_tokenizer(train_texts, vocab_size)
    return Corpus(
        tokenizer=tokenizer,
        train=encode_documents(tokenizer, train_texts),
        heldout={name: encode_documents(tokenizer, s.heldout) for name, s in splits.items()},
        train_tokens={name: encode_documents(tokenizer, split.train).size for name, split in splits.items()},
    )


def sample_text(texts_by_domain: list[list[str]], total_chars: int) -> str:
    """Return about total_chars of text, an equal share a domain, in pieces of whole paragraphs.

    Pieces are spread evenly over each domain's documents; a document gives its beginning.
    """
    share = total_chars // len(texts_by_domain)
    pieces = []
    for texts in texts_by_domain:
        # Twice the even share, because a document may be shorter than its piece.
        piece_chars = max(SAMPLE_PIECE_CHARS, 2 * share // len(texts))
        stride = max(1, len(texts) * piece_chars // (2 * share))
        taken = 0
        for text in (text for first in range(stride) for text in texts[first::stride]):
            if taken >= share:
                break
            piece = _whole_paragraphs(text, min(piece_chars, share - taken + SAMPLE_SLACK_CHARS))
            pieces.append(piece)
            taken += len(piece)
    return "\n\n".join(piece for piece in pieces if piece) + "\n"


def _whole_paragraphs(text: str, max_chars: int) -> str:
    """Return the leading paragraphs of text that fit max_chars, at least none."""
    taken, size = [], 0
    for paragraph in text.split("\n\n"):
        size += len(paragraph) + 2
        if size > max_chars:
            break
        taken.append(paragraph)
    return "\n\n".join(taken)


def save_corpus(corpus: Corpus, folder: Path) -> None:
    """Write a corpus to `folder`; the folder appears complete or not at all."""
    staging = folder.with_name(f"{folder.name}.{os.getpid()}")
    staging.mkdir(parents=True)
    corpus.tokenizer.save(str(staging / "tokenizer.json"))
    np.savez(staging / "tokens.npz", train=corpus.train, **corpus.heldout)
    (staging / "train_tokens.json").write_text(json.dumps(corpus.train_tokens, indent=1))
    os.replace(staging, folder)


def load_corpus(folder: Path) -> Corpus:
    """Read what `save_corpus` wrote."""
    train_tokens = json.loads((folder / "train_tokens.json").read_text())
    arrays = dict(np.load(folder / "tokens.npz"))
    train = arrays.pop("train")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Corpus(tokenizer, train, arrays, train_tokens)


class Batches:
    """Training windows in a seeded order; batch i is the same however often a run is resumed."""

    def __init__(self, tokens: np.ndarray, length: int, batch_size: int, seed: int) -> None:
        self.tokens, self.length, self.batch_size, self.seed = tokens, length, batch_size, seed
        self.per_epoch = (tokens.size - length - 1) // length // batch_size
        if self.per_epoch < 1:
            raise ValueError(f"{tokens.size} tokens are too few for a batch of {batch_size}")

    def at(self, step: int) -> np.ndarray:
        """Return batch `step`: int64 [B, T + 1], inputs and targets overlapping."""
        epoch, index = divmod(step, self.per_epoch)
        rng = np.random.default_rng((self.seed, epoch))
        shift = int(rng.integers(self.length))  # other window borders each epoch
        order = rng.permutation(self.per_epoch * self.batch_size)
        starts = order[index * self.batch_size : (index + 1) * self.batch_size] * self.length
        windows = starts[:, None] + shift + np.arange(self.length + 1)
        return self.tokens[np.minimum(windows, self.tokens.size - 1)].astype(np.int64)
