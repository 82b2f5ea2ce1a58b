"""The grammar of queries and sorts, and the parser of the library lark (LALR: in one pass, without recursion).

Gets a text, hands on the tree of ``tree``; every error points at the character where it goes wrong.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import lark
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from expstate.catalog.query.literal import QUANTITY, Literal
from expstate.catalog.query.tree import And, Comparison, Name, Node, Not, Or, comparisons, error
from expstate.errors import InvalidQueryError

MAX_CHARACTERS = 4000
MAX_COMPARISONS = 200
MAX_DEPTH = 15
"""Levels of not, and, or in one another: the parser of older SQLites has room for about 20 of them, which is more than a person writes."""
_WORD = r"""[^\s()<>=!~"',;&|\\]"""
GRAMMAR = rf"""
?start: _any
_any: any
?any: all (_OR all)*
?all: not (_AND not)*
?not: _NOT not -> negation
    | "(" _any ")"
    | name -> bare
    | name OP value -> comparison
name: WORD -> bare_name
    | QUOTED -> quoted_name
    | KIND QUOTED -> kind_name
value: WORD -> word
    | QUANTITY -> word
    | QUOTED -> quoted

OP: "<=" | ">=" | "==" | "!=" | "<" | ">" | "=" | "~"
_AND: /and(?!{_WORD})/i
_OR: /or(?!{_WORD})/i
_NOT: /not(?!{_WORD})/i
KIND.2: /(?:metric|param)\.(?=["'])/
QUANTITY.1: /{QUANTITY}(?!{_WORD})/
WORD: /(?!(?:and|or|not)(?!{_WORD}))(?!(?:metric|param)\.["']){_WORD}+/i
QUOTED: /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'/s
%ignore /\s+/
"""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}
_UNUSABLE = re.compile("[\0\ud800-\udfff]")


class _TooDeepError(Exception):
    """The query is nested too deeply."""


def _unquoted(token: str) -> str:
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[1]), token[1:-1], flags=re.DOTALL)


def _position(token: lark.Token) -> int:
    return token.start_pos or 0


def _depth(node: Node) -> int:
    if isinstance(node, Comparison):
        return 0
    return 1 + max(map(_depth, (node.operand,) if isinstance(node, Not) else node.operands))


@lark.v_args(inline=True)
class _Build(lark.Transformer[lark.Token, Node]):
    """Makes the tree while the text is parsed."""

    def bare_name(self, token: lark.Token) -> Name:
        kind, dot, rest = token.partition(".")
        if dot and rest and kind in {"metric", "param"}:
            return Name(rest, kind, _position(token))
        return Name(str(token), "", _position(token))

    def quoted_name(self, token: lark.Token) -> Name:
        return Name(_unquoted(token), "", _position(token))

    def kind_name(self, kind: lark.Token, token: lark.Token) -> Name:
        return Name(_unquoted(token), kind[:-1], _position(kind))

    def word(self, token: lark.Token) -> Literal:
        return Literal(str(token), quoted=False, position=_position(token))

    def quoted(self, token: lark.Token) -> Literal:
        return Literal(_unquoted(token), quoted=True, position=_position(token))

    def bare(self, name: Name) -> Comparison:
        return Comparison(name)

    def comparison(self, name: Name, op: lark.Token, value: Literal) -> Comparison:
        return Comparison(name, "=" if op == "==" else str(op), value)

    def negation(self, operand: Node) -> Node:
        return self._checked(Not(operand))

    def any(self, *operands: Node) -> Node:
        return self._checked(Or(operands))

    def all(self, *operands: Node) -> Node:
        return self._checked(And(operands))

    @staticmethod
    def _checked(node: Node) -> Node:
        # Looked at whenever a level is added, so that nothing here or later recurses further than that.
        if _depth(node) > MAX_DEPTH:
            raise _TooDeepError
        return node


@functools.cache
def _parser() -> lark.Lark:
    return lark.Lark(GRAMMAR, start=["start", "name"], parser="lalr", transformer=_Build())


_HINTS = (
    ("OP", "expected a comparison such as < 0.2, one of < <= > >= = != ~"),
    ("QUANTITY", "expected a value"),
    ("_NOT", "expected a field, metric or param, not, or ("),
    ("_AND", "expected and, or, or the end"),
    ("WORD", "expected a field, metric or param"),
)


def _explain(text: str, found: UnexpectedInput, what: str) -> InvalidQueryError:
    position = found.pos_in_stream or 0
    expected: Any = ()
    if isinstance(found, UnexpectedToken):
        expected = found.accepts or found.expected
        position = len(text) if found.token.type == "$END" else position
    elif isinstance(found, UnexpectedCharacters):
        expected = found.allowed or ()
    if text[position : position + 1] in {'"', "'"} and isinstance(found, UnexpectedCharacters) and "QUOTED" in expected:
        return error(text, position, "this quote is not closed", what)
    if text[position : position + 1] == ")" and "_NOT" not in expected:
        return error(text, position, "no ( belongs to this )", what)
    if what == "sort" and "WORD" not in expected:
        return error(text, position, "a sort is one name, then :asc or :desc", what)
    hint = next((hint for terminal, hint in _HINTS if terminal in expected), "expected nothing more")
    if "RPAR" in expected and position == len(text):
        hint = "expected and, or, or )"
    return error(text, position, hint, what)


def _checked(text: object, what: str) -> str:
    if not isinstance(text, str):
        msg = f"a {what} is a text, got {type(text).__name__}"
        raise InvalidQueryError(msg)
    if len(text) > MAX_CHARACTERS:
        msg = f"a {what} has at most {MAX_CHARACTERS} characters, this one has {len(text)}"
        raise InvalidQueryError(msg, MAX_CHARACTERS)
    unusable = _UNUSABLE.search(text)
    if unusable is not None:
        raise error(text, unusable.start(), "a character that no text of the catalog can hold", what)
    return text


def _parse(text: str, start: str, what: str) -> Any:
    try:
        return _parser().parse(text, start=start)
    except UnexpectedInput as found:
        raise _explain(text, found, what) from None
    except _TooDeepError:
        raise error(text, 0, f"it is nested more than {MAX_DEPTH} deep", what) from None


def parse(text: str) -> Node:
    """The tree of a query.

    Raises
    ------
    InvalidQueryError
        If it is none; the message shows where.

    Examples
    --------
    >>> parse("loss < 0.2 and not pinned").operands[0].op
    '<'
    """
    node: Node = _parse(_checked(text, "query"), "start", "query")
    count = sum(1 for _ in comparisons(node))
    if count > MAX_COMPARISONS:
        msg = f"a query has at most {MAX_COMPARISONS} comparisons, this one has {count}"
        raise InvalidQueryError(msg)
    return node


@dataclass(frozen=True, slots=True)
class Sort:
    """What records are sorted by."""

    name: Name
    descending: bool


def parse_sort(text: str) -> Sort:
    """The name and direction of a sort such as ``loss:desc``.

    Raises
    ------
    InvalidQueryError
        If it is none.

    Examples
    --------
    >>> parse_sort('metric."val loss":desc')
    Sort(name=Name(text='val loss', kind='metric', position=0), descending=True)
    """
    head, colon, tail = _checked(text, "sort").rpartition(":")
    direction = tail.strip().lower() if colon else ""
    name: Name = _parse(head if direction in {"asc", "desc"} else text, "name", "sort")
    return Sort(name, direction == "desc")
