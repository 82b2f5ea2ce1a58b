"""A query as a tree, and what may stand in it: names, comparisons, ``not``, ``and``, ``or``. Errors that point into its text.

``parse`` makes it of a text; ``conditions`` makes SQL of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expstate.errors import InvalidQueryError
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.catalog.query.literal import Literal

_SHOWN = 100
"""Characters of a query that an error shows."""


@dataclass(frozen=True, slots=True)
class Name:
    """A name in a query; ``kind`` is ``metric`` or ``param`` where that was written, else empty."""

    text: str
    kind: str
    position: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A name compared with a value; a bare name has neither operator nor value."""

    name: Name
    op: str = ""
    value: Literal | None = None


@dataclass(frozen=True, slots=True)
class Not:
    """What is false of the operand."""

    operand: Node


@dataclass(frozen=True, slots=True)
class And:
    """All of the operands."""

    operands: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Or:
    """Any of the operands."""

    operands: tuple[Node, ...]


Node = Comparison | Not | And | Or


def comparisons(node: Node) -> Iterator[Comparison]:
    """Every comparison of a tree, from left to right."""
    waiting: list[Node] = [node]
    while waiting:
        found = waiting.pop()
        if isinstance(found, Comparison):
            yield found
        else:
            waiting.extend((found.operand,) if isinstance(found, Not) else reversed(found.operands))


def error(text: str, position: int, problem: str, what: str = "query") -> InvalidQueryError:
    r"""The error for a problem at a character of a query or sort, with the place shown.

    >>> print(error("loss <", 6, "expected a value"))
    the query cannot be understood at character 7: expected a value
      loss <
            ^
    """
    first = max(0, min(position - _SHOWN // 2, len(text) - _SHOWN))
    before, after = ("..." if first else ""), ("..." if first + _SHOWN < len(text) else "")
    left = before + paths.printable(text[first:position])
    line = left + paths.printable(text[position : first + _SHOWN]) + after
    msg = f"the {what} cannot be understood at character {position + 1}: {problem}\n  {line}\n  {' ' * len(left)}^"
    return InvalidQueryError(msg, position)
