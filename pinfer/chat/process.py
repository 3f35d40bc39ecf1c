"""The worker that renders templates: started when first needed, kept, killed when a render takes too long."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TIME_LIMIT_S = 2.0
START_LIMIT_S = 30.0
MAX_REQUEST_BYTES = 64 * 2**20
MAX_ANSWER_BYTES = 256 * 2**20  # what the worker's own limit on characters can come to
MAX_REASON = 500  # characters of what a template says of itself
WORKER = Path(__file__).with_name("worker.py")


class ChatTemplateError(ValueError):
    """A chat template that cannot be rendered, or not within the limits of time and memory."""


class Worker:
    """One process at a time, used by one thread at a time."""

    def __init__(self, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer to a request. ChatTemplateError with the worker's reason, or where it gave none in time."""
        line = json.dumps(request).encode() + b"\n"
        if len(line) > MAX_REQUEST_BYTES:
            raise ChatTemplateError(f"a chat of {len(line)} bytes as JSON; at most {MAX_REQUEST_BYTES} are rendered")
        with self._lock:
            process = self._running()
            answer = self._exchange(process, line, self._time_limit_s)
            if answer is None:
                self._end()
        if answer is None:
            raise ChatTemplateError(
                f"the chat template was stopped: it took over {self._time_limit_s:g} s, or more memory than it may"
            )
        content = json.loads(answer)
        if "error" in content:
            reason = " ".join(str(content["error"]).split())[:MAX_REASON]
            raise ChatTemplateError(f"the chat template cannot be rendered: {reason}")
        return content["pieces"]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _running(self) -> subprocess.Popen[bytes]:
        """The process of this process: after a fork, the parent's worker is the parent's alone."""
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return self._process
        if self._owner == os.getpid():
            self._end()
        process = _start()
        self._process, self._owner = process, os.getpid()
        if self._exchange(process, b"", START_LIMIT_S) != b"ready\n":
            self._end()
            raise ChatTemplateError(f"the process for chat templates did not start ({sys.executable} -I {WORKER})")
        return process

    @staticmethod
    def _exchange(process: subprocess.Popen[bytes], line: bytes, limit_s: float) -> bytes | None:
        """What the process answers; None if it ended, or did not answer in time and was killed."""
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(limit_s, process.kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline(MAX_ANSWER_BYTES)
        except OSError:
            return None
        finally:
            timer.cancel()
        return answer if answer.endswith(b"\n") else None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # of what was not written yet, to a process that is gone
                    pipe.close()


def _start() -> subprocess.Popen[bytes]:
    """A Python without this one's environment, folders and descriptors; Ctrl-C does not reach it."""
    jinja2 = find_spec("jinja2")
    if jinja2 is None or jinja2.origin is None:
        raise ChatTemplateError("chat templates need jinja2 (pip install jinja2)")
    folders = [str(WORKER.parent), str(Path(jinja2.origin).parent.parent)]
    return subprocess.Popen(
        [sys.executable, "-I", "-B", str(WORKER), *folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ},
        cwd=os.path.abspath(os.sep),
        start_new_session=True,
    )


SHARED = Worker()
