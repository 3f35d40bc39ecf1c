"""Tokenizers on small vocabularies: exact both ways, llama.cpp's merge rule, special tokens, bad vocabularies."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from pinfer.formats.errors import FormatError
from pinfer.formats.tokenizer import StreamingDetokenizer, Tokenizer, load_tokenizer
from pinfer.formats.tokenizer_bpe import WORD_START
from pinfer.formats.tokenizer_pre import PRE_TOKENIZERS
from pinfer.formats.tokenizer_special import SpecialSplitter
from tests.tokenizer_vocabs import (
    BYTE,
    CONTROL,
    KEY,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    bpe_metadata,
    english_spm,
    metadata,
    spm_metadata,
)

SPM = load_tokenizer(english_spm())
SPM_NO_PREFIX = load_tokenizer(english_spm(add_space_prefix=False))
BPE = load_tokenizer(bpe_metadata())
TOKENIZERS = {"spm": SPM, "spm without prefix": SPM_NO_PREFIX, "bpe": BPE}

SNIPPETS = st.sampled_from(
    [
        "the world",
        "  ",
        "\n\n",
        "\r\n",
        "\t",
        "\x00",
        "e\u0301",
        "👨\u200d👩\u200d👧",
        "日本",
        "<s>",
        "<0x41>",
        "<|im_end|>",
        "<tool>",
    ]
)
TEXTS = st.lists(st.one_of(st.text(max_size=8), SNIPPETS), max_size=12).map("".join)

every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def without_mark(text: str) -> bytes:
    """What SentencePiece cannot tell apart: its space mark and a space."""
    return text.replace("▁", " ").encode()


class TestRoundTrip:
    @given(TEXTS)
    def test_spm(self, text: str) -> None:
        for tokenizer in (SPM, SPM_NO_PREFIX):
            assert tokenizer.decode_bytes(tokenizer.encode(text, add_bos=False)) == without_mark(text)
            assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text.replace("▁", " ")

    @given(TEXTS)
    def test_bpe(self, text: str) -> None:
        ids = BPE.encode(text)
        assert BPE.decode_bytes(ids) == text.encode()
        assert BPE.decode(ids) == text

    @pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
    def test_every_pre_tokenizer(self, pre: str) -> None:
        tokenizer = load_tokenizer(bpe_metadata(pre, bos_token_id=0))
        text = "It's 12345 WORDS, caféS — 日本語\u3000x\r\n\n   def f():\n\t\tpass  \u0301!?... ½ 👍🏽 a  "
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == text
        assert tokenizer.encode("") == ([0] if tokenizer.add_bos else [])

    @every_tokenizer
    def test_empty_text(self, tokenizer: Tokenizer) -> None:
        assert tokenizer.encode("", add_bos=False) == []
        assert tokenizer.decode([]) == ""

    def test_bytes_that_are_no_utf8_become_replacement_characters(self) -> None:
        ids = [SPM.encode("\u00e9", add_bos=False)[-2], *SPM.encode("the", add_bos=False)]
        assert SPM.decode_bytes(ids) == b"\xc3 the"
        assert SPM.decode(ids) == "\ufffd the"

    def test_leading_space(self) -> None:
        assert [SPM.token_text(i) for i in SPM.encode("the world", add_bos=False)] == ["▁the", "▁world"]
        assert SPM.decode(SPM.encode(" the", add_bos=False)) == " the"
        # Text behind a special token gets a space too, and loses it again.
        ids = SPM.encode("the\n\nthe<end_of_turn>the", add_bos=False, parse_special=True)
        assert [SPM.token_text(i) for i in ids] == ["▁the", "\n\n", "▁the", "<end_of_turn>", "▁the"]
        assert SPM.decode(ids) == "the\n\nthe<end_of_turn>the"
        assert SPM_NO_PREFIX.decode(SPM_NO_PREFIX.encode(" the", add_bos=False)) == " the"


def greedy_merge(text: str, scores: dict[str, float]) -> list[str]:
    """llama.cpp's rule by brute force: join the neighbours with the best joined score, the leftmost of equals."""
    symbols = list(text)
    while True:
        joined = [left + right for left, right in itertools.pairwise(symbols)]
        candidates = [(-scores[pair], index) for index, pair in enumerate(joined) if pair in scores]
        if not candidates:
            return symbols
        _, index = min(candidates)
        symbols[index : index + 2] = [joined[index]]


class TestSpmMerges:
    pieces = st.dictionaries(
        st.text("ab▁", min_size=1, max_size=5), st.sampled_from([-3.0, -2.0, -1.0, 0.0, 1.5]), min_size=1, max_size=25
    )

    @settings(max_examples=300, deadline=None)
    @given(pieces, st.one_of(st.text("ab c", max_size=24), st.text("ab", min_size=49, max_size=70)))
    def test_as_by_brute_force(self, pieces: dict[str, float], text: str) -> None:
        tokenizer = load_tokenizer(spm_metadata(pieces))
        got = [tokenizer.token_text(i) for i in tokenizer.encode(text, add_bos=False)]
        expected: list[str] = []
        for symbol in greedy_merge("▁" + text.replace(" ", "▁"), pieces) if text else []:
            known = symbol in pieces
            expected += [symbol] if known else [f"<0x{byte:02X}>" for byte in symbol.replace("▁", " ").encode()]
        assert got == expected

    def test_equal_scores_join_from_the_left(self) -> None:
        ids = SPM_NO_PREFIX.encode(" " * 11, add_bos=False)
        assert [len(SPM_NO_PREFIX.token_text(i)) for i in ids] == [8, 3]

    def test_long_words_are_not_cached(self) -> None:
        for text in ("the" * 40, "the" * 40):
            assert SPM.decode(SPM.encode(text), skip_special=True) == text

    def test_without_byte_tokens_characters_are_unknown(self) -> None:
        tokens, types = ["<unk>", "<s>", "</s>", "▁", "a"], [UNKNOWN, CONTROL, CONTROL, NORMAL, NORMAL]
        tokenizer = load_tokenizer(metadata("llama", tokens, types, scores=[0.0, 0.0, 0.0, -1.0, -2.0]))
        assert tokenizer.encode("a日a", add_bos=False) == [3, 4, 0, 4]
        assert tokenizer.decode([3, 4, 0, 4], skip_special=True) == "aa"


class TestBpe:
    def test_a_merge_into_no_token_is_spelled_as_bytes(self) -> None:
        values = bpe_metadata(special={})
        values[f"{KEY}merges"] = ["q x", *values[f"{KEY}merges"]]
        tokenizer = load_tokenizer(values)
        assert [tokenizer.token_text(i) for i in tokenizer.encode("qx")] == ["q", "x"]

    def test_a_byte_without_token_is_dropped(self) -> None:
        values = bpe_metadata(special={})
        values[f"{KEY}tokens"][values[f"{KEY}tokens"].index("q")] = "unrelated"
        tokenizer = load_tokenizer(values)
        assert tokenizer.decode(tokenizer.encode("aqz")) == "az"

    def test_ignore_merges_takes_a_whole_word(self) -> None:
        special = {"zqzq": NORMAL, "<s>": CONTROL}
        for pre, expected in (("gpt-2", ["z", "q", "z", "q"]), ("llama-bpe", ["zqzq"])):
            tokenizer = load_tokenizer(bpe_metadata(pre, special))
            assert [tokenizer.token_text(i) for i in tokenizer.encode("zqzq", add_bos=False)] == expected

    def test_without_pre_the_default_is_used(self) -> None:
        named, unnamed = (load_tokenizer(bpe_metadata(pre)) for pre in ("default", None))
        text = "It costs $12345, or 1,000."
        assert named.encode(text) == unnamed.encode(text)


# One name for all that split by the same patterns.
SPLITTERS = {row.patterns: name for name, row in sorted(PRE_TOKENIZERS.items()) if not row.joins_words}


class TestWordStarts:
    """Texts are cut where words begin before they are split by the patterns, which must change no word."""

    spaced = st.lists(
        st.one_of(
            st.text(alphabet=" \t\n\r\u3000aZ'é.,(日1\u0301", max_size=6),
            st.sampled_from([" the", "\nand", "\r\nx", "    of", "'s", "\n\n  a", " 12", "\x1c a", "'ſ a"]),
            st.text(max_size=3),
        ),
        max_size=10,
    ).map("".join)

    @pytest.mark.parametrize("pre", sorted(SPLITTERS.values()))
    @settings(max_examples=60, deadline=None)
    @given(text=spaced)
    def test_no_word_is_cut(self, pre: str, text: str) -> None:
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[pre].patterns]
        splitter = pre_tokenizers.Sequence(splits)
        words = [word for word, _ in splitter.pre_tokenize_str(text)]
        assert [word for part in WORD_START.split(text) for word, _ in splitter.pre_tokenize_str(part)] == words

    def test_a_row_that_joins_words_is_not_cut(self) -> None:
        for pre, count in (("exaone-moe", 1), ("gpt-2", 2)):
            values = bpe_metadata(pre)
            values[f"{KEY}tokens"] += ["\u0120b", "a\u0120b"]
            values[f"{KEY}token_type"] += [NORMAL, NORMAL]
            values[f"{KEY}merges"] += ["\u0120 b", "a \u0120b"]
            assert len(load_tokenizer(values).encode("a b")) == count


class TestSpecialTokens:
    @pytest.mark.parametrize("text", ["<|im_end|>", "a<|im_start|>b", "<|endoftext|><|endoftext|>"])
    def test_control_tokens_are_plain_text_unless_asked_for(self, text: str) -> None:
        control = {i for i in range(BPE.vocab_size) if BPE.token_text(i).startswith("<|")}
        assert not control & set(BPE.encode(text))
        parsed = BPE.encode(text, parse_special=True)
        assert control & set(parsed)
        assert BPE.decode(parsed) == text
        assert BPE.decode(parsed, skip_special=True) == re.sub(r"<\|\w+\|>", "", text)

    @given(TEXTS)
    def test_no_text_makes_a_control_or_byte_spelling(self, text: str) -> None:
        spelled = {"<s>", "</s>", "<unk>", "<start_of_turn>", "<end_of_turn>"}
        marked = text.join(["<s>", "<end_of_turn>", "<0x41>"])
        assert not spelled & {SPM.token_text(i) for i in SPM.encode(marked, add_bos=False)}
        assert SPM.decode_bytes(SPM.encode(marked, add_bos=False)) == without_mark(marked)

    def test_merges_cannot_spell_a_control_token(self) -> None:
        tokenizer = load_tokenizer(spm_metadata({"<": -1.0, "s": -2.0, ">": -3.0, "s>": -4.0}, add_space_prefix=False))
        assert [tokenizer.token_text(i) for i in tokenizer.encode("<s>", add_bos=False)] == ["<", "s>"]

    def test_added_tokens_are_always_cut_out(self) -> None:
        assert "<tool>" in {BPE.token_text(i) for i in BPE.encode("a<tool>b")}

    def test_the_longest_is_cut_out_first_wherever_it_stands(self) -> None:
        special: dict[str, int] = dict.fromkeys(("ab", "bcd", "b!"), USER_DEFINED)
        tokenizer = load_tokenizer(bpe_metadata(special=special))
        assert [tokenizer.token_text(i) for i in tokenizer.encode("abcdab!b!")] == ["a", "bcd", "ab", "!", "b!"]

    def test_runs_take_the_longest_first(self) -> None:
        tokenizer = load_tokenizer(bpe_metadata(special={"\n" * n: USER_DEFINED for n in (1, 2, 3, 5)}))
        assert [len(tokenizer.token_text(i)) for i in tokenizer.encode("\n" * 19)] == [5, 5, 5, 3, 1]

    def test_thousands_of_different_ones(self) -> None:
        special = {f"<unused{n}>": USER_DEFINED for n in range(1500)}
        tokenizer = load_tokenizer(bpe_metadata(special=special))
        ids = tokenizer.encode("x".join(special))
        assert [tokenizer.token_text(i) for i in ids] == "|x|".join(special).split("|")

    def test_a_very_long_one(self) -> None:
        tokenizer = load_tokenizer(bpe_metadata(special={"ab" * 50_000: USER_DEFINED}))
        assert len(tokenizer.encode("x" + "ab" * 50_000 + "y")) == 3

    def test_phi3_swallows_whitespace_behind_parsed_tokens(self) -> None:
        values = english_spm() | {"general.name": "Phi-3 mini"}
        tokenizer = load_tokenizer(values)
        ids = tokenizer.encode("<end_of_turn>\n the", parse_special=True, add_bos=False)
        assert tokenizer.decode(ids) == "<end_of_turn>the"
        assert tokenizer.decode(tokenizer.encode("<s>\n the", parse_special=True, add_bos=False)) == "<s>\n the"

    @pytest.mark.timeout(60)  # a search that looks back from every space would take half an hour
    def test_white_space_that_tokens_swallow(self) -> None:
        splitter = SpecialSplitter({"<mask>": 1, "<end>": 2}, strip_before=[1], strip_after=[2])
        assert splitter.split(" a \n<mask> b <end>\t<mask><end> ") == [" a", 1, " b ", 2, 1, 2]
        assert splitter.split(" " * 2**20 + "a" + " " * 2**20 + "<mask>") == [" " * 2**20 + "a", 1]

    def test_ends_of_generation(self) -> None:
        assert {SPM.token_text(i) for i in SPM.eog_ids} == {"</s>", "<end_of_turn>"}
        assert {BPE.token_text(i) for i in BPE.eog_ids} == {"<|endoftext|>", "<|im_end|>"}
        named = load_tokenizer(
            bpe_metadata(special={"</s>": NORMAL}, eos_token_id=7, eot_token_id=8, fim_sep_token_id=9)
        )
        assert (named.eos_id, named.eog_ids) == (7, frozenset({7, 8, 9}))
        channels = load_tokenizer(bpe_metadata(special=dict.fromkeys(("<|end|>", "<|return|>", "<|call|>"), CONTROL)))
        assert {channels.token_text(i) for i in channels.eog_ids} == {"<|return|>", "<|call|>"}

    def test_a_mistyped_turn_mark_is_a_control_token(self) -> None:
        tokenizer = load_tokenizer(bpe_metadata(special={"<|im_end|>": USER_DEFINED}))
        assert tokenizer.vocab_size - 1 not in tokenizer.encode("<|im_end|>")


class TestBos:
    @pytest.mark.parametrize(
        ("values", "add_bos"),
        [
            (english_spm(), True),
            (english_spm(add_bos_token=False), False),
            (bpe_metadata("gpt-2", bos_token_id=3), False),
            (bpe_metadata("gpt-2", bos_token_id=3, add_bos_token=True), True),
            (bpe_metadata("llama-bpe", bos_token_id=3), True),
            (bpe_metadata("llama-bpe"), False),
        ],
    )
    def test_as_the_model_asks(self, values: dict[str, Any], add_bos: bool) -> None:
        tokenizer = load_tokenizer(values)
        assert tokenizer.add_bos is add_bos
        assert (tokenizer.encode("the")[0] == tokenizer.bos_id) is add_bos

    def test_asked_for_by_the_caller(self) -> None:
        assert SPM.encode("the", add_bos=True) == [1, *SPM.encode("the", add_bos=False)]
        with pytest.raises(ValueError, match="no BOS token"):
            BPE.encode("the", add_bos=True)

    def test_end_of_sequence_is_never_added(self) -> None:
        tokenizer = load_tokenizer(english_spm(add_eos_token=True))
        assert tokenizer.add_eos
        assert tokenizer.eos_id not in tokenizer.encode("the")


def streamed(stream: StreamingDetokenizer, ids: list[int]) -> str:
    return "".join([*map(stream.push, ids), stream.flush()])


class TestStreaming:
    @given(TEXTS)
    def test_adds_up_and_never_shows_half_a_character(self, text: str) -> None:
        for tokenizer in TOKENIZERS.values():
            ids = tokenizer.encode(text)
            for skip_special in (False, True):
                pushed = list(map((stream := tokenizer.stream(skip_special=skip_special)).push, ids))
                assert "".join(pushed) == tokenizer.decode(ids, skip_special=skip_special)
                assert stream.flush() == ""
                assert text.count("\ufffd") == "".join(pushed).count("\ufffd")

    @given(st.lists(st.integers(0, 270), max_size=40))
    def test_any_ids_add_up_to_decode(self, ids: list[int]) -> None:
        for tokenizer in TOKENIZERS.values():
            assert streamed(tokenizer.stream(), ids) == tokenizer.decode(ids)

    def test_holds_back_what_is_incomplete(self) -> None:
        ids = SPM_NO_PREFIX.encode("😀", add_bos=False)
        stream = SPM_NO_PREFIX.stream()
        assert [stream.push(i) for i in ids] == ["", "", "", "😀"]
        assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
        assert stream.flush() == "\ufffd"

    def test_continues_a_prompt(self) -> None:
        prompt, answer = SPM.encode("the"), SPM.encode("world", add_bos=False)
        assert streamed(SPM.stream(after=prompt), answer) == " world"
        assert streamed(SPM.stream(), answer) == "world"
        turn = SPM.encode("<start_of_turn>", parse_special=True)
        assert streamed(SPM.stream(after=turn), answer) == "world"


class TestBadInput:
    @every_tokenizer
    def test_lone_surrogate(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at index 2"):
            tokenizer.encode("ab\ud800\udc00")

    @every_tokenizer
    @pytest.mark.parametrize("bad", [-1, 10**6, 2**70])
    def test_id_outside_the_vocabulary(self, tokenizer: Tokenizer, bad: int) -> None:
        message = f"token id {bad} is outside the vocabulary of {tokenizer.vocab_size} tokens"
        for use in (tokenizer.token_text, tokenizer.stream().push, lambda i: tokenizer.decode([0, i])):
            with pytest.raises(ValueError, match=message):
                use(bad)
        with pytest.raises(ValueError, match=message):
            tokenizer.stream(after=[bad])


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`values` with keys replaced, or left out where the change is None."""
    merged = values | {KEY + name: value for name, value in changes.items()}
    return {key: value for key, value in merged.items() if value is not None}


SMALL = metadata("gpt2", ["a", "b", "ab"], [NORMAL] * 3, merges=["a b"])
SMALL_SPM = metadata("llama", ["<unk>", "a", "b"], [UNKNOWN, NORMAL, NORMAL], scores=[0.0, -1.0, -2.0])


class TestBadVocabulary:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({}, "tokenizer.ggml.model is missing"),
            (changed(SMALL, model=5), "tokenizer.ggml.model is '5', not of type str"),
            (changed(SMALL, model="bert"), "tokenizer.ggml.model 'bert' is not supported; 'llama' and 'gpt2' are"),
            (changed(SMALL, model="t5"), "'t5' is not supported"),
            (changed(SMALL, model="rwkv"), "'rwkv' is not supported"),
            (
                changed(SMALL, pre="martian"),
                "tokenizer.ggml.pre is 'martian', which is not supported; known are .*qwen2",
            ),
            (changed(SMALL, tokens=None), "tokenizer.ggml.tokens is missing"),
            (changed(SMALL, tokens=[], token_type=[]), "tokenizer.ggml.tokens is empty"),
            (changed(SMALL, tokens="abc"), "tokenizer.ggml.tokens is 'abc', not of type list"),
            (changed(SMALL, tokens=["a", 7, "b"]), r"tokenizer.ggml.tokens\[1\] is '7', not a string"),
            (changed(SMALL, tokens=["a", "\udc80", "b"]), "tokenizer.ggml.tokens holds text that is not valid Unicode"),
            (changed(SMALL, tokens=["a", "b", "a"]), "tokenizer.ggml.tokens holds 'a' twice, as 0 and 2"),
            (
                changed(SMALL, token_type=[1, 1]),
                "tokenizer.ggml.token_type has 2 items, but tokenizer.ggml.tokens has 3",
            ),
            (changed(SMALL, token_type=[1, 1, 99]), "tokenizer.ggml.token_type holds 99"),
            (changed(SMALL, token_type=[1, 1, "x"]), "tokenizer.ggml.token_type holds items that are no numbers"),
            (changed(SMALL, merges=None), "tokenizer.ggml.merges is missing"),
            (changed(SMALL, merges=["a b", "ab"]), r"tokenizer.ggml.merges\[1\] is 'ab', not two texts"),
            (changed(SMALL, merges=["a b c"]), r"tokenizer.ggml.merges\[0\] is 'a b c'"),
            (changed(SMALL, merges=["a 日"]), "tokenizer.ggml.merges uses 'a.u65e5'"),
            (changed(SMALL, bos_token_id=3), "tokenizer.ggml.bos_token_id is 3, outside the vocabulary of 3 tokens"),
            (changed(SMALL, eos_token_id=-1), "tokenizer.ggml.eos_token_id is -1"),
            (changed(SMALL, eot_token_id="a"), "tokenizer.ggml.eot_token_id is 'a', not of type int"),
            (changed(SMALL, add_bos_token=True), "tokenizer.ggml.add_bos_token is true, but there is no"),
            (changed(SMALL, add_bos_token=1), "tokenizer.ggml.add_bos_token is '1', not of type bool"),
            (SMALL | {"tokenizer.chat_template": 3}, "tokenizer.chat_template is '3', not a string"),
            (changed(SMALL_SPM, scores=None), "tokenizer.ggml.scores is missing"),
            (changed(SMALL_SPM, scores=[0.0]), "tokenizer.ggml.scores has 1 items, but tokenizer.ggml.tokens has 3"),
            (changed(SMALL_SPM, scores=[0.0, math.nan, 0.0]), r"tokenizer.ggml.scores\[1\] is NaN"),
            (changed(SMALL_SPM, token_type=[UNKNOWN, NORMAL, BYTE]), r"tokenizer.ggml.tokens\[2\] is 'b', not a byte"),
        ],
    )
    def test_is_refused_by_name(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(FormatError, match=message):
            load_tokenizer(values)

    def test_what_is_tolerated(self) -> None:
        tokenizer = load_tokenizer(
            changed(SMALL, tokens=["a", "b", "", "", "ab"], token_type=None, merges=["a b", "a b"])
        )
        assert tokenizer.token_text(2) == "[EMPTY_2]"
        assert tokenizer.encode("ab") == [4]
        assert load_tokenizer(changed(SMALL_SPM, bos_token_id=0)).bos_id == 0

    def test_chat_template(self) -> None:
        assert BPE.chat_template is None
        assert load_tokenizer(SMALL | {"tokenizer.chat_template": "{{ x }}"}).chat_template == "{{ x }}"
