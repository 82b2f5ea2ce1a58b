"""What a query and a sort mean, said in plain Python over records: slow, and as simple as can be."""

from __future__ import annotations

import math
from typing import Any

from expstate.catalog.model import Record
from expstate.catalog.query import literal
from expstate.catalog.query.tree import And, Comparison, Node, Not

COMPARE: dict[str, Any] = {
    "<": lambda one, other: one < other,
    "<=": lambda one, other: one <= other,
    ">": lambda one, other: one > other,
    ">=": lambda one, other: one >= other,
    "=": lambda one, other: one == other,
    "!=": lambda one, other: one != other,
    "~": lambda one, other: other.upper() in one.upper(),
}
TEXTS = ("id", "name", "project", "user", "host", "note", "parent", "digest", "status")
SYNONYMS = {"nbytes": "size", "created_at": "created", "tags": "tag", "nbytes_written": "written"}
_MISSING = object()


def is_true(node: Node, record: Record, metrics: set[str], now: int) -> bool:
    """Whether a query is true of a record; bare names of ``metrics`` are metrics."""
    if isinstance(node, Not):
        return not is_true(node.operand, record, metrics, now)
    if not isinstance(node, Comparison):
        combine = all if isinstance(node, And) else any
        return combine(is_true(operand, record, metrics, now) for operand in node.operands)
    kind, name = of(node.name, metrics)
    if node.value is None:
        return record.pinned if name == "pinned" and not kind else is_true(_flag(node), record, metrics, now)
    if kind:
        return _measured(getattr(record, f"{kind}s").get(name, _MISSING), node.op, node.value)
    return _field(record, name, node.op, node.value, now)


def of(name: Any, metrics: set[str]) -> tuple[str, str]:
    """The kind of a name (metric, param or empty) and its field's or own name."""
    if name.kind:
        return name.kind, name.text
    found = SYNONYMS.get(name.text, name.text)
    if found in {*TEXTS, "url", "step", "created", "age", "duration", "size", "written", "world_size", "tag", "alias", "pinned"}:
        return "", found
    return ("metric" if name.text in metrics else "param"), name.text


def _flag(node: Comparison) -> Comparison:
    return Comparison(node.name, "=", literal.Literal("true", quoted=False, position=0))


def _measured(value: Any, op: str, given: literal.Literal) -> bool:
    if given.is_none:
        return (value is _MISSING or value is None) == (op == "=")
    number, plain = None, False
    if not given.quoted:
        plain = literal.number(given.raw) is not None
        readers = (literal.number, literal.size, literal.duration)
        number = next((found for found in (read(given.raw) for read in readers) if found is not None), None)
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, str):
        text = given.raw.lower() if not given.quoted and literal.boolean(given.raw) is not None else given.raw
        return (op == "~" or not plain) and COMPARE[op](value, text)
    if not isinstance(value, (int, float)) or number is None or op == "~":
        return False
    if math.isnan(number if isinstance(number, float) else 0):
        is_nan = isinstance(value, float) and math.isnan(value)
        return is_nan if op == "=" else not is_nan if op == "!=" else False
    return COMPARE[op](value, number)


def _field(record: Record, name: str, op: str, given: literal.Literal, now: int) -> bool:  # noqa: PLR0911 - one for each kind of field
    if name in {"tag", "alias", "url"}:
        values = {"tag": record.tags, "alias": record.aliases, "url": tuple(place.url for place in record.locations)}[name]
        if given.is_none:
            return (not values) == (op == "=")
        there = any(COMPARE["~" if op == "~" else "="](value, given.raw) for value in values)
        return there == (op != "!=")
    value = _plain(record, name)
    if given.is_none:
        return (value is None) == (op == "=")
    if value is None:
        return False
    if name in TEXTS:
        return COMPARE[op](value, given.raw)
    if name == "pinned":
        return COMPARE[op](value, literal.boolean(given.raw))
    if name == "created":
        first, end = literal.span(given.raw, now)
        return COMPARE[op](0 if first <= value < end else value - first, 0)
    if name == "age":
        return COMPARE[op](now - value, literal.duration(given.raw) * 1_000_000)
    readers = (literal.number, literal.size, literal.duration)
    return COMPARE[op](value, next(found for found in (read(given.raw) for read in readers) if found is not None))


def _plain(record: Record, name: str) -> Any:
    if name in {"created", "age"}:
        return round(record.created_at.timestamp() * 1_000_000)
    names = {"size": "nbytes", "written": "nbytes_written", "duration": "duration_seconds"}
    return getattr(record, names.get(name, name))


def in_order(
    records: list[Record], place: dict[str, Any], name: Any = None, *, descending: bool = False, metrics: frozenset[str] = frozenset()
) -> list[Record]:
    """Records by a name, the newest first among equals; ``place`` gives the place of each id in the order of takes."""
    found = sorted(records, key=lambda record: place[record.id], reverse=True)
    if name is None:
        return found
    keys = {record.id: _key(record, *of(name, metrics)) for record in found}
    numbers = [record for record in found if isinstance(keys[record.id], (int, float))]
    texts = [record for record in found if isinstance(keys[record.id], str)]
    rest = [record for record in found if keys[record.id] is None]
    for part in (numbers, texts):
        part.sort(key=lambda record: keys[record.id], reverse=descending)  # equals stay as they are
    return [*numbers, *texts, *rest]


def _key(record: Record, kind: str, name: str) -> Any:
    if kind:
        value = getattr(record, f"{kind}s").get(name)
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            try:
                return float(value)
            except OverflowError:
                return math.inf if value > 0 else -math.inf
        return None if not isinstance(value, (float, str)) or (isinstance(value, float) and math.isnan(value)) else value
    if name in {"tag", "alias"}:
        return min(record.tags if name == "tag" else record.aliases, default=None)
    value = _plain(record, name)
    return -value if name == "age" else value
