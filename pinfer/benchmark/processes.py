"""A contestant's process, as seen by who asks it: start it, ask, and leave none behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

LLAMA_CPP_SCRIPT = Path(__file__).parent / "llama_cpp_worker.py"
END_S = 5.0  # for a process that closed its output to end
SHOWN_LINES = 8
OPENMP_NAMES = ("OMP_", "GOMP_", "KMP_")


class Worker:
    """One contestant's process (protocol: llama_cpp_worker.py). As a context manager it is killed on leaving.

    tell: takes the worker's remarks. Asking raises ValueError or RuntimeError with the worker's own
    message, and RuntimeError with the end of its stderr if it dies.
    """

    def __init__(
        self, name: str, command: Sequence[str], tell: Callable[[str], None], environment: Mapping[str, str]
    ) -> None:
        self.name, self._tell = name, tell
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (a pipe that nobody reads would stall the worker)
        # A session of its own: Ctrl-C goes to this process alone, which then kills the worker.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=dict(environment),
            start_new_session=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send one object and wait for the answer."""
        assert self._process.stdin is not None
        # A worker that is gone cannot be written to, but what it said last is still there to read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        while "note" in (answer := self._receive()):
            self._tell(f"{self.name}: {answer['note']}")
        if "error" in answer:
            raise (ValueError if answer["bad_input"] else RuntimeError)(f"{self.name}: {answer['error']}")
        return answer

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._obituary())
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RuntimeError(f"the {self.name} worker does not keep to the protocol: {line[:80]!r}")
        return answer

    def _obituary(self) -> str:
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return f"the {self.name} worker closed its output"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._stderr.seek(0)
        said = self._stderr.read().decode("utf-8", "replace").splitlines()[-SHOWN_LINES:]
        return f"the {self.name} worker {how}{': ' if said else ''}{' | '.join(line.strip() for line in said)}"


def pinfer_worker(name: str, tell: Callable[[str], None]) -> Worker:
    """A process of this interpreter that finds its modules where this one does."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from pinfer.benchmark.pinfer_worker import main; main()"
    return Worker(name, [sys.executable, "-c", code], tell, os.environ)


def llama_cpp_worker(python: str, name: str, tell: Callable[[str], None]) -> Worker:
    """The llama.cpp script under the interpreter `python`."""
    return Worker(name, [python, str(LLAMA_CPP_SCRIPT)], tell, _environment_as_started())


def _environment_as_started() -> dict[str, str]:
    """This process's environment without the OpenMP settings that it made for itself.

    The command line lets OpenMP threads sleep rather than spin. That is meant for pinfer: llama.cpp,
    whose every operation is a barrier, is 2 to 10 times slower with it than as its users run it.
    """
    try:
        started = dict(item.split(b"=", 1) for item in Path("/proc/self/environ").read_bytes().split(b"\0") if item)
    except (OSError, ValueError):
        started = {}
    own = [name for name in os.environ if name.startswith(OPENMP_NAMES) and os.fsencode(name) not in started]
    return {name: value for name, value in os.environ.items() if name not in own}
