"""Comparisons of numbers in SQL: columns of whole numbers, and the pairs of number and ``exact`` of metrics and params.

Gets a column, an operator and a Python number of any size; hands on a condition that is what Python would say.
"""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

if TYPE_CHECKING:
    from collections.abc import Callable

Condition = sa.ColumnElement[bool]

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}
_EXACT_BELOW = 2.0**53
_LEAST, _MOST = -(2**63), 2**63 - 1


def big(value: int) -> sa.ColumnElement[int]:
    """A bound whole number of 64 bits."""
    return sa.literal(value, sa.BigInteger())


def whole(column: sa.ColumnElement[Any], op: str, value: float) -> Condition:
    """A column of whole numbers of 64 bits compared with any number; null where the column is."""
    if not _LEAST <= value <= _MOST:  # nan too
        always = op == "!=" or op in ({"<", "<="} if value > 0 else {">", ">="} if value < 0 else ())
        return column.is_not(None) if always else sa.false()
    # Only whole bounds: a database would round the column to compare it with a float.
    bound = math.ceil(value) if op in {"<", ">="} else math.floor(value)
    if op in {"=", "!="} and bound != value:
        return column.is_not(None) if op == "!=" else sa.false()
    return OPERATORS[op](column, big(bound))  # type: ignore[no-any-return]


def real(column: sa.ColumnElement[Any], op: str, value: float) -> Condition:
    """A column of floats, none of them NaN, compared with any number; null where the column is."""
    if value != value:  # noqa: PLR0124 - nan; math.isnan takes no long ints
        return column.is_not(None) if op == "!=" else sa.false()
    return OPERATORS[op](column, sa.literal(_nearest(value), sa.Float()))  # type: ignore[no-any-return]


def is_delicate(value: float) -> bool:
    """Whether ints that no float holds may be as near to a number as its own float is."""
    return abs(_nearest(value)) >= _EXACT_BELOW


def measured(number: sa.ColumnElement[Any], exact: sa.ColumnElement[Any], op: str, value: float) -> Condition:
    """A metric or param compared with a number; null or false where it is no number.

    Parameters
    ----------
    number, exact : ColumnElement
        The columns of ``metrics`` and ``params``.
    op : str
        One of ``OPERATORS``; nan equals itself here, so that it can be found.
    value : int or float
        Of any size.
    """
    if value != value:  # noqa: PLR0124 - nan; math.isnan takes no long ints
        return exact == "nan" if op == "=" else number.is_not(None) if op == "!=" else sa.false()
    near = _nearest(value)
    bound = sa.literal(near, sa.Float())
    if not is_delicate(value):
        if op == "!=":
            return sa.or_(number != bound, exact == "nan")
        return OPERATORS[op](number, bound)  # type: ignore[no-any-return]
    less, equal = _among_neighbours(exact, value, near)
    same = number == bound
    return {
        "=": sa.and_(same, equal),
        "!=": sa.or_(number != bound, sa.and_(same, sa.not_(equal)), exact == "nan"),
        "<": sa.or_(number < bound, sa.and_(same, less)),
        "<=": sa.or_(number < bound, sa.and_(same, sa.or_(less, equal))),
        ">": sa.or_(number > bound, sa.and_(same, sa.not_(sa.or_(less, equal)))),
        ">=": sa.or_(number > bound, sa.and_(same, sa.not_(less))),
    }[op]


def _nearest(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _among_neighbours(exact: sa.ColumnElement[Any], value: float, near: float) -> tuple[Condition, Condition]:
    """Of numbers whose nearest float is ``near``: whether they are less than ``value``, and whether they are equal to it."""
    positive = near > 0
    if isinstance(value, float) and math.isinf(value):
        # Every int, however long, is nearer to zero than infinity.
        return (exact.is_not(None) if positive else sa.false()), exact.is_(None)
    digits = format(int(value), "x")
    if math.isinf(near):
        # Without digits it is infinite.
        shorter, same = _shorter(exact, digits, positive=positive), sa.and_(exact.is_not(None), exact == digits)
        return (sa.and_(exact.is_not(None), shorter) if positive else sa.or_(exact.is_(None), shorter)), same
    found = sa.func.coalesce(exact, format(int(near), "x"))
    return _shorter(found, digits, positive=positive), found == digits


def _shorter(found: sa.ColumnElement[Any], digits: str, *, positive: bool) -> Condition:
    """Whether hexadecimal digits are of a lesser number; of negative ones, those of the greater absolute value."""
    compare = operator.lt if positive else operator.gt
    length = sa.func.length(found)
    return sa.or_(compare(length, len(digits)), sa.and_(length == len(digits), compare(found, digits)))
