"""How a search is run: which table leads, so that the first records are found without looking at all.

Gets the condition and the order, hands on the numbers of rows. Every plan gives the same rows in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import schema
from expstate.catalog.query import fields, literal
from expstate.catalog.query.conditions import Query, is_named, stored
from expstate.catalog.query.names import ALL_PROJECTS, Measured
from expstate.catalog.query.numeric import is_delicate
from expstate.catalog.query.tree import And, Comparison, Node

if TYPE_CHECKING:
    from collections.abc import Iterable

    from expstate.catalog.query.sort import Order

WINDOW = 4096
"""Values of a metric, from the first on, that are looked at before all records are."""
MOST_WINDOWS = 16
FEW = 4000
"""A condition that so many records fulfil at most is asked before all others."""
_MOST_COUNTED = 8

_records = schema.records.c


@dataclass(frozen=True, slots=True)
class Search:
    """A search that was understood.

    Attributes
    ----------
    query : Query
        Names and their meaning.
    node : Node or None
        The tree; None finds everything.
    order : Order
        Of what is found.
    project : str
        ``"*"`` for all.
    newest : int
        The greatest row number that is looked at.
    """

    query: Query
    node: Node | None
    order: Order
    project: str
    newest: int

    def rows(self, connection: sa.Connection, limit: int | None) -> list[int]:
        """The numbers of the rows that are found, in order; at most so many."""
        few = self._few(connection)
        if few is None and limit:
            found = self._by_windows(connection, limit)
            if found is not None:
                return found
        select = sa.select(_records.seq).where(*self._conditions(few)).order_by(*self.order.keys())
        return list(connection.execute(select.limit(limit)).scalars())

    def _conditions(self, few: sa.Select[Any] | None) -> Iterable[sa.ColumnElement[bool]]:
        if few is not None:
            yield _records.seq.in_(few)
        if self.project != ALL_PROJECTS:
            # What is no plain column has no index that could lead in the place of the few.
            yield (_records.project if few is None else _records.project.concat("")) == self.project
        yield _records.seq <= self.newest
        if self.node is not None:
            yield self.query.condition(self.node, schema.records)

    # A condition that few records fulfil leads

    def _few(self, connection: sa.Connection) -> sa.Select[Any] | None:
        """The rows that fulfil a necessary condition which is true of few, if there is one that an index answers."""
        parts = self.node.operands if isinstance(self.node, And) else (self.node,)
        for part in parts[:_MOST_COUNTED]:
            select = self._indexed(part) if isinstance(part, Comparison) else None
            if select is not None:
                counted = sa.select(sa.func.count()).select_from(select.limit(FEW + 1).subquery())
                if connection.execute(counted).scalar_one() <= FEW:
                    return select
        return None

    def _indexed(self, part: Comparison) -> sa.Select[Any] | None:
        target, value = self.query.targets[part.name], part.value
        if value is None or value.is_none:
            return None
        if isinstance(target, Measured):
            number = None if value.quoted else literal.number(value.raw)
            if number is None or part.op in {"!=", "~"} or is_delicate(number):
                return None
            table = target.table
            return sa.select(table.c.record).where(is_named(table, target), self.query.value_of(table, target, part.op, value))
        if target.kind == fields.MANY and target.name != "url" and part.op == "=":
            return sa.select(target.column.table.c.record).where(target.column == stored(target, part.op, value.raw))
        return None

    # The values of the metric that it is sorted by lead

    def _by_windows(self, connection: sa.Connection, limit: int) -> list[int] | None:
        """The first records by a metric or the numbers of a param, if they are among its first values; else None."""
        target = self.order.target
        if not isinstance(target, Measured) or not 0 < len(target.ids) <= MOST_WINDOWS:
            return None
        width = WINDOW // len(target.ids)
        if limit > width:
            return None
        parts = [self._values(target, number) for number in target.ids]
        ends = [connection.execute(part.with_only_columns(target.table.c.number).offset(width - 1).limit(1)).scalar() for part in parts]
        window = sa.union_all(*(sa.select(part.limit(width).subquery()) for part in parts)).subquery("window")
        when = sa.select(_records.ordered_at).where(_records.seq == window.c.record).correlate(window).scalar_subquery()
        select = sa.select(window.c.record, window.c.number).where(*self._inside(window))
        keys = (self.order.directed(window.c.number), when.desc(), window.c.record.desc())
        found = connection.execute(select.order_by(*keys).limit(limit)).all()
        if len(found) < limit:
            return None
        # A value at the end of a window may go on behind it.
        sign, last = (-1 if self.order.descending else 1), found[-1].number
        if any(end is not None and sign * last >= sign * end for end in ends):
            return None
        return [row.record for row in found]

    def _values(self, target: Measured, number: int) -> sa.Select[Any]:
        table = target.table
        one = Measured(table, (number,))
        select = sa.select(table.c.record, table.c.number).where(is_named(table, one), table.c.number.is_not(None))
        return select.order_by(self.order.directed(table.c.number))

    def _inside(self, window: sa.FromClause) -> Iterable[sa.ColumnElement[bool]]:
        yield window.c.record <= self.newest
        if self.node is None:
            return
        if not self.query.asks_fields(self.node):
            yield self.query.condition(self.node, window)
            return
        condition = self.query.condition(self.node, schema.records)
        yield sa.exists(sa.select(sa.literal(1)).where(_records.seq == window.c.record, condition).correlate(window))
