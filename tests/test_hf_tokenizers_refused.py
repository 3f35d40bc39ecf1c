"""Tokenizer files of Hugging Face folders that are faulty or not supported: refused by file and key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.formats.errors import FormatError
from pinfer.formats.huggingface.tokenizer import tokenizer_metadata
from pinfer.formats.tokenizer import load_tokenizer
from tests.hf_tokenizers import FAMILIES, sentencepiece_model
from tests.test_hf_tokenizers import SPLIT, at, changed, folder

WORDS = {"type": "Sequence", "pretokenizers": [SPLIT, {"type": "ByteLevel", "use_regex": False}]}


class TestRefused:
    @pytest.mark.parametrize(
        ("family", "change", "message"),
        [
            ("gpt2", at("model", "type")("Unigram"), r"tokenizer.json: model is of type 'Unigram'; only BPE"),
            (
                "gpt2",
                at("pre_tokenizer")(WORDS),
                r"tokenizer.json: pre_tokenizer splits by '[\\]+w\+', with ignore_merges false",
            ),
            ("gpt2", at("pre_tokenizer", "add_prefix_space")(True), "pre_tokenizer has add_prefix_space true"),
            ("gpt2", at("pre_tokenizer")(None), "model has neither byte_fallback nor a ByteLevel"),
            ("gpt2", at("pre_tokenizer")([]), r"pre_tokenizer is '\[\]', not an object"),
            ("gpt2", at("normalizer")({"type": "NFKC"}), "normalizer is of type 'NFKC'"),
            ("gpt2", at("model", "vocab", "a")(-1), r"model.vocab gives 'a' the id '-1', not one from 0"),
            ("gpt2", at("model", "vocab", "a")(10**30), "model.vocab gives 'a' the id"),
            ("gpt2", at("model", "vocab", "a")(True), "model.vocab gives 'a' the id 'True'"),
            ("gpt2", at("model", "vocab", "ab")(0), "model.vocab gives the id 0 to both"),
            ("gpt2", at("model", "vocab")({}), "model.vocab is missing or empty"),
            ("gpt2", at("model", "vocab", "\ud800")(899), "model.vocab holds text that is not valid Unicode"),
            ("gpt2", at("model", "merges", 3)(["a"]), r"model.merges\[3\] is .*not two texts"),
            ("gpt2", at("model", "merges", 3)(7), r"model.merges\[3\] is '7', not two texts"),
            ("gpt2", at("model", "continuing_subword_prefix")("##"), "continuing_subword_prefix is not empty"),
            ("gpt2", at("added_tokens", 0, "id")(-3), r"added_tokens\[0\].id is -3"),
            ("gpt2", at("added_tokens", 0, "content")(None), r"added_tokens\[0\] has no content"),
            ("gpt2", at("post_processor")({"type": "BertProcessing"}), "post_processor is of type 'BertProcessing'"),
            ("gpt2", at("model")([]), r"model is '\[\]', not an object"),
            ("llama2", at("normalizer")({"type": "Lowercase"}), "normalizer is of type 'Lowercase'"),
            ("llama2", at("normalizer")(None), "normalizer does not replace spaces"),
            ("mistral_v3", at("pre_tokenizer", "prepend_scheme")("last"), "prepend_scheme is 'last'"),
            (
                "llama2",
                at("post_processor", "single")([{"SpecialToken": {"id": "<s>"}}] * 3),
                "single is not one text",
            ),
        ],
    )
    def test_by_file_and_key(
        self, family: str, change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
    ) -> None:
        FAMILIES[family](tmp_path)
        with pytest.raises(FormatError, match=message):
            tokenizer_metadata(changed(tmp_path, change))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "not JSON"),
            (b"\xff", "not UTF-8 at byte 0"),
            (b"[1]", "not an object but list"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"model": ' + b"9" * 5000 + b"}", "not JSON"),
        ],
    )
    def test_what_is_no_json_object(self, content: bytes, message: str, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(FormatError, match=f"tokenizer.json: {message}"):
            tokenizer_metadata(tmp_path)

    def test_too_many_tokens_for_the_model(self) -> None:
        with pytest.raises(FormatError, match="has 900 tokens, the model 899 rows"):
            tokenizer_metadata(folder("gpt2"), vocab_size=899)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
            tokenizer_metadata(tmp_path)

    @pytest.mark.parametrize("family", ["gpt2", "llama2", "mistral_v3"])
    @settings(max_examples=150, deadline=None)
    @given(data=st.data())
    def test_any_value_anywhere(self, family: str, data: st.DataObject) -> None:
        """Whatever stands at whichever key: metadata or a FormatError, nothing else."""
        content = small(folder(family))
        places = list(paths(content))
        junk = st.one_of(
            st.none(), st.booleans(), st.integers(-5, 5), st.just(10**40), st.floats(), st.text(max_size=3),
            st.just([]), st.just({}), st.just([[]]), st.just([None]), st.just({"type": 3}), st.just("\ud800"),
        )  # fmt: skip
        at(*data.draw(st.sampled_from(places)))(data.draw(junk))(content)
        path = Path(mkdtemp(prefix="pinfer-junk-"))
        for name, value in content.items():
            (path / name).write_text(json.dumps(value), encoding="utf-8")
        try:
            load_tokenizer(tokenizer_metadata(path))
        except FormatError as error:
            assert "\n" not in str(error)

    @settings(max_examples=150, deadline=None)
    @given(position=st.integers(0, 5000), junk=st.binary(max_size=4), cut=st.booleans())
    def test_a_damaged_sentencepiece_model(self, position: int, junk: bytes, cut: bool) -> None:
        path = Path(mkdtemp(prefix="pinfer-junk-"))
        model = sentencepiece_model()
        end = b"" if cut else model[position + len(junk) :]
        (path / "tokenizer.model").write_bytes(model[:position] + junk + end)
        try:
            load_tokenizer(tokenizer_metadata(path))
        except FormatError as error:
            assert "\n" not in str(error)


def small(path: Path) -> dict[str, Any]:
    """The JSON files of a folder with few tokens and merges, so that most keys are settings."""
    files = {item.name: json.loads(item.read_text(encoding="utf-8")) for item in path.glob("*.json")}
    model = files["tokenizer.json"]["model"]
    model["merges"] = model["merges"][:3]
    kept = {part for pair in model["merges"] for part in (*pair, "".join(pair))}
    model["vocab"] = {text: i for text, i in model["vocab"].items() if i < 4 or text in kept}
    return files


def paths(value: Any, before: tuple[Any, ...] = ()) -> Any:
    """The places of all values in a JSON value, as tuples of keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if before:
            yield (*before, key)
        yield from paths(inner, (*before, key))
