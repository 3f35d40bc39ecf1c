"""The Debian packages the tiny model learns from, and how each becomes clean English documents.

Every text is in the public domain or under a permissive licence, so a model trained on it can be
shipped. Packages are unpacked with `dpkg-deb -x`: no root, nothing installed.
"""

from __future__ import annotations

import gzip
import os
import re
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.tiny.clean import html_paragraphs, join_wrapped

Document = tuple[str, list[str]]  # identifier, paragraphs

ENTRIES_PER_DOCUMENT = 40  # dictionary entries are too short to be documents of their own
PYTHON_SKIP = re.compile(r"genindex|py-modindex|search|whatsnew/changelog|license|contents")
POSTGRES_SKIP = re.compile(r"^release-|bookindex|biblio|legalnotice|index\.html")
SQLITE_SKIP = re.compile(r"releaselog|keyword_index|sitemap|doclist|toc\.html|changes\.html")
PERL_SKIP = re.compile(r"perltoc|perlgpl|perlartistic|perl(cn|jp|ko|tw)\.pod|delta\.pod|perluniprops")
FIRST_SENSE = re.compile(  # a headword line, then its first gloss, up to sense 2 or the next word
    r"\n(\S[^\n]*)\n +(?:n|v|adj|adv) 1?: (.+?)(?=\n +\d+:|\n\S|\n +\w+ \d|\Z)", re.S
)


@dataclass(frozen=True)
class Source:
    """One domain of the corpus."""

    name: str
    packages: tuple[str, ...]
    licence: str
    max_chars: int  # cap, so that no domain drowns the others
    read: Callable[[Path], Iterator[Document]]


def read_kjv(root: Path) -> Iterator[Document]:
    """Yield the chapters of the King James Bible, one verse a paragraph."""
    command = [root / "usr/bin/bible", "-f", "-p", root / "usr/lib", "gen1:1-rev22:21"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    chapters: dict[str, list[str]] = {}
    for line in text.splitlines():
        reference, _, verse = line.partition(" ")
        chapters.setdefault(reference.partition(":")[0], []).append(verse)
    yield from chapters.items()


def read_austen(root: Path) -> Iterator[Document]:
    """Yield the chapters of Jane Austen's six novels from the R package's serialised lines."""
    blob = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while blob:  # chunks of a big-endian length and a zlib stream, one a novel
        stream = zlib.decompressobj()
        lines = list(_r_strings(stream.decompress(blob[4:])))
        blob = stream.unused_data
        title = lines[0].strip() if lines else ""
        text = "\n".join(lines)
        for number, chapter in enumerate(re.split(r"\n(?=(?:CHAPTER|Chapter) )", text)):
            yield f"{title}/{number:03d}", join_wrapped(chapter)


def _r_strings(data: bytes) -> Iterator[str]:
    """Yield the strings of one character vector in R's XDR serialisation, version 2 or 3."""
    (version,) = struct.unpack_from(">i", data, 2)
    position = 14
    if version == 3:  # the native encoding's name precedes the value
        position += 4 + struct.unpack_from(">i", data, position)[0]
    flags, count = struct.unpack_from(">ii", data, position)
    if flags & 0xFF != 16:  # 16: character vector
        raise ValueError(f"expected an R character vector (type 16), found type {flags & 0xFF}")
    position += 8
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, position + 4)
        position += 8
        yield data[position : position + max(length, 0)].decode("utf-8", "replace")
        position += max(length, 0)


def html_reader(folder: str, skip: re.Pattern[str]) -> Callable[[Path], Iterator[Document]]:
    """Return a reader of every HTML page under `folder` whose relative path skip does not match."""

    def read(root: Path) -> Iterator[Document]:
        base = root / folder
        for path in sorted(base.rglob("*.html")):
            name = path.relative_to(base).as_posix()
            if not skip.search(name):
                yield name, html_paragraphs(path.read_text("utf-8", "replace"))

    return read


def read_perl(root: Path) -> Iterator[Document]:
    """Yield perl's manual pages: POD paragraphs, without code, commands and marks."""
    for path in sorted(root.rglob("*.pod")):
        if PERL_SKIP.search(path.name):
            continue
        blocks = re.split(r"\n\s*\n", path.read_text("utf-8", "replace"))
        prose = [block for block in blocks if block[:1] not in ("=", " ", "\t", "")]
        yield path.stem, [_plain_pod(block) for block in prose]


def _plain_pod(text: str) -> str:
    """Replace POD marks such as C<x>, L<text|target> and F<< x >> by their text."""
    for _ in range(3):  # marks nest, rarely more than three deep
        text = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", text, flags=re.S)
        text = re.sub(r"L<([^<>|]*)\|[^<>]*>", r"\1", text)
        text = re.sub(r"[A-Z]<([^<>]*)>", r"\1", text)
    return " ".join(text.split())


def read_jargon(root: Path) -> Iterator[Document]:
    """Yield the Jargon File's entries as "headword: definition" and further paragraphs."""
    entries: list[list[str]] = []
    for block in re.split(r"\n\s*\n", _dictd(root, "jargon")):
        if block[:1].isalnum():
            entries.append([" ".join(block.split()[:4])])
        elif entries:
            plain = " ".join(re.sub(r"[{}]", " ", block).split())
            first = len(entries[-1]) == 1
            entries[-1].append(f"{_headword(entries[-1][0])}: {plain}" if first else plain)
    yield from _grouped([paragraphs[1:] for paragraphs in entries])


def _headword(line: str) -> str:
    return re.split(r" (?:n|v|adj|adv|vt|vi|interj|prov)\b\.?,?", line)[0]


def read_devil(root: Path) -> Iterator[Document]:
    """Yield The Devil's Dictionary."""
    yield from _grouped([[paragraph] for paragraph in join_wrapped(_dictd(root, "devil"))])


def read_wordnet(root: Path) -> Iterator[Document]:
    """Yield WordNet's first sense of every third word as "word: gloss"."""
    entries = []
    for word, gloss in FIRST_SENSE.findall(_dictd(root, "wn")):
        plain = re.sub(r"\[(?:syn|ant|also)[^\]]*\]", "", gloss)
        entries.append([f"{word}: {' '.join(plain.split())}."])
    yield from _grouped(entries[::3])


def _dictd(root: Path, name: str) -> str:
    with gzip.open(root / f"usr/share/dictd/{name}.dict.dz", "rt", encoding="utf-8") as file:
        return file.read()


def _grouped(entries: list[list[str]]) -> Iterator[Document]:
    """Yield documents of ENTRIES_PER_DOCUMENT consecutive entries."""
    for start in range(0, len(entries), ENTRIES_PER_DOCUMENT):
        group = entries[start : start + ENTRIES_PER_DOCUMENT]
        yield f"{start:06d}", [paragraph for entry in group for paragraph in entry]


SOURCES = (
    Source("kjv", ("bible-kjv-text", "bible-kjv"), "public domain", 4_500_000, read_kjv),
    Source("austen", ("r-cran-janeaustenr",), "public domain", 4_500_000, read_austen),
    Source(
        "python",
        ("python3.11-doc",),
        "PSF-2.0",
        4_000_000,
        html_reader("usr/share/doc/python3.11/html", PYTHON_SKIP),
    ),
    Source(
        "postgresql",
        ("postgresql-doc-15",),
        "PostgreSQL",
        3_500_000,
        html_reader("usr/share/doc/postgresql-doc-15/html", POSTGRES_SKIP),
    ),
    Source(
        "sqlite",
        ("sqlite3-doc",),
        "public domain",
        3_500_000,
        html_reader("usr/share/doc/sqlite3", SQLITE_SKIP),
    ),
    Source("perl", ("perl-doc",), "Artistic", 3_000_000, read_perl),
    Source(
        "httpd",
        ("apache2-doc",),
        "Apache-2.0",
        2_500_000,
        html_reader("usr/share/doc/apache2-doc/manual/en", re.compile(r"quickreference|sitemap")),
    ),
    Source("jargon", ("dict-jargon",), "public domain", 1_500_000, read_jargon),
    Source("devil", ("dict-devil",), "public domain", 500_000, read_devil),
    Source("wordnet", ("dict-wn",), "WordNet-3.0", 2_000_000, read_wordnet),
)


def unpack(packages: tuple[str, ...], cache: Path) -> Path:
    """Download what is missing of `packages` into `cache`, unpack it and return its root.

    Raises FileNotFoundError when a package cannot be downloaded.
    """
    root = cache / "unpacked" / packages[0]
    if root.exists():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    staging = root.with_name(f"{root.name}.{os.getpid()}")
    for package in packages:
        if not list(cache.glob(f"{package}_*.deb")):
            command = ["apt-get", "download", package]
            if subprocess.run(command, check=False, cwd=cache, capture_output=True).returncode:
                raise FileNotFoundError(f"{package}: no {package}_*.deb in {cache}, and apt-get download failed")
        archive = sorted(cache.glob(f"{package}_*.deb"))[-1]
        staging.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", archive, staging], check=True)
    os.replace(staging, root)
    return root
