"""Which of a rendered chat's text is a control token that the template itself wrote.

Text that a user wrote must never become a control token, whatever it spells. So every literal of
a template that can reach its output has its control tokens replaced by lone surrogates, which no
user's text can hold. The template then works on the messages as they are, whether it trims, cuts,
compares or joins them, and each surrogate in its output is a control token of the template's own.
Literals that are compared with something or handed to a method stay as they are.

Templates that build a control token around a role ('<|' + role + '|>') have the two halves
marked; with one of the known roles between them they are the token.

This file and worker.py run in a process without pinfer, so they import nothing of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from jinja2 import nodes

FIRST_MARK, MAX_MARKS = 0xD800, 1024  # high surrogates alone: no two of them make a character
_MARK = re.compile("([\ud800-\udbff])")
# Filters whose arguments are text for the output; those of others, such as replace, are searched for.
_WRITING_FILTERS = ("default", "d", "join")
_JOINING = (nodes.Add, nodes.Concat, nodes.CondExpr, nodes.TemplateData, nodes.Const)


class Marks:
    """A surrogate for each control token, and for each text that stands before or behind a role in one."""

    def __init__(self, tokens: list[str], roles: list[str]) -> None:
        self._tokens = sorted(set(tokens), key=lambda text: (-len(text.encode()), text))[:MAX_MARKS]
        pairs = [token.split(role) for token in self._tokens for role in roles if token.count(role) == 1]
        pairs = [pair for pair in pairs if all(pair)]
        heads, tails = ({pair[side] for pair in pairs} - set(self._tokens) for side in (0, 1))
        self._texts = [*self._tokens, *sorted(heads), *sorted(tails - heads)][:MAX_MARKS]
        self._codes = {text: chr(FIRST_MARK + index) for index, text in enumerate(self._texts)}
        self._heads, self._tails = (sorted(h & self._codes.keys(), key=len, reverse=True) for h in (heads, tails))
        self._role = re.compile(f"([\ud800-\udbff])({'|'.join(map(re.escape, roles)) or '(?!)'})([\ud800-\udbff])")

    def put(self, text: str) -> str:
        """A literal with its control tokens replaced, the longest first, and a half at its end or its start."""
        for token in self._tokens:
            text = text.replace(token, self._codes[token])
        head = next((head for head in self._heads if text.endswith(head)), "")
        text = text.removesuffix(head) + self._codes.get(head, "")
        tail = next((tail for tail in self._tails if text.startswith(tail)), "")
        return self._codes.get(tail, "") + text.removeprefix(tail)

    def without(self, output: str) -> str:
        """What the template gives without marks."""
        return _MARK.sub(lambda match: self._text(match[0]), output)

    def pieces(self, output: str) -> list[tuple[str, bool]]:
        """The output in order as (text, whether it is one control token)."""
        output = self._role.sub(self._joined, output)
        pieces: list[tuple[str, bool]] = []
        for part in _MARK.split(output):
            control = self._text(part) in self._tokens if _MARK.fullmatch(part) else False
            text = self._text(part) if _MARK.fullmatch(part) else part
            if pieces and not control and not pieces[-1][1]:
                pieces[-1] = (pieces[-1][0] + text, False)
            elif text:
                pieces.append((text, control))
        return pieces

    def _text(self, mark: str) -> str:
        index = ord(mark) - FIRST_MARK
        return self._texts[index] if index < len(self._texts) else mark

    def _joined(self, match: re.Match[str]) -> str:
        head, role, tail = match.groups()
        return self._codes.get(self._text(head) + role + self._text(tail), match[0])


def put_marks(template: nodes.Template, marks: Marks, cautious: bool) -> None:
    """Mark a template's literals in place; if `cautious` only those that its outputs join directly."""
    if cautious:
        literals = [found for output in template.find_all(nodes.Output) for found in _joined_literals(output)]
    else:
        literals = list(_written_literals(template))
    for literal in literals:
        if isinstance(literal, nodes.TemplateData):
            literal.data = marks.put(literal.data)
        elif isinstance(literal, nodes.Const) and isinstance(literal.value, str):
            literal.value = marks.put(literal.value)


def _joined_literals(node: nodes.Node) -> Iterator[nodes.Node]:
    if isinstance(node, (nodes.TemplateData, nodes.Const)):
        yield node
    for child in _written_children(node):
        if isinstance(child, _JOINING) or (isinstance(child, nodes.Filter) and child.node is not None):
            yield from _joined_literals(child)


def _written_literals(node: nodes.Node) -> Iterator[nodes.Node]:
    if isinstance(node, (nodes.TemplateData, nodes.Const)):
        yield node
    for child in _written_children(node):
        yield from _written_literals(child)


def _written_children(node: nodes.Node) -> Iterator[nodes.Node]:
    """The parts of a node whose text may come out of it: not conditions, subscripts, keys or what is searched for."""
    kept: Sequence[nodes.Node | None]
    if isinstance(node, (nodes.Compare, nodes.Test)):
        return
    if isinstance(node, nodes.Filter):
        kept = [node.node, *(node.args if node.name in _WRITING_FILTERS else [])]
    elif isinstance(node, nodes.Call):
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
        kept = [node.node, *(arguments if isinstance(node.node, nodes.Name) else [])]
    elif isinstance(node, nodes.Getitem):
        kept = [node.node]
    elif isinstance(node, nodes.Pair):
        kept = [node.value]
    elif isinstance(node, nodes.CondExpr):
        kept = [node.expr1, node.expr2]
    else:
        kept = list(node.iter_child_nodes(exclude=("test",)))
    yield from (child for child in kept if child is not None)
