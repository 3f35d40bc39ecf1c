"""Chats: malformed messages, hostile templates, and the process that renders them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from pinfer.chat import ChatTemplateError, built_in, render
from pinfer.chat.process import Worker
from tests.test_chat import TALK, ours, user


class TestMessages:
    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ("hello", "messages is \"'hello'\", not a list"),
            ([], "messages is empty"),
            ([3], r"messages\[0\] is '3', not an object"),
            ([*TALK, {"content": "x"}], r"messages\[3\].role is 'None', not a text"),
            ([{"role": 3, "content": "x"}], r"messages\[0\].role is '3'"),
            ([{"role": "user"}], r"messages\[0\].content is 'None', not a text"),
            ([{"role": "user", "content": 5}], r"messages\[0\].content is '5', not a text"),
            ([{"role": "user", "content": ["x"]}], r"messages\[0\].content\[0\] is .*, not an object"),
            ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\].type is .*image_url"),
            ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\].content\[0\].text is 'None'"),
            (
                [{"role": "user", "content": "a\ud800"}],
                r"messages\[0\].content holds the lone surrogate U\+D800 at index 1",
            ),
            ([{"role": "user", "content": "a", "x": {"\udc00": 1}}], r"messages\[0\].x holds the lone surrogate"),
            ([{"role": "user", "content": "a", "x": {1: 1}}], r"messages\[0\].x has the key '1', not a text"),
            ([{"role": "user", "content": "a", "x": b"b"}], r"messages\[0\].x is .*, which is no plain data"),
            ([{"role": "assistant", "tool_calls": [1]}], r"messages\[0\].tool_calls is '\[1\]', not a list of objects"),
        ],
    )
    def test_malformed(self, messages: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            render(built_in("chatml"), messages)

    def test_deep_nesting(self) -> None:
        deep: Any = "x"
        for _ in range(100):
            deep = [deep]
        with pytest.raises(ValueError, match="nested more than 32 deep"):
            render(built_in("chatml"), [{"role": "user", "content": "a", "x": deep}])

    def test_parts_of_text_are_joined(self) -> None:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        assert "one\ntwo" in ours(built_in("chatml"), [{"role": "user", "content": parts}]).text


HOSTILE = {
    "memory at once": "{{ 'a' * 10**10 }}",
    "memory by and by": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "endless output": "{% for i in range(99999) %}{% for j in range(99999) %}abc{% endfor %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a large number": "{{ 2 ** (10 ** 9) }}",
    "width": "{{ '%99999999999d' % 1 }}",
    "indent": "{{ [1] | tojson(indent=10**9) }}",
    "Python inside": "{{ ''.__class__.__mro__ }}",
    "a namespace's inside": "{{ namespace(__class__=1) }}",
    "a file": "{% include '/etc/passwd' %}",
    "no Unicode": r"{{ '\ud800' }}",
    "no template": "{% if %}",
    "an exception": "{{ raise_exception('line one\nline two') }}",
    "nothing there": "{{ x.y.z }}",
}


class TestProcess:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_templates(self, name: str) -> None:
        with pytest.raises(ChatTemplateError, match="the chat template") as caught:
            render(HOSTILE[name], user("x"))
        assert "\n" not in str(caught.value)
        assert ours(built_in("chatml"), user("x")).text  # the next is rendered as ever

    @pytest.mark.timeout(20)  # the worker's own limit of processor time comes after 30 s
    def test_a_template_without_end_is_stopped_by_the_clock(self) -> None:
        worker = Worker(time_limit_s=0.5)
        loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        try:
            with pytest.raises(ChatTemplateError, match=r"over 0\.5 s"):
                worker.ask({"template": loop, "variables": {}, "named": {}, "roles": [], "tokens": [], "said": []})
        finally:
            worker.close()

    def test_one_process_for_many_renders(self) -> None:
        worker = Worker()
        request = {"template": "{{ 1 }}", "variables": {}, "named": {}, "roles": [], "tokens": [], "said": []}
        assert worker.ask(request) == [["1", False]]
        process = worker._process
        assert worker.ask(request) == [["1", False]] and worker._process is process
        worker.close()
        assert process is not None and process.poll() is not None
        assert worker.ask(request) == [["1", False]]
        worker.close()

    def test_a_worker_that_dies_is_replaced(self) -> None:
        worker = Worker()
        request = {"template": "{{ 1 }}", "variables": {}, "named": {}, "roles": [], "tokens": [], "said": []}
        worker.ask(request)
        assert worker._process is not None
        worker._process.kill()
        worker._process.wait()
        assert worker.ask(request) == [["1", False]]
        worker.close()

    def test_the_worker_has_nothing_of_ours(self) -> None:
        worker = Worker()
        os.environ["PINFER_SECRET"] = "x"
        try:
            worker.ask({"template": "", "variables": {}, "named": {}, "roles": [], "tokens": [], "said": []})
        finally:
            del os.environ["PINFER_SECRET"]
        assert worker._process is not None
        process = Path(f"/proc/{worker._process.pid}")
        if not process.exists():
            pytest.skip("no /proc here")
        assert b"PINFER_SECRET" not in (process / "environ").read_bytes()
        assert len(list((process / "fd").iterdir())) == 3
        assert "torch" not in (process / "maps").read_text()
        limits = {line[:25].strip(): line[25:].split()[0] for line in (process / "limits").read_text().splitlines()}
        assert (limits["Max address space"], limits["Max open files"]) == (str(512 * 2**20), "0")
        assert int(limits["Max cpu time"]) < 60
        worker.close()

    def test_many_threads(self) -> None:
        found: list[str] = []

        def ask(number: int) -> None:
            for _ in range(5):
                found.append(ours("{{ messages[0].content }}", user(str(number))).text)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == sorted(str(number) for number in range(6) for _ in range(5))

    def test_after_a_fork_and_at_exit(self) -> None:
        """A forked child starts a worker of its own, and neither leaves one behind."""
        program = (
            "import os\nfrom pinfer.chat import render\n"
            "ask = lambda text: render('{{ messages[0].content }}', [{'role': 'user', 'content': text}]).text\n"
            "assert ask('a') == 'a'\nchild = os.fork()\nassert ask('b') == 'b'\n"
            "if child: assert os.waitpid(child, 0)[1] == 0\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_a_chat_that_is_too_long(self) -> None:
        with pytest.raises(ChatTemplateError, match="at most 67108864 are rendered"):
            render("", user("x" * 2**26))
