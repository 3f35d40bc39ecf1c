"""The process that renders chat templates: `python -I worker.py FOLDER...`, lines of JSON in and out.

A template is a program out of a model file. Jinja's sandbox keeps it from running other code, but
not from taking all memory or never ending: hence a process of its own with limits, which its
parent kills when a render takes too long. FOLDERs are where jinja2 and marks.py lie.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import random
import sys
from typing import IO, Any

sys.path[:0] = sys.argv[1:]

import jinja2  # noqa: E402
import jinja2.debug  # noqa: E402  imported when first needed, which is too late here
import jinja2.ext  # noqa: E402
import jinja2.nodes  # noqa: E402
import jinja2.sandbox  # noqa: E402
import marks as marking  # type: ignore[import-not-found]  # noqa: E402

MEMORY_BYTES = 512 * 2**20
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


def _environment(now: datetime.datetime) -> jinja2.Environment:
    """What transformers gives a template: whitespace as in its blocks, loop controls and a few functions."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], cache_size=0
    )

    def raise_exception(message: Any) -> None:
        raise _Refused(f"it says: {message}")

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=now.strftime,
        namespace=_Namespace,
        dict=lambda *args, **values: dict(*args, **values),
    )
    return environment


def _run(environment: jinja2.Environment, program: jinja2.nodes.Template, variables: dict[str, Any]) -> str:
    random.seed(0)  # the same again, should the template draw
    template = jinja2.Template.from_code(environment, environment.compile(program), environment.make_globals(None))
    parts, size = [], 0
    for part in template.generate(variables):
        size += len(part)
        if size > MAX_OUTPUT:
            raise _Refused(f"its output has more than {MAX_OUTPUT} characters")
        parts.append(part)
    return "".join(parts)


def render(request: dict[str, Any]) -> list[tuple[str, bool]]:
    """The pieces of a chat. Should marks change what a template does, more cautious ones are tried, at last none."""
    environment = _environment(datetime.datetime.now())
    source, variables, named = request["template"], request["variables"], request["named"]
    plain = _run(environment, environment.parse(source), named | variables)
    if any("\ud800" <= char <= "\udfff" for char in plain):
        raise _Refused("its output is not valid Unicode")
    tokens = request["tokens"]
    unsaid = [token for token in tokens if token not in request["said"]]
    for cautious in (False, True):
        for chosen in (tokens, unsaid) if unsaid != tokens else (tokens,):
            marks = marking.Marks(chosen, request["roles"])
            program = environment.parse(source)
            marking.put_marks(program, marks, cautious)
            marked = {name: marks.put(text) if text in chosen else text for name, text in named.items()}
            with contextlib.suppress(Exception):
                output = _run(environment, program, marked | variables)
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


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer lines until there are no more. The first render loads what is loaded late."""
    warm = {"template": "{{ strftime_now('%Y') | pprint }}{{ [1] | tojson }}{{ x.y.z }}", "tokens": [], "roles": []}
    _answer(json.dumps(warm | {"variables": {}, "named": {}, "said": []}))
    _limit()
    answers.write("ready\n")
    answers.flush()
    for line in requests:
        answers.write(json.dumps(_answer(line)) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin, sys.stdout)
