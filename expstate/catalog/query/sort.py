"""The order of records in SQL: by a field, metric or param, missing values and NaN last, the newest first among equals.

Gets a sort and what its name means; hands on expressions to order by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import schema
from expstate.catalog.query import fields
from expstate.catalog.query.conditions import is_named
from expstate.catalog.query.names import Measured

if TYPE_CHECKING:
    from expstate.catalog.query.names import Target

_records = schema.records.c


@dataclass(frozen=True, slots=True)
class Order:
    """An order of records.

    Attributes
    ----------
    target : Target or None
        What they are ordered by; None for the newest first.
    descending : bool
        The greatest first.
    dialect : str
        ``sqlite`` or ``postgresql``.
    """

    target: Target | None
    descending: bool
    dialect: str

    def keys(self) -> list[sa.ColumnElement[Any]]:
        """What ``records`` are ordered by."""
        return [*(self.directed(key).nulls_last() for key in self._values()), _records.ordered_at.desc(), _records.seq.desc()]

    def directed(self, key: sa.ColumnElement[Any]) -> sa.UnaryExpression[Any]:
        """A key in the direction of the order."""
        return key.desc() if self.descending else key.asc()

    def _values(self) -> list[sa.ColumnElement[Any]]:
        target = self.target
        if target is None:
            return []
        if isinstance(target, Measured):
            # Numbers before texts.
            names = ["number"] if target.is_metric else ["number", "text"]
            return [self._of(target, name) for name in names]
        if target.kind == fields.MANY:
            return [self._first(target)]
        if target.kind == fields.AGE:
            return [-target.column]
        return [self._plain(target.column) if target.kind == fields.TEXT else target.column]

    def _of(self, target: Measured, name: str) -> sa.ColumnElement[Any]:
        table = target.table.alias()
        column = self._plain(table.c[name]) if name == "text" else table.c[name]
        query = sa.select(column).where(table.c.record == _records.seq, is_named(table, target))
        return query.correlate(schema.records).scalar_subquery()

    def _first(self, field: fields.Field) -> sa.ColumnElement[Any]:
        """The first of a record's texts: of its URLs the one that it is opened by, else by the alphabet."""
        table = field.column.table.alias()
        column = self._plain(table.c[field.column.name])
        keys = [table.c.status != "present", table.c.seen_at, table.c.place] if field.name == "url" else [column]
        query = sa.select(column).where(table.c.record == _records.seq).order_by(*keys).limit(1)
        return query.correlate(schema.records).scalar_subquery()

    def _plain(self, column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """A text that is ordered by code points."""
        return sa.collate(column, "C") if self.dialect == "postgresql" else column
