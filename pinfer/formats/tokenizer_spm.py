"""SentencePiece BPE as llama.cpp runs it: join the best-scoring neighbours until nothing joins.

From single characters, the pair of neighbours whose joined text is the token of the highest score
is joined first, the leftmost of equals first. `tokenizers` cannot do this exactly: it ranks pairs,
so pairs of equal score (the space runs of Llama and Gemma) have no leftmost rule there, and both
halves must be tokens. It also needs half a million merges derived for Gemma's 262,144 tokens; the
scores alone suffice here. Words repeat, so results are cached per word.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
import sys

from pinfer.formats.errors import FormatError
from pinfer.formats.tokenizer_vocab import KEY, TokenType, Vocabulary

SPACE = "▁"
_CACHED_WORDS = 1 << 16
_CACHED_LENGTH = 32
_SHORT = 48  # characters; above that a heap is faster
_NEVER = math.inf
# What text may become: user text must not spell a control token, nor "<0x41>" become a byte.
_JOINABLE = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED, TokenType.UNDEFINED)


class SpmModel:
    """Text to ids for `tokenizer.ggml.model` "llama"."""

    def __init__(self, vocabulary: Vocabulary, add_space_prefix: bool) -> None:
        if vocabulary.scores is None:
            raise FormatError(f"{KEY}scores is missing; the tokenizer model 'llama' needs one per token")
        types, scores = vocabulary.types, vocabulary.scores
        self._ids = {text: i for text, i in vocabulary.ids.items() if types[i] in _JOINABLE}
        # Negated: the smallest is joined first, as heapq has it.
        self._ranks = {text: min(-scores[i], sys.float_info.max) for text, i in self._ids.items()}
        byte_texts = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        self._byte_ids = {byte: vocabulary.ids[text] for byte, text in byte_texts.items() if text in vocabulary.ids}
        self._unk_id = vocabulary.unk_id or 0
        self._prefix = SPACE if add_space_prefix else ""
        self._word_start = _word_boundary(self._ids)
        self._cache: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str, at_start: bool) -> list[int]:
        """The ids of `text`, which stands at the start or behind a special token if `at_start`."""
        escaped = text.replace(" ", SPACE)
        if at_start:
            escaped = self._prefix + escaped
        ids: list[int] = []
        for word in self._word_start.split(escaped):
            cached = self._cache.get(word)
            ids.extend(self._encode_word(word) if cached is None else cached)
        return ids

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        for symbol in self._join(word) if len(word) <= _SHORT else self._join_long(word):
            token_id = self._ids.get(symbol)
            if token_id is None:
                ids.extend(self._spell(symbol))
            else:
                ids.append(token_id)
        result = tuple(ids)
        if len(word) <= _CACHED_LENGTH:
            if len(self._cache) >= _CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = result
        return result

    def _join(self, word: str) -> list[str]:
        """Join neighbours best first, looking over all pairs each time: for a usual word twice as fast as a heap."""
        find, symbols = self._ranks.get, list(word)
        ranks = [find(left + right, _NEVER) for left, right in itertools.pairwise(symbols)]
        while ranks:
            best = min(ranks)
            if best == _NEVER:
                break
            at = ranks.index(best)  # the leftmost of equals
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            del ranks[at]
            if at:
                ranks[at - 1] = find(symbols[at - 1] + symbols[at], _NEVER)
            if at < len(ranks):
                ranks[at] = find(symbols[at] + symbols[at + 1], _NEVER)
        return symbols

    def _join_long(self, word: str) -> list[str]:
        """The same with a heap; a symbol is known by where it starts, `ends[start]` is -1 once it is gone."""
        size = len(word)
        ranks = self._ranks
        ends = list(range(1, size + 1))
        before = list(range(-1, size - 1))
        queue = [(ranks[word[i : i + 2]], i, i + 1, i + 2) for i in range(size - 1) if word[i : i + 2] in ranks]
        heapq.heapify(queue)
        while queue:
            _, left, middle, right = heapq.heappop(queue)
            if ends[left] != middle or ends[middle] != right:
                continue  # one of the two has been joined to another since
            ends[left], ends[middle] = right, -1
            if right < size:
                before[right] = left
                rank = ranks.get(word[left : ends[right]])
                if rank is not None:
                    heapq.heappush(queue, (rank, left, right, ends[right]))
            if left:
                start = before[left]
                rank = ranks.get(word[start:right])
                if rank is not None:
                    heapq.heappush(queue, (rank, start, left, right))
        return [word[start:end] for start, end in enumerate(ends) if end > 0]

    def _spell(self, symbol: str) -> list[int]:
        """A character that is no token, as its bytes; as one unknown token where a byte has no token."""
        text = symbol.replace(SPACE, " ")  # so that a vocabulary without the mark still gives the space back
        known = [self._byte_ids[byte] for byte in text.encode() if byte in self._byte_ids]
        return known if len(known) == len(text.encode()) else [self._unk_id]


def _word_boundary(ids: dict[str, int]) -> re.Pattern[str]:
    """Where a text may be cut without changing its tokens: before a space mark that no token has behind that character.

    Nearly every vocabulary has the mark at the head of tokens only, so words can be taken one by one.
    """
    before_space = {char for text in ids if SPACE in text[1:] for char in re.findall(f"(.){SPACE}", text, re.DOTALL)}
    inside = re.escape("".join(sorted(before_space | {SPACE})))
    return re.compile(f"(?<=[^{inside}])(?={SPACE})")
