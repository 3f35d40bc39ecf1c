"""The list of commands, and how every failure ends.

Exit codes: 0 done, 1 failed at run time, 2 bad input, 130 interrupted
(143 by SIGTERM, 129 by SIGHUP). A failure prints one line
to stderr; PINFER_TRACEBACK=1 shows the Python traceback instead.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

# Spinning OpenMP threads stall each other by milliseconds where cores are shared with another
# process; sleeping ones cost a wake-up of some 50 µs. Must be set before torch loads its runtime.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import typer

import pinfer
from pinfer.cli.console import printable

OK, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# Where each command is. Only what is called is imported: all of them together take half a second.
COMMANDS = {
    "generate": "generate:generate",
    "bench": "bench:bench",
    "convert": "convert:convert_command",
    "doctor": "doctor:doctor",
    "eval": "evaluate:evaluate_command",
    "inspect": "inspect:inspect",
    "plan": "plan:plan_command",
    "profile": "profile:profile_command",
    "quantize": "quantize:quantize_command",
    "solve": "solve:solve_command",
    "tokenize": "tokenize:tokenize",
    "train": "train:train_command",
}
SYNONYMS = {"main": "generate"}  # the guide's


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"pinfer {pinfer.__version__}")
        raise typer.Exit()


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Sparse LLM inference: any GGUF, computing only the neurons that fire."""


def application(arguments: Sequence[str]) -> typer.Typer:
    """The command line with the command that the arguments name, or with all of them."""
    app = typer.Typer(
        name="pinfer",
        help="Sparse LLM inference: any GGUF, computing only the neurons that fire.",
        add_completion=False,
        no_args_is_help=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    for name, command in commands(arguments).items():
        called = SYNONYMS.get(name, name)
        app.command(name, hidden=name != called, help=None if name == called else f"Same as {called}.")(command)
    return app


def commands(arguments: Sequence[str]) -> dict[str, Callable[..., None]]:
    """The command that the arguments name, or all of them, imported."""
    named = next((one for one in arguments if not one.startswith("-")), "")
    found = {}
    for name in [named] if named in COMMANDS or named in SYNONYMS else [*COMMANDS, *SYNONYMS]:
        module, function = COMMANDS[SYNONYMS.get(name, name)].split(":")
        found[name] = getattr(importlib.import_module(f"pinfer.cli.{module}"), function)
    return found


def run(arguments: Sequence[str]) -> int:
    """Run a command line; returns its exit code."""
    if os.environ.get("PINFER_TRACEBACK"):
        return _invoke(arguments)
    if sys.stdout is None:
        return _fail("failed: standard output is closed", FAILED)
    try:
        return _invoke(arguments)
    except KeyboardInterrupt as stop:
        return _fail("interrupted", 128 + stop.args[0] if stop.args else INTERRUPTED)
    except BrokenPipeError:
        # What is left in stdout's buffer has no reader; without this, Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _fail("the reader of the output closed it", FAILED)
    except (
        ValueError,
        FileNotFoundError,
        FileExistsError,
        IsADirectoryError,
        NotADirectoryError,
        PermissionError,
    ) as error:
        return _fail(f"error: {_one_line(error)}", BAD_INPUT)
    except (RuntimeError, OSError, MemoryError) as error:
        return _fail(f"failed: {_one_line(error)}", FAILED)
    except Exception as error:
        where = "PINFER_TRACEBACK=1 shows where"
        return _fail(f"failed: {type(error).__name__}: {_one_line(error)} ({where})", FAILED)


def _invoke(arguments: Sequence[str]) -> int:
    command = typer.main.get_command(application(arguments))
    try:
        # Not command.main(), which turns interrupts and closed pipes into silent exits.
        with command.make_context("pinfer", list(arguments) or ["--help"]) as context:
            command.invoke(context)
        sys.stdout.flush()
    except typer.Exit as stop:
        return stop.exit_code
    except Exception as error:
        # Usage errors of typer's parser, whichever version of it carries the classes.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _fail(f"error: {message()}{_offending(error, arguments)} (see pinfer --help)", BAD_INPUT)
    return OK


def _offending(error: Exception, arguments: Sequence[str]) -> str:
    """The value that an option could not take, where the parser's message leaves it out."""
    names = getattr(getattr(error, "param", None), "opts", ())
    for name, value in itertools.pairwise(arguments):
        if name in names:
            return f": {value}"
    return ""


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError, AttributeError):  # stderr may be closed as well
        print(f"pinfer: {printable(message).plain}", file=sys.stderr, flush=True)
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
