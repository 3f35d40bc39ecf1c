"""Chats with a model: what is computed anew, what is forgotten, and the command line's flags for them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pinfer.chat import ChatTemplateError, built_in, encode_chat
from pinfer.cli.main import BAD_INPUT, OK, run
from pinfer.config import RunConfig, SamplingConfig
from pinfer.engine import Conversation, Engine, Generation, load_engine
from tests.gguf_files import chat_vocab, write_tiny_llama

GREEDY = SamplingConfig(temperature=0)
OWN = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
THINKS = "{% for m in messages %}<|im_start|>{{ m.content if m.role == 'user' else 'so' }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("chat") / "own.gguf", vocab=chat_vocab(OWN))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("chat") / "none.gguf", vocab=chat_vocab())


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return load_engine(RunConfig(model=str(model)))


def talk(engine: Engine, **options: Any) -> Conversation:
    return Conversation(engine, sampling=GREEDY, ignore_eos=True, **{"max_tokens": 4} | options)


def finished(generation: Generation) -> Generation:
    for _ in generation:
        pass
    return generation


class TestConversation:
    def test_a_turn_goes_on_from_the_last(self, engine: Engine) -> None:
        chat = talk(engine, system="the")
        first = finished(chat.ask("hello"))
        assert chat.messages == [{"role": "system", "content": "the"}, {"role": "user", "content": "hello"}]
        assert first.prompt == encode_chat(engine.tokenizer, chat.messages)
        assert first.stats.prompt_tokens == len(first.prompt)
        second = finished(chat.ask("the hello"))
        assert [message["role"] for message in chat.messages] == ["system", "user", "assistant", "user"]
        assert chat.messages[2]["content"] == first.text
        held = first.prompt + first.ids[:-1]  # the last token drawn was never read
        kept = len(second.prompt) - second.stats.prompt_tokens
        assert second.prompt[:kept] == held[:kept]
        assert kept == len(held) or second.prompt[kept] != held[kept]
        assert kept >= len(first.prompt)

    def test_as_if_computed_anew(self, engine: Engine) -> None:
        chat = talk(engine)
        for text in ("hello", "the the", "hello hello"):
            answer = finished(chat.ask(text))
            alone = Generation(engine, answer.prompt, max_tokens=4, sampling=GREEDY, ignore_eos=True)
            assert finished(alone).ids == answer.ids

    def test_a_template_that_changes_what_was_said(self, engine: Engine) -> None:
        """Only what is still the same is kept."""
        chat = talk(engine, template=THINKS)
        first = finished(chat.ask("hello"))
        second = finished(chat.ask("the"))
        kept = len(second.prompt) - second.stats.prompt_tokens
        assert kept == len(first.prompt), "the answer itself is another text now"
        alone = Generation(engine, second.prompt, max_tokens=4, sampling=GREEDY, ignore_eos=True)
        assert finished(alone).ids == second.ids

    def test_the_oldest_turns_are_forgotten(self, model: Path) -> None:
        engine = load_engine(RunConfig(model=str(model), context=96))
        chat = talk(engine, system="the")
        for turn in range(6):
            answer = finished(chat.ask(f"hello {turn}"))
            assert len(answer.prompt) < 96
        assert chat.forgotten > 0 and chat.forgotten % 2 == 0
        assert [message["role"] for message in chat.messages[:2]] == ["system", "user"]
        assert chat.messages[-1]["content"] == "hello 5"

    def test_what_cannot_be_asked_leaves_the_chat_as_it_was(self, model: Path) -> None:
        engine = load_engine(RunConfig(model=str(model), context=64))
        chat = talk(engine, max_tokens=2)
        first = finished(chat.ask("hello"))
        before = list(chat.messages)
        with pytest.raises(ValueError, match="the context holds 64"):
            chat.ask("z" * 100)
        assert chat.messages == before
        assert finished(chat.ask("the")).prompt[: len(first.prompt)] == first.prompt

    def test_words_that_mark_a_turn_end_an_answer(self, engine: Engine) -> None:
        chat = talk(engine, template=built_in("alpaca"))
        assert chat._stop == ["### Instruction:"]

    def test_a_template_that_refuses(self, engine: Engine) -> None:
        with pytest.raises(ChatTemplateError, match="it says: no"):
            talk(engine, template="{{ raise_exception('no') }}").ask("hello")


class TestRewind:
    def test_at_least_one_token_is_left_to_compute(self, engine: Engine) -> None:
        first = finished(Generation(engine, [104, 101, 108], max_tokens=3, sampling=GREEDY, ignore_eos=True))
        assert first.rewind([104, 101, 108]) == 2
        assert first.rewind([7]) == 0
        again = Generation(engine, [104, 101, 108], before=first, max_tokens=3, sampling=GREEDY, ignore_eos=True)
        assert finished(again).ids == first.ids
        with pytest.raises(ValueError, match="handed its cache over"):
            first.rewind([7])


def figures(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


GENERATE = ["generate", "-n", "3", "--ignore-eos", "--temp", "0"]


class TestCommandLine:
    def test_one_answer(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run([*GENERATE, "-m", str(model), "--chat", "-p", "hello", "--json"]) == OK
        asked = figures(capsys.readouterr().out)
        engine = load_engine(RunConfig(model=str(model)))
        ids = encode_chat(engine.tokenizer, [{"role": "user", "content": "hello"}])
        answer = finished(Generation(engine, ids, max_tokens=3, sampling=GREEDY, ignore_eos=True))
        assert (asked["ids"], asked["prompt_tokens"]) == (answer.ids, len(ids))
        assert run([*GENERATE, "-m", str(model), "--chat", "-p", "hello"]) == OK
        assert capsys.readouterr().out == answer.text + "\n", "a question is not part of its answer"

    def test_without_chat_the_text_is_continued(self, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for flags in ([], ["--no-chat"]):
            assert run([*GENERATE, "-m", str(model), "-p", "hello", "--json", *flags]) == OK
            assert figures(capsys.readouterr().out)["prompt_tokens"] == 1

    def test_lines_are_messages_where_the_model_has_a_template(
        self, model: Path, plain_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def first_prompt(*arguments: str) -> int:
            monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhello\n"))
            assert run([*GENERATE, "-i", *arguments]) == OK
            err = capsys.readouterr().err
            assert err.count("density") == 2
            return int(err.split("prompt ")[1].split()[0])

        tokenizer = load_engine(RunConfig(model=str(model))).tokenizer
        asked = encode_chat(tokenizer, [{"role": "user", "content": "hello"}])
        assert first_prompt("-m", str(model)) == len(asked) > 1
        assert first_prompt("-m", str(model), "--no-chat") == 1
        assert first_prompt("-m", str(model), "--special") == 1
        assert first_prompt("-m", str(plain_model)) == 1
        assert first_prompt("-m", str(plain_model), "--chat") > 1

    def test_a_family_stands_in(self, plain_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run([*GENERATE, "-m", str(plain_model), "--chat", "-p", "hello"]) == OK
        assert "the model has no chat template: chatml is used" in capsys.readouterr().err

    def test_system_and_template(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def prompt_tokens(*arguments: str) -> int:
            assert run([*GENERATE, "-m", str(model), "-p", "hello", "--json", *arguments]) == OK
            return int(figures(capsys.readouterr().out)["prompt_tokens"])

        (tmp_path / "t.jinja").write_text("{{ messages[0].content }}", encoding="utf-8")
        assert prompt_tokens("--chat-template", str(tmp_path / "t.jinja")) == 1
        assert prompt_tokens("--system", "the") > prompt_tokens("--chat") > 1
        assert prompt_tokens("--chat-template", "alpaca") > 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--no-chat", "--system", "x"], "--system has no meaning with --no-chat"),
            (["--no-chat", "--chat-template", "gemma"], "--chat-template has no meaning with --no-chat"),
            (["--chat", "--special"], "--special has no meaning in a chat"),
            (["--chat-template", "nothing.jinja"], "nothing.jinja is no file, nor a chat template's name"),
        ],
    )
    def test_bad_flags(
        self, model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run([*GENERATE, "-m", str(model), "-p", "hello", *arguments]) == BAD_INPUT
        out, err = capsys.readouterr()
        assert out == "" and message in err and err.count("\n") == 1

    def test_a_hostile_template(self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "t.jinja").write_text("{{ 'a' * 10**10 }}", encoding="utf-8")
        template = ["--chat-template", str(tmp_path / "t.jinja")]
        assert run([*GENERATE, "-m", str(model), "-p", "hello", *template]) == BAD_INPUT
        assert "the chat template cannot be rendered: it takes more than 512 MiB" in capsys.readouterr().err
