"""The llama.cpp contestant: a script that loads a GGUF through llama-cpp-python and times it when asked.

It stands alone, so that any interpreter (3.8 or newer) with llama_cpp can run it; `serve`, the worker's
end of the protocol, lies here for that reason and pinfer's own worker imports it. One JSON object a line:

    asked     settings of the contestant, once; then one request a turn
    answered  what the contestant says about itself, then one turn's figures for each request;
              {"note": text} before any of them is a remark for the user, and
              {"error": text, "bad_input": bool} is the last line

Between requests the worker sleeps. When standard input ends, at whatever moment, it is gone at once.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

BATCH = 512  # tokens: n_batch and n_ubatch, llama.cpp's usual pair
ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
NEEDED = ("llama_model_load_from_file", "llama_init_from_model", "llama_get_memory", "llama_memory_clear")
BAD_INPUT = (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class Contestant(Protocol):
    """What `serve` asks: facts about itself, JSON-ready, and one turn's figures for a request."""

    about: dict[str, Any]

    def turn(self, request: dict[str, Any]) -> dict[str, Any]: ...


def serve(load: Callable[[dict[str, Any], Callable[[str], None]], Contestant]) -> int:
    """Answer requests until standard input ends; returns an exit code only after an error.

    load: makes the contestant from its settings and a function that takes remarks for the user.
    """
    # A library that prints must not break into the protocol: what it sends to stdout goes to stderr.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    requests = _requests()
    try:
        contestant = load(requests.get(), lambda text: send({"note": text}))
        send(contestant.about)
        while True:
            send(contestant.turn(requests.get()))
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        send({"error": text, "bad_input": isinstance(error, BAD_INPUT)})
        return 1


def _requests() -> queue.SimpleQueue[dict[str, Any]]:
    """The requests as they come, read by a thread, so that the end of input also ends a computation."""
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            requests.put(json.loads(line))
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def peak_rss_bytes() -> int:
    """Most memory this program has held. On Linux not ru_maxrss, which starts at the peak of who started it."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


class LlamaCpp:
    """A model in llama.cpp, on the CPU, with its default options but for the threads and the batch.

    settings: model (path), threads, context (positions). ValueError where llama_cpp cannot be
    imported, RuntimeError with llama.cpp's own words where it does not take the model.
    """

    def __init__(self, settings: dict[str, Any], note: Callable[[str], None]) -> None:
        self._api = api = _import_llama_cpp()
        self._errors: list[str] = []
        self._log = api.llama_log_callback(self._hear)  # llama.cpp keeps a pointer to it
        api.llama_log_set(self._log, ctypes.c_void_p(0))
        api.llama_backend_init()
        path = settings["model"]
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        model = api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {path}: {self._said()}")
        self._context = self._new_context(model, settings)
        self._vocab_size = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))
        self._many, self._one = api.llama_batch_init(BATCH, 0, 1), api.llama_batch_init(1, 0, 1)
        system = api.llama_print_system_info()
        self.about: dict[str, Any] = {
            "threads": settings["threads"],
            "version": f"llama-cpp-python {getattr(api, '__version__', 'of unknown version')}",
            "system": system.decode("utf-8", "replace").strip(),
        }

    def turn(self, request: dict[str, Any]) -> dict[str, Any]:
        """See `Turn` in run.py for the figures; `request` has prompt and opening (token ids) and steps."""
        self._clear()
        began = time.perf_counter()
        self._read(request["prompt"])
        self._logits()
        prefill_s = time.perf_counter() - began
        self._clear()
        self._read(request["opening"])
        return {
            "prefill_tokens_per_s": len(request["prompt"]) / prefill_s,
            "decode_tokens_per_s": request["steps"] / self._decode_s(len(request["opening"]), request["steps"]),
            "density": 1.0,
            "peak_rss_bytes": peak_rss_bytes(),
        }

    def _new_context(self, model: Any, settings: dict[str, Any]) -> Any:
        parameters = self._api.llama_context_default_params()
        parameters.n_ctx = settings["context"]
        parameters.n_batch = parameters.n_ubatch = BATCH
        parameters.n_threads = parameters.n_threads_batch = settings["threads"]
        context = self._api.llama_init_from_model(model, parameters)
        if not context:
            raise RuntimeError(f"llama.cpp cannot run {settings['model']}: {self._said()}")
        return context

    def _hear(self, level: int, text: bytes, _: Any) -> None:
        if level == ERROR_LEVEL:
            self._errors.append(text.decode("utf-8", "replace").strip())

    def _said(self) -> str:
        return "; ".join(self._errors) or "it gave no reason"

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _read(self, tokens: list[int]) -> None:
        """Run a prompt in batches; only the last token's logits are computed."""
        for start in range(0, len(tokens), BATCH):
            self._many.n_tokens = len(tokens[start : start + BATCH])
            for i, token in enumerate(tokens[start : start + BATCH]):
                self._place(self._many, i, token, start + i, last=start + i == len(tokens) - 1)
            self._run(self._many)

    def _place(self, batch: Any, i: int, token: int, position: int, last: bool) -> None:
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, last
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = 0

    def _run(self, batch: Any) -> None:
        code = self._api.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code}: {self._said()}")

    def _logits(self) -> Any:
        """The last token's logits, ctypes float32 [V]; waits for them."""
        address = ctypes.addressof(self._api.llama_get_logits_ith(self._context, -1).contents)
        return (ctypes.c_float * self._vocab_size).from_address(address)

    def _decode_s(self, start: int, steps: int) -> float:
        """Seconds for greedy single-token steps from position `start`, the drawing of each token included."""
        numpy = importlib.import_module("numpy")  # llama_cpp needs it as well
        batch = self._one
        batch.n_tokens = 1
        self._place(batch, 0, 0, start, last=True)
        began = time.perf_counter()
        for position in range(start, start + steps):
            batch.token[0] = int(numpy.frombuffer(self._logits(), numpy.float32).argmax())
            batch.pos[0] = position
            self._run(batch)
        self._logits()
        return time.perf_counter() - began


def _import_llama_cpp() -> Any:
    # Python puts the script's folder first, where other modules of pinfer lie: none of them is meant.
    folder = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != folder]
    try:
        api = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:  # the latter two where its library is broken
        raise ValueError(
            f"{sys.executable} cannot import llama_cpp ({error}): install it with {sys.executable} -m pip install "
            "llama-cpp-python, or name an interpreter that has it with --llama-python"
        ) from error
    missing = [name for name in NEEDED if not hasattr(api, name)]
    if missing:
        raise ValueError(f"llama_cpp of {sys.executable} has no {missing[0]}: upgrade llama-cpp-python")
    return api


if __name__ == "__main__":
    sys.exit(serve(LlamaCpp))
