"""The process that renders chat templates: `python -I worker.py FOLDER...`, lines of JSON in and out.

A template is a program out of a model file. Jinja's sandbox keeps it from running other code, but
not from taking all memory or never ending: hence a process of its own with limits, which its
parent kills when a render takes too long. FOLDERs are where jinja2 and marks.py lie.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import random
import sys
import time
from typing import IO, Any

sys.path[:0] = sys.argv[1:]

import jinja2  # noqa: E402
import jinja2.debug  # noqa: E402  imported when first needed, which is too late here
import jinja2.ext  # noqa: E402
import jinja2.nodes  # noqa: E402
import jinja2.sandbox  # noqa: E402
import marks as marking  # type: ignore[import-not-found]  # noqa: E402

MEMORY_BYTES = 512 * 2**20
CPU_S = 30
MAX_OUTPUT = 16 * 2**20  # characters


class _Refused(Exception):
    """Says why a template cannot be rendered."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an answer for training; for its text the tag means nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that lead to Python's own attributes."""

    def __init__(*args: Any, **values: Any) -> None:
        for name in dict(*args[1:], **values):
            _check_name(name)
        jinja2.utils.Namespace.__init__(*args, **values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace may not hold {name!r}")


class _Clock:
    """The time that a template may ask for: the same whenever one request is rendered anew."""

    now = datetime.datetime.now()

    def strftime(self, form: str) -> str:
        return self.now.strftime(form)


def _raise_exception(message: Any) -> None:
    raise _Refused(f"it says: {message}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment(clock: _Clock) -> jinja2.Environment:
    """What transformers gives a template: whitespace as in its blocks, loop controls and a few functions."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=clock.strftime,
        namespace=_Namespace,
        dict=lambda *args, **values: dict(*args, **values),
    )
    return environment


CLOCK = _Clock()
ENVIRONMENT = _environment(CLOCK)


@functools.lru_cache(maxsize=32)
def _program(source: str, marks: marking.Marks | None, cautious: bool) -> jinja2.Template:
    """A template compiled, its literals marked if there are `marks`."""
    parsed = ENVIRONMENT.parse(source)
    if marks is not None:
        marking.put_marks(parsed, marks, cautious)
    return jinja2.Template.from_code(ENVIRONMENT, ENVIRONMENT.compile(parsed), ENVIRONMENT.make_globals(None))


@functools.lru_cache(maxsize=32)
def _marks(tokens: tuple[str, ...], roles: tuple[str, ...]) -> marking.Marks:
    return marking.Marks(list(tokens), list(roles))


def _run(program: jinja2.Template, variables: dict[str, Any]) -> str:
    random.seed(0)  # the same again, should the template draw
    parts, size = [], 0
    for part in program.generate(variables):
        size += len(part)
        if size > MAX_OUTPUT:
            raise _Refused(f"its output has more than {MAX_OUTPUT} characters")
        parts.append(part)
    return "".join(parts)


def render(request: dict[str, Any]) -> list[tuple[str, bool]]:
    """The pieces of a chat. Should marks change what a template does, more cautious ones are tried, at last none."""
    CLOCK.now = datetime.datetime.now()
    source, variables, named = request["template"], request["variables"], request["named"]
    plain = _run(_program(source, None, False), named | variables)
    try:
        plain.encode()
    except UnicodeEncodeError:
        raise _Refused("its output is not valid Unicode") from None
    tokens, roles = tuple(request["tokens"]), tuple(request["roles"])
    unsaid = tuple(token for token in tokens if token not in request["said"])
    for cautious in (False, True):
        for chosen in (tokens, unsaid) if unsaid != tokens else (tokens,):
            marks = _marks(chosen, roles)
            marked = {name: marks.put(text) if text in chosen else text for name, text in named.items()}
            with contextlib.suppress(Exception):
                output = _run(_program(source, marks, cautious), marked | variables)
                if marks.without(output) == plain:
                    return marks.pieces(output)
    return [(plain, False)] if plain else []


def _answer(line: str) -> dict[str, Any]:
    try:
        return {"pieces": render(json.loads(line))}
    except _Refused as reason:
        return {"error": str(reason)}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _limit() -> None:
    """No more memory than that, no files, no processes, as far as the system knows such limits."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_AS": MEMORY_BYTES, "RLIMIT_NOFILE": 0, "RLIMIT_NPROC": 0, "RLIMIT_FSIZE": 0, "RLIMIT_CORE": 0}
    for name, limit in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (limit, limit))


def _allow_time() -> None:
    """A limit for the next render, should there be no parent left to end it."""
    with contextlib.suppress(ImportError, AttributeError, OSError, ValueError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S, hard))


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer lines until there are no more. The first render loads what is loaded late."""
    warm = {"template": "{{ strftime_now('%Y') | pprint }}{{ [1] | tojson }}{{ x.y.z }}", "tokens": [], "roles": []}
    _answer(json.dumps(warm | {"variables": {}, "named": {}, "said": []}))
    _limit()
    answers.write("ready\n")
    answers.flush()
    for line in requests:
        _allow_time()
        answers.write(json.dumps(_answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
