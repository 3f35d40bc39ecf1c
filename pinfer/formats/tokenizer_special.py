"""Special tokens in text: cut a text at them before the rest is tokenized.

llama.cpp's rule: the longest token text (in bytes) is cut out first, wherever it stands, then the
next longest from what is left. Gemma has 6,415 of them, and trying each on a document of 1 MB
takes seconds, so the few that occur are found first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

_LONG = 64  # characters; no special token of a real vocabulary is longer
# A cut-out token is marked by two lone surrogates, which no text can hold.
_MARK = re.compile("([\ud800-\udbff][\udc00-\udfff])")

_WHITE_CHARS = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class SpecialSplitter:
    """Cuts texts at the tokens of `ids` (text to id).

    Those in `strip_before` and `strip_after` swallow the white space before and behind them.
    """

    def __init__(
        self, ids: Mapping[str, int], strip_before: Iterable[int] = (), strip_after: Iterable[int] = ()
    ) -> None:
        self._ids = dict(ids)
        self._strip_before, self._strip_after = frozenset(strip_before), frozenset(strip_after)
        # Searched for one by one: runs of spaces or newlines, which begin nearly everywhere in code.
        self._alone = [text for text in ids if text == text[0] * len(text) or len(text) > _LONG]
        # By the first two characters: few places in a text are a candidate for anything.
        self._lengths: dict[str, set[int]] = defaultdict(set)
        for text in ids.keys() - set(self._alone):
            self._lengths[text[:2]].add(len(text))
        self._starts = _starts_pattern(self._lengths)

    def split(self, text: str) -> list[str | int]:
        """`text`, which holds no surrogates, in order: token ids and the stretches between them (none empty)."""
        specials = sorted(self._occurring(text), key=lambda special: (-len(special.encode()), self._ids[special]))
        for index, special in enumerate(specials):
            mark = chr(0xD800 + index // 1024) + chr(0xDC00 + index % 1024)
            pieces = text.split(special)  # a pattern with white space before it would take time squared
            if self._ids[special] in self._strip_before:
                pieces[:-1] = [piece.rstrip(_WHITE_CHARS) for piece in pieces[:-1]]
            if self._ids[special] in self._strip_after:
                pieces[1:] = [piece.lstrip(_WHITE_CHARS) for piece in pieces[1:]]
            text = mark.join(pieces)
        parts: list[str | int] = []
        for index, part in enumerate(_MARK.split(text)):
            if index % 2:
                parts.append(self._ids[specials[(ord(part[0]) - 0xD800) * 1024 + ord(part[1]) - 0xDC00]])
            elif part:
                parts.append(part)
        return parts

    def stripped(self, parts: Sequence[str | int]) -> list[str | int]:
        """`parts` as `split` gives them, with the white space gone that their tokens swallow."""
        kept: list[str | int] = []
        for index, part in enumerate(parts):
            if isinstance(part, str):
                if index and parts[index - 1] in self._strip_after:
                    part = part.lstrip(_WHITE_CHARS)
                if index + 1 < len(parts) and parts[index + 1] in self._strip_before:
                    part = part.rstrip(_WHITE_CHARS)
            if part != "":
                kept.append(part)
        return kept

    def _occurring(self, text: str) -> set[str]:
        """Every special text that stands somewhere in `text`, even if a longer one covers it."""
        found = {special for special in self._alone if special in text}
        windows: dict[str, set[str]] = defaultdict(set)
        for match in self._starts.finditer(text) if self._starts else ():
            start = match.start()
            windows[text[start : start + 2]].add(text[start : start + _LONG])
        for head, texts in windows.items():
            for length in self._lengths[head]:
                found |= self._ids.keys() & {window[:length] for window in texts}
        return found


def _starts_pattern(heads: Iterable[str]) -> re.Pattern[str] | None:
    """Matches the first character wherever one of `heads`, all of two characters, stands; None for no heads."""
    seconds: dict[str, str] = {}
    for head in heads:
        seconds[head[0]] = seconds.get(head[0], "") + head[1]
    options = [f"{re.escape(first)}(?=[{re.escape(others)}])" for first, others in seconds.items()]
    return re.compile("|".join(options)) if options else None
