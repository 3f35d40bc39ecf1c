"""Tokenizers of Hugging Face folders, family by family: ids as their own libraries give them, and back to a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pinfer.formats.huggingface.sentencepiece import read_sentencepiece
from pinfer.formats.huggingface.tokenizer import tokenizer_metadata, write_tokenizer
from pinfer.formats.tokenizer import Tokenizer, load_tokenizer
from pinfer.formats.tokenizer_pre import PRE_TOKENIZERS
from tests.hf_tokenizers import FAMILIES, sentencepiece_model
from tests.tokenizer_vocabs import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED, bpe_metadata

TRICKY = json.loads((Path(__file__).parent / "data" / "tricky_strings.json").read_text(encoding="utf-8"))
KEY = "tokenizer.ggml."
MARKS = [
    *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|user|>", "<start_of_turn>"),
    *("[INST]", "[/INST]", "▁<PRE>", "<tool_call>", "<|endoftext|>", ">>TITLE<<", "<table>", "<0x0A>", "<pad>"),
]
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=6),
        st.sampled_from(MARKS),
        st.sampled_from(
            ["the model", " a", "  ", "    ", "\n\n", "\r\n", "e\u0301", "日本語", "don't", "12345", "½", "x²"]
        ),
    ),
    max_size=10,
).map("".join)
SPLIT = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
END = r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
every_family = pytest.mark.parametrize("family", FAMILIES)


@cache
def folder(family: str) -> Path:
    path = Path(mkdtemp(prefix=f"pinfer-{family}-"))
    FAMILIES[family](path)
    return path


@cache
def ours(family: str) -> Tokenizer:
    return load_tokenizer(tokenizer_metadata(folder(family)))


@cache
def reference(family: str) -> Callable[[str], list[int]]:
    """The ids that the family's own library gives, special tokens and all."""
    path = folder(family) / "tokenizer.json"
    if not path.exists():  # OPT's two files are read by transformers alone
        loaded = AutoTokenizer.from_pretrained(str(folder(family)))
        return lambda text: list(loaded(text)["input_ids"])
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda text: list(tokenizer.encode(text).ids)


def as_defined(family: str, text: str) -> str:
    """`text` without what the reference loses: see `TestKnownDifferences`."""
    if family == "mistral_v3":
        return text.lstrip(" ▁")
    return text.replace("▁", "") if family == "gemma" else text


class TestIds:
    @every_family
    def test_tricky_strings(self, family: str) -> None:
        for text in TRICKY:
            text = as_defined(family, text)
            assert ours(family).encode(text, parse_special=True) == reference(family)(text), text

    @every_family
    @settings(max_examples=200, deadline=None)
    @given(text=TEXTS)
    def test_generated_strings(self, family: str, text: str) -> None:
        text = as_defined(family, text)
        assert ours(family).encode(text, parse_special=True) == reference(family)(text)

    @every_family
    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS)
    def test_bytes_come_back(self, family: str, text: str) -> None:
        tokenizer = ours(family)
        expected = text if family in ("llama3", "falcon", "gpt2", "opt") else text.replace("▁", " ")
        if family.startswith("qwen"):
            expected = tokenizers.normalizers.NFC().normalize_str(text)
        assert tokenizer.decode(tokenizer.encode(text, add_bos=False)) == expected

    @pytest.mark.parametrize("family", ["llama2", "llama2_both", "gemma"])
    @settings(max_examples=200, deadline=None)
    @given(text=st.one_of(st.text(max_size=20), TEXTS))
    def test_as_sentencepiece(self, family: str, text: str) -> None:
        """Plain text: SentencePiece spells its control tokens out too, and cuts its own symbols out of the text."""
        runs = ("\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>")
        control = ("<start_of_turn>", "<end_of_turn>")
        model = sentencepiece_model(runs, control, gemma=True) if family == "gemma" else sentencepiece_model()
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        text = text.replace("▁", "").replace("\x00", "")
        assert ours(family).encode(text, add_bos=False) == processor.encode(text)


class TestKnownDifferences:
    def test_a_space_at_the_start_is_kept(self) -> None:
        """A Metaspace pre-tokenizer takes " the" for "the"; SentencePiece, with which Mistral trained, does not."""
        assert reference("mistral_v3")(" the") == reference("mistral_v3")("the")
        tokenizer = ours("mistral_v3")
        assert tokenizer.decode(tokenizer.encode(" the"), skip_special=True) == " the"
        assert tokenizer.encode(" the") != tokenizer.encode("the") == reference("mistral_v3")("the")
        assert tokenizer.decode(tokenizer.encode("the")) == "<s>the"

    def test_no_space_behind_special_tokens_where_the_first_text_alone_has_one(self) -> None:
        first, always = ours("mistral_v3"), ours("mistral_v1")
        ids = first.encode("[INST]the", add_bos=False, parse_special=True)
        assert [first.token_text(i) for i in ids][1][0] != "▁"
        ids = always.encode("</s>the", add_bos=False, parse_special=True)
        assert [always.token_text(i) for i in ids][1][0] == "▁"

    def test_composed_text_comes_back_from_qwen(self) -> None:
        tokenizer = ours("qwen2")
        assert tokenizer.encode("e\u0301") == tokenizer.encode("\u00e9")
        assert tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
        # An accent behind a special token must not make the token another text.
        ids = tokenizer.encode("<|im_end|>\u0338", parse_special=True)
        assert tokenizer.token_text(ids[0]) == "<|im_end|>"


class TestMetadata:
    def test_llama2(self) -> None:
        metadata = tokenizer_metadata(folder("llama2"), vocab_size=904)
        assert (metadata[f"{KEY}model"], metadata[f"{KEY}pre"]) == ("llama", "default")
        assert metadata[f"{KEY}tokens"][:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
        assert metadata[f"{KEY}tokens"][-1] == "[PAD903]"
        assert metadata[f"{KEY}token_type"][:4] == [2, CONTROL, CONTROL, BYTE]
        assert metadata[f"{KEY}token_type"][-5:] == [NORMAL] + [UNUSED] * 4
        assert metadata[f"{KEY}add_bos_token"] and metadata[f"{KEY}add_space_prefix"]

    def test_turn_marks_that_a_folder_calls_ordinary_are_control_tokens(self, tmp_path: Path) -> None:
        """As llama.cpp's converter has it: no reader of the file may take them out of a user's text."""
        content = json.loads((folder("llama3") / "tokenizer.json").read_text())
        for token in content["added_tokens"]:
            token["special"] = False
        content["added_tokens"][-1]["content"] = "<think>"
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        types = tokenizer_metadata(tmp_path)[f"{KEY}token_type"]
        assert types[900:906] == [CONTROL] * 5 + [USER_DEFINED]

    def test_a_token_that_swallows_what_is_before_it(self, tmp_path: Path) -> None:
        """Ids are those of the library."""
        content = json.loads((folder("llama3") / "tokenizer.json").read_text())
        content["added_tokens"][-1] |= {"content": "<hole>", "special": False, "lstrip": True}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        text = "the  <hole> model\n\t<hole>"
        expected = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(
            text, add_special_tokens=False
        )
        metadata = tokenizer_metadata(tmp_path)
        assert metadata["tokenizer.pinfer.lstrip_ids"] == [905]
        assert load_tokenizer(metadata).encode(text, add_bos=False, parse_special=True) == expected.ids

    def test_scores_of_tokenizer_model_are_taken(self) -> None:
        both, model = (
            tokenizer_metadata(folder("llama2_both")),
            read_sentencepiece(folder("llama2_both") / "tokenizer.model"),
        )
        assert both[f"{KEY}scores"][300:] == [score for _, score, _ in model.pieces][300:]

    def test_tokenizer_model_alone(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
        metadata = tokenizer_metadata(tmp_path)
        assert metadata[f"{KEY}tokens"] == tokenizer_metadata(folder("llama2"))[f"{KEY}tokens"]
        assert metadata[f"{KEY}token_type"] == tokenizer_metadata(folder("llama2"))[f"{KEY}token_type"]
        text = "The quick brown fox, 1234 日本"
        assert load_tokenizer(metadata).encode(text) == ours("llama2").encode(text)

    @pytest.mark.parametrize(
        ("family", "pre"),
        [("llama3", "llama-bpe"), ("qwen3", "qwen2"), ("falcon", "falcon"), ("gpt2", "gpt-2"), ("opt", "gpt-2")],
    )
    def test_pre_tokenizers(self, family: str, pre: str) -> None:
        metadata = tokenizer_metadata(folder(family))
        assert (metadata[f"{KEY}model"], metadata[f"{KEY}pre"]) == ("gpt2", pre)

    def test_special_tokens(self) -> None:
        gemma, llama3, opt, qwen3 = (tokenizer_metadata(folder(name)) for name in ("gemma", "llama3", "opt", "qwen3"))
        assert [gemma[f"{KEY}{name}_token_id"] for name in ("bos", "eos", "unknown", "padding")] == [2, 1, 3, 0]
        assert (
            "  " in gemma[f"{KEY}tokens"]
            and gemma[f"{KEY}token_type"][gemma[f"{KEY}tokens"].index("  ")] == USER_DEFINED
        )
        assert load_tokenizer(llama3).eog_ids == {901, 904, 905}
        assert load_tokenizer(opt).encode("", parse_special=True) == [2]
        types = dict(zip(qwen3[f"{KEY}tokens"], qwen3[f"{KEY}token_type"], strict=True))
        assert (types["<|im_end|>"], types["<think>"]) == (CONTROL, USER_DEFINED)

    def test_a_second_end_that_nothing_else_tells(self, tmp_path: Path) -> None:
        FAMILIES["falcon"](tmp_path)
        (tmp_path / "generation_config.json").write_text('{"eos_token_id": [902, 900]}')
        assert load_tokenizer(tokenizer_metadata(tmp_path)).eog_ids == {900, 902}

    def test_added_tokens_that_the_model_has_no_rows_for(self) -> None:
        """As Gemma 3's mark for images in its text models."""
        metadata = tokenizer_metadata(folder("qwen3"), vocab_size=903)
        assert metadata[f"{KEY}tokens"][-1] == "<|im_end|>" and len(metadata[f"{KEY}tokens"]) == 903
        assert "<|endoftext|>" in tokenizer_metadata(folder("gpt2"), vocab_size=901)[f"{KEY}tokens"]
        assert f"{KEY}eos_token_id" not in tokenizer_metadata(folder("gpt2"), vocab_size=900)

    def test_a_tokenizer_model_that_cannot_be_read_is_not_missed(self, tmp_path: Path) -> None:
        FAMILIES["llama2"](tmp_path)
        (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1")
        assert tokenizer_metadata(tmp_path) == tokenizer_metadata(folder("llama2"))

    def test_chat_templates(self, tmp_path: Path) -> None:
        FAMILIES["gpt2"](tmp_path)
        path = tmp_path / "tokenizer_config.json"
        templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
        metadata = tokenizer_metadata(tmp_path)
        assert metadata["tokenizer.chat_template"] == "{{ 1 }}"
        assert metadata["tokenizer.chat_template.tool_use"] == "{{ 2 }}"
        assert metadata["tokenizer.chat_templates"] == ["tool_use"]
        (tmp_path / "chat_template.jinja").write_text("{{ 3 }}\n", newline="")
        assert tokenizer_metadata(tmp_path)["tokenizer.chat_template"] == "{{ 3 }}\n"


class TestBack:
    @every_family
    def test_the_same_metadata_comes_back(self, family: str, tmp_path: Path) -> None:
        metadata = tokenizer_metadata(folder(family), vocab_size=950)
        metadata |= {"tokenizer.chat_template": "{{ 'é' }}", "tokenizer.chat_template.tool_use": "x"}
        metadata["tokenizer.chat_templates"] = ["tool_use"]
        write_tokenizer(tmp_path, metadata)
        again = tokenizer_metadata(tmp_path, vocab_size=950)
        scores = f"{KEY}scores"
        assert {**again, scores: None} == {**metadata, scores: None}

    @every_family
    @settings(max_examples=60, deadline=None)
    @given(text=TEXTS)
    def test_others_read_it(self, family: str, text: str) -> None:
        again, fast, auto = written(family)
        text = as_defined(family, text)
        expected = reference(family)(text)
        assert again.encode(text, parse_special=True) == expected
        assert fast(text)["input_ids"] == expected
        assert auto(text)["input_ids"] == expected


class TestPreTokenizers:
    @pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
    def test_every_row_goes_out_and_comes_back(self, name: str, tmp_path: Path) -> None:
        write_tokenizer(tmp_path, bpe_metadata(name, bos_token_id=0))
        again = tokenizer_metadata(tmp_path)[f"{KEY}pre"]
        there, here = PRE_TOKENIZERS[again], PRE_TOKENIZERS[name]
        assert (there.patterns, there.ignore_merges) == (here.patterns, here.ignore_merges)

    @pytest.mark.parametrize(
        ("name", "steps"),
        [
            ("qwen35", [CASELESS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+" + END]),
            ("bailingmoe", [r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"]),
            ("llama-bpe", [CASELESS + "|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+" + END]),
            ("deepseek-coder", ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", None]),
            ("starcoder", [None]),
        ],
    )  # fmt: skip
    def test_published_spellings(self, name: str, steps: list[str | None], tmp_path: Path) -> None:
        digits = {"type": "Digits", "individual_digits": True}
        parts = [digits if step is None else SPLIT | {"pattern": {"Regex": step}} for step in steps]
        parts.append({"type": "ByteLevel", "add_prefix_space": False, "use_regex": name == "starcoder"})
        FAMILIES["llama3" if PRE_TOKENIZERS[name].ignore_merges else "gpt2"](tmp_path)
        changed(tmp_path, at("pre_tokenizer")({"type": "Sequence", "pretokenizers": parts}))
        assert tokenizer_metadata(tmp_path)[f"{KEY}pre"] == name


@cache
def written(family: str) -> tuple[Tokenizer, Any, Any]:
    """A family's folder written anew, as read by pinfer and by transformers in two ways."""
    path = Path(mkdtemp(prefix=f"pinfer-{family}-again-"))
    write_tokenizer(path, tokenizer_metadata(folder(family)))
    fast, auto = PreTrainedTokenizerFast.from_pretrained(str(path)), AutoTokenizer.from_pretrained(str(path))
    return load_tokenizer(tokenizer_metadata(path)), fast, auto


def changed(path: Path, change: Callable[[dict[str, Any]], object], name: str = "tokenizer.json") -> Path:
    """The folder with one JSON file changed."""
    content = json.loads((path / name).read_text(encoding="utf-8"))
    change(content)
    (path / name).write_text(json.dumps(content), encoding="utf-8")
    return path


def at(*keys: Any) -> Callable[..., Callable[[dict[str, Any]], None]]:
    """Sets the value at `keys`."""

    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(content: Any) -> None:
            for key in keys[:-1]:
                content = content[key]
            content[keys[-1]] = value

        return change

    return to
