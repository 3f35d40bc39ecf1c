"""Text cleaning: HTML to paragraphs, punctuation to ASCII, and the test of what reads as prose."""

from __future__ import annotations

import re
from html.parser import HTMLParser

MIN_PARAGRAPH_CHARS = 40
MIN_LETTER_SHARE = 0.75  # letters and spaces; below it a paragraph is code, a table or a path list
MAX_NON_ASCII_SHARE = 0.02  # above it a paragraph is not English

SKIPPED_TAGS = {"pre", "table", "nav", "script", "style", "head", "footer", "select", "form"}
SKIPPED_CLASSES = {
    "related",
    "sphinxsidebar",
    "navheader",
    "navfooter",
    "headerlink",
    "toctree-wrapper",
}
SKIPPED_CLASSES |= {
    "footer",
    "toc",
    "contents",
    "nosearch",
    "searchmenu",
    "menu",
    "fancy_toc",
    "toplang",
    "bottomlang",
}
BLOCK_TAGS = {"p", "div", "li", "dd", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote"}
BLOCK_TAGS |= {"ul", "ol", "dl", "section", "article", "br", "hr", "main", "body"}
VOID_TAGS = {"br", "hr", "img", "input", "link", "meta", "col", "wbr"}

ASCII_PUNCTUATION = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\u00b6": "",
        "\u200b": "",
        "\u2192": "->",
    }
)


class _ParagraphParser(HTMLParser):
    """Collects the text of block elements outside skipped elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._parts: list[str] = []
        self._skipped_tag = ""
        self._depth = 0  # of nested _skipped_tag elements

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._depth:
            self._depth += tag == self._skipped_tag
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag not in VOID_TAGS and (tag in SKIPPED_TAGS or classes & SKIPPED_CLASSES):
            self._skipped_tag, self._depth = tag, 1
        if tag in BLOCK_TAGS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if self._depth:
            self._depth -= tag == self._skipped_tag
        elif tag in BLOCK_TAGS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._depth:
            self._parts.append(data)

    def flush(self) -> None:
        """End the current paragraph."""
        self.paragraphs.append(" ".join("".join(self._parts).split()))
        self._parts.clear()


def html_paragraphs(page: str) -> list[str]:
    """Return the paragraphs of an HTML page without code, tables and navigation."""
    parser = _ParagraphParser()
    parser.feed(page)
    parser.close()
    parser.flush()
    return [paragraph for paragraph in parser.paragraphs if paragraph]


def join_wrapped(text: str) -> list[str]:
    """Return the paragraphs of hard-wrapped text, which blank lines separate."""
    return [" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip()]


def normalise(paragraph: str) -> str:
    """Return the paragraph with typographic punctuation in ASCII."""
    return paragraph.translate(ASCII_PUNCTUATION).strip()


def is_prose(paragraph: str) -> bool:
    """Tell whether a paragraph is long enough, English and not code."""
    size = len(paragraph)
    if size < MIN_PARAGRAPH_CHARS:
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    non_ascii = sum(not c.isascii() for c in paragraph)
    return letters >= MIN_LETTER_SHARE * size and non_ascii <= MAX_NON_ASCII_SHARE * size
