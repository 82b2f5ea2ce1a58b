"""SQL of a query's tree: conditions on a record that are true or false, never null, with every value bound.

Gets the tree and what its names mean, hands on a condition. A comparison with what a record lacks is false, so its ``not`` is true; each
comparison sees to that by itself, by ``EXISTS`` or by asking whether there is a value.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import schema
from expstate.catalog.query import fields, literal
from expstate.catalog.query.fields import Field
from expstate.catalog.query.names import Measured
from expstate.catalog.query.numeric import OPERATORS, Condition, big, measured, real, whole
from expstate.catalog.query.tree import And, Comparison, Node, Not, comparisons, error
from expstate.catalog.rows import indexable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from expstate.catalog.query.literal import Literal
    from expstate.catalog.query.names import Target
    from expstate.catalog.query.tree import Name

CONTAINS = "expstate_contains"
"""A function of two texts that SQLite is given; see ``contains``."""
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "=": "=", "!=": "!="}
_SECOND = 1_000_000


def contains(text: str | None, part: str) -> bool | None:
    """Whether a text contains another that is in capitals, which is how letters of all scripts are compared without their case."""
    return None if text is None else part in text.upper()


@dataclass(frozen=True, slots=True)
class Query:
    """A query that was understood.

    Attributes
    ----------
    text : str
        As it was written.
    targets : mapping of Name to Target
        What its names mean.
    dialect : str
        ``sqlite`` or ``postgresql``.
    unicode_collation : str or None
        A collation of PostgreSQL that knows the capitals of all letters.
    now : int
        Microseconds since 1970.
    """

    text: str
    targets: Mapping[Name, Target]
    dialect: str
    unicode_collation: str | None
    now: int

    # The tree

    def condition(self, node: Node, row: sa.FromClause) -> Condition:
        """What a record fulfils.

        Parameters
        ----------
        node : Node
            The tree, or a part of it.
        row : FromClause
            Whose columns hold the record: ``records``, or another with its number in ``record``.
        """
        if isinstance(node, Comparison):
            return self._comparison(node, row)
        if isinstance(node, Not):
            return sa.not_(self.condition(node.operand, row))
        combine = sa.and_ if isinstance(node, And) else sa.or_
        return combine(*(self.condition(operand, row) for operand in node.operands))

    def asks_fields(self, node: Node) -> bool:
        """Whether columns of ``records`` are needed."""
        found = (self.targets[comparison.name] for comparison in comparisons(node))
        return any(isinstance(target, Field) and target.kind != fields.MANY for target in found)

    def _comparison(self, node: Comparison, row: sa.FromClause) -> Condition:
        target = self.targets[node.name]
        if node.value is None:
            return self._bare(node, target, row)
        if node.value.is_none and node.op not in {"=", "!="}:
            raise self._wrong(node.value, "none is compared by = and != only")
        if isinstance(target, Measured):
            return self._measured(target, node.op, node.value, row)
        if target.kind == fields.MANY:
            return self._many(target, node.op, node.value, row)
        return self._field(target, node.op, node.value)

    def _wrong(self, value: Literal, problem: str) -> Exception:
        return error(self.text, value.position, problem)

    def _bare(self, node: Comparison, target: Target, row: sa.FromClause) -> Condition:
        if isinstance(target, Field) and target.kind == fields.BOOLEAN:
            return target.column.is_(sa.true())
        if isinstance(target, Measured) and not target.is_metric:
            return self._measured(target, "=", literal.Literal("true", quoted=False, position=node.name.position), row)
        problem = f"{node.name.text!r} stands alone: compare it, by one of < <= > >= = != ~"
        raise error(self.text, node.name.position, problem)

    # Metrics and params

    def _measured(self, target: Measured, op: str, value: Literal, row: sa.FromClause) -> Condition:
        if value.is_none:
            there = self.exists(target, row, lambda table: sa.or_(table.c.exact.is_(None), table.c.exact != "none"))
            return sa.not_(there) if op == "=" else there
        return self.exists(target, row, lambda table: self.value_of(table, target, op, value))

    def exists(self, target: Measured, row: sa.FromClause, condition: Any) -> Condition:
        """Whether a record has a metric or param, and it fulfils a condition."""
        table = target.table.alias()
        conditions = (table.c.record == _number(row), is_named(table, target), condition(table))
        return sa.exists(sa.select(sa.literal(1)).where(*conditions).correlate(row))

    def value_of(self, table: sa.FromClause, target: Measured, op: str, value: Literal) -> Condition:
        """What a row of a metric or param fulfils; null where the value is of another type."""
        found = None if value.quoted else _number_of(value.raw)
        sides: list[Condition] = []
        if op != "~" and found is not None:
            sides.append(measured(table.c.number, table.c.exact, op, found))
        if not target.is_metric and (op == "~" or found is None or literal.number(value.raw) is None):
            raw = value.raw.lower() if not value.quoted and literal.boolean(value.raw) is not None else value.raw
            sides.append(self._text(table.c.text, op, raw))
        return sa.or_(*sides) if sides else sa.false()

    # Fields

    def _many(self, field: Field, op: str, value: Literal, row: sa.FromClause) -> Condition:
        table = field.column.table.alias()
        column = table.c[field.column.name]
        if value.is_none:
            condition: Condition = sa.true()
            op = "!=" if op == "=" else "="
        elif op in {"=", "!=", "~"}:
            condition = self._text(column, op.removeprefix("!"), stored(field, op, value.raw))
        else:
            raise self._wrong(value, f"a record has any number of {field.name} values: compare them by =, != or ~")
        there = sa.exists(sa.select(sa.literal(1)).where(table.c.record == _number(row), condition).correlate(row))
        return sa.not_(there) if op == "!=" else there

    def _field(self, field: Field, op: str, value: Literal) -> Condition:
        column = field.column
        if value.is_none:
            return column.is_(None) if op == "=" else column.is_not(None)
        if field.kind == fields.TEXT:
            found = self._text(column, op, stored(field, op, value.raw))
        elif op == "~":
            raise self._wrong(value, f"~ looks into texts, and {field.name} is a {field.kind}")
        else:
            found = self._known(field, op, value)
        return sa.and_(column.is_not(None), found) if column.nullable else found

    def _known(self, field: Field, op: str, value: Literal) -> Condition:
        """A field that is no text; the value must be of its kind."""
        column: sa.ColumnElement[Any] = field.column
        if field.kind == fields.TIME:
            span = literal.span(value.raw, self.now)
            if span is not None:
                return _within(column, op, *span)
        elif field.kind == fields.BOOLEAN:
            flag = literal.boolean(value.raw)
            if flag is not None and op in {"=", "!="}:
                return column.is_(sa.true() if flag == (op == "=") else sa.false())
        else:
            number = _of_kind(field.kind, value.raw)
            if number is not None:
                if field.kind == fields.AGE:
                    return whole(column, _FLIPPED[op], self.now - number * _SECOND)
                if field.kind == fields.DURATION:
                    return real(column, op, number)
                return whole(column, op, number)
        raise self._wrong(value, f"{field.name} is compared with {fields.EXAMPLES[field.kind]}, not with {value.raw!r}")

    # Texts

    def _text(self, column: sa.ColumnElement[Any], op: str, text: str) -> Condition:
        if op == "~":
            return self._contains(column, text)
        if op in {"=", "!="}:
            return OPERATORS[op](column, text)  # type: ignore[no-any-return]
        # By code points, on every database and whatever its language.
        return OPERATORS[op](sa.collate(column, "C") if self.dialect == "postgresql" else column, text)  # type: ignore[no-any-return]

    def _contains(self, column: sa.ColumnElement[Any], part: str) -> Condition:
        if self.dialect == "sqlite":
            return getattr(sa.func, CONTAINS)(column, part.upper(), type_=sa.Boolean())  # type: ignore[no-any-return]
        texts: list[sa.ColumnElement[Any]] = [column, sa.literal(part, sa.Text())]
        if self.unicode_collation is not None:
            texts = [sa.collate(text, self.unicode_collation) for text in texts]
        return sa.func.strpos(*map(sa.func.upper, texts)) > 0


def _number(row: sa.FromClause) -> sa.ColumnElement[int]:
    return row.c.seq if row is schema.records else row.c.record


def is_named(table: sa.FromClause, target: Measured) -> Condition:
    """Whether a row of ``metrics`` or ``params`` is of that metric or param."""
    if len(target.ids) == 1:
        return table.c.name == big(target.ids[0])
    return table.c.name.in_([*target.ids])


def _number_of(raw: str) -> int | float | None:
    for read in (literal.number, literal.size, literal.duration):
        found = read(raw)
        if found is not None:
            return found
    return None


def _of_kind(kind: str, raw: str) -> int | float | None:
    plain = literal.number(raw)
    if kind in {fields.INTEGER, fields.SIZE, fields.DURATION} and plain is not None:
        return plain
    if kind == fields.SIZE:
        return literal.size(raw)
    return literal.duration(raw) if kind in {fields.AGE, fields.DURATION} else None


def stored(field: Field, op: str, text: str) -> str:
    """A text as the field holds it."""
    if field.label:
        text = unicodedata.normalize("NFC", text)
    return indexable(text) if op in {"=", "!="} and field.name not in {"note", "url"} else text


def _within(column: sa.ColumnElement[Any], op: str, first: int, end: int) -> Condition:
    """A time compared with a day, minute or second: less is before its beginning, greater is after its end."""
    inside = sa.and_(column >= big(first), column < big(end))
    return {
        "=": inside,
        "!=": sa.not_(inside),
        "<": column < big(first),
        "<=": column < big(end),
        ">": column >= big(end),
        ">=": column >= big(first),
    }[op]
