"""What the table of snapshots asks: which records a query finds, rows of them by windows, columns, and a metric against the step.

Gets queries and names from the page; hands on plain JSON. A question finds all its records at once, as numbers of rows; what is shown of
them is read when it comes into view.
"""

from __future__ import annotations

import datetime as dt
import math
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import rows, schema
from expstate.catalog.provenance import current_project
from expstate.commands import columns as fields
from expstate.engine.report import bytes_text
from expstate.errors import InvalidArgumentError
from expstate.notebook.browser import texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.catalog.catalog import Catalog
    from expstate.catalog.model import Record

WINDOW = 100
"""Rows that come with the answer to a question."""
MOST_ROWS = 500
"""Rows that are handed on at once."""
MOST_POINTS = 3000
"""Points of a plot; of more, every so many-th is drawn."""
MOST_OUTLINED = 200_000
"""Records of which sums and plots are made; reading the outline of more takes seconds."""
_MOST_NAMES = 1000
_KEPT_QUESTIONS = 8
_MOST_SHOWN = 2
_TITLES = {"written": "new bytes", "created": "taken", "tags": "tag", "aliases": "alias"}
_CHOICE = (
    "step", "written", "size", "created", "duration", "id", "user", "host", "project", "status", "note", "commit", "branch", "parent",
    "world_size", "url",
)  # fmt: skip
_WORD = re.compile(r"[^\s<>=!~()\"',:]+")

_records = schema.records.c


@dataclass(frozen=True, slots=True)
class _Outline:
    """The little that is known of every record of the project: by the number of its row."""

    facts: dict[int, tuple[str, str | None, int | None, int, int]]
    by_id: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Question:
    """What was asked, and the numbers of the rows that were found."""

    number: int
    rows: Sequence[int] = ()
    columns: tuple[str, ...] = ()
    places: dict[int, int] = field(default_factory=dict)


class Table:
    """The records of a project as the page asks for them; for several threads.

    Parameters
    ----------
    catalog : Catalog
        Where they are.
    project : str, optional
        Another project than the current one; ``"*"`` for all.
    """

    def __init__(self, catalog: Catalog, project: str | None = None) -> None:
        self.catalog = catalog
        self.project = current_project() if project is None else project
        self._lock = threading.RLock()
        self._questions: dict[int, _Question] = {}
        self._count = 0
        self._known: _Outline | None = None

    def forget(self) -> None:
        """Take notice that the catalog may have changed."""
        with self._lock:
            self._known = None

    def search(
        self, query: str = "", sort: str | None = None, columns: Sequence[str] | None = None, selected: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The answer to a query: how many there are, the first rows, and where those that are selected stand.

        Parameters
        ----------
        query : str
            In the catalog's grammar.
        sort : str, optional
            A column, with ``:asc`` or ``:desc``.
        columns : sequence of str, optional
            Besides the name; default those that have most to say.
        selected : sequence of str
            Ids of records whose places are wanted.

        Raises
        ------
        InvalidQueryError
            If the query is not finished, or cannot be understood.
        """
        found = self.catalog.search(query or None, project=self.project, sort=None if not sort else _sort_of(sort))
        with self._lock:
            shown = tuple(columns) if columns is not None else self._usual(list(found[:WINDOW]), f"{query} {sort or ''}")
            places = {row: place for place, row in enumerate(found.rows)}
            question = self._asked(_Question(self._count + 1, found.rows, shown, places))
            outline = self._outline()
            by_id = outline.by_id if outline is not None else {}
            first = self.window(question.number, 0, WINDOW)
            return first | {
                "count": len(question.rows),
                "total": len(outline.facts) if outline is not None else None,
                "bytes": self._sums(question, outline),
                "columns": [_column(name) for name in shown],
                "places": {one: places[by_id[one]] for one in selected if by_id.get(one) in places},
                "gone": [one for one in selected if outline is not None and one not in by_id],
            }

    def _asked(self, question: _Question) -> _Question:
        """Keep a question and a few before it: a page may be open twice, and each looks at its own."""
        self._count = question.number
        self._questions[question.number] = question
        while len(self._questions) > _KEPT_QUESTIONS:
            self._questions.pop(next(iter(self._questions)))
        return question

    def window(self, question: int, start: int, count: int = WINDOW) -> dict[str, Any]:
        """Some rows of a question; ``rows`` is None if many were asked since, an item of it None if its record was deleted."""
        asked = self._questions.get(question)
        if asked is None:
            return {"question": question, "start": start, "rows": None}
        start = max(0, start)
        numbers = asked.rows[start : start + min(count, MOST_ROWS)]
        with self.catalog.database.reading() as connection:
            there = rows.fetch_by_row(connection, numbers)
        now = dt.datetime.now(dt.timezone.utc)
        shown = [row_of(there[one], asked.columns, now) if one in there else None for one in numbers]
        return {"question": question, "start": start, "rows": shown}

    def columns(self) -> dict[str, Any]:
        """The columns that there are to choose from."""
        names = self._names()
        measured = [f"{kind}.{name}" for kind in ("metric", "param") for name in names[kind]]
        return {"columns": [_column(name) for name in (*_CHOICE, *measured)]}

    def metrics(self) -> list[str]:
        """The names of the project's metrics."""
        return self._names()["metric"]

    def series(self, question: int, metric: str) -> dict[str, Any]:
        """A metric of the records that were found, against their steps.

        Returns
        -------
        dict
            ``points`` as lists of step, value and place in the table, by rising step, and ``lines`` between the points of a snapshot and
            the one that it came from.
        """
        asked = self._questions.get(question)
        with self._lock:
            outline = self._outline()
        empty = {"question": question, "metric": metric, "points": [], "lines": []}
        if outline is None or asked is None:
            return empty
        values = self._values(metric)
        found = []
        for row, place in asked.places.items():
            value, facts = values.get(row), outline.facts.get(row)
            if value is not None and math.isfinite(value) and facts is not None and facts[2] is not None:
                found.append((facts[2], value, place, row))
        found.sort()
        found = found[:: -(-len(found) // MOST_POINTS)] if found else found
        at = {row: point for point, (_, _, _, row) in enumerate(found)}
        lines = [[above, at[row]] for row in at if (above := _ancestor(row, at, outline)) is not None]
        return empty | {"points": [[step, value, place] for step, value, place, _ in found], "lines": lines}

    # What is known of all of them

    def _outline(self) -> _Outline | None:
        """The outline of the project; None if it is too large."""
        if self._known is None:
            wanted = (_records.seq, _records.id, _records.parent, _records.step, _records.nbytes, _records.written_bytes)
            with self.catalog.database.reading() as connection:
                found = connection.execute(self._here(sa.select(*wanted)).limit(MOST_OUTLINED + 1)).all()
            if len(found) > MOST_OUTLINED:
                return None
            facts = {seq: (snapshot_id, parent, step, nbytes, written) for seq, snapshot_id, parent, step, nbytes, written in found}
            self._known = _Outline(facts, {fact[0]: seq for seq, fact in facts.items()})
        return self._known

    def _here(self, query: sa.Select[Any]) -> sa.Select[Any]:
        return query if self.project == "*" else query.where(_records.project == rows.indexable(self.project))

    @staticmethod
    def _sums(question: _Question, outline: _Outline | None) -> str:
        if outline is None or not question.rows:
            return ""
        facts = [outline.facts[row] for row in question.rows if row in outline.facts]
        written, whole = sum(fact[4] for fact in facts), sum(fact[3] for fact in facts)
        more = f", {bytes_text(whole)} without dedup" if whole > written else ""
        return bytes_text(written) + more

    def _names(self) -> dict[str, list[str]]:
        table = schema.names.c
        query = sa.select(table.kind, table.name).distinct().order_by(table.kind, table.name).limit(_MOST_NAMES)
        if self.project != "*":
            query = query.where(table.project == rows.indexable(self.project))
        with self.catalog.database.reading() as connection:
            found = connection.execute(query).all()
        return {kind: [name for one, name in found if one == kind] for kind in ("metric", "param")}

    def _values(self, metric: str) -> dict[int, float | None]:
        table, names = schema.metrics.c, schema.names.c
        query = sa.select(table.record, table.number).join(schema.names, names.id == table.name)
        with self.catalog.database.reading() as connection:
            found = connection.execute(query.where(names.kind == "metric", names.name == metric, table.number.is_not(None))).all()
        return {record: number for record, number in found}  # noqa: C416 - rows are no pairs to mypy

    def _usual(self, records: Sequence[Record], asked: str) -> tuple[str, ...]:
        """The columns that say most of these records: metrics that were asked for first, then those that most have."""
        counts = Counter(name for record in records for name in record.metrics)
        words = {word.removeprefix("metric.") for word in _WORD.findall(asked)}
        metrics = sorted(counts, key=lambda name: (name not in words, -counts[name]))
        few = metrics[: max(_MOST_SHOWN, sum(name in words for name in metrics))]
        steps = ["step"] if any(record.step is not None for record in records) else []
        return (*(f"metric.{name}" for name in few), *steps, "written", "created")


def _ancestor(row: int, at: dict[int, int], outline: _Outline) -> int | None:
    """The point of the nearest snapshot that this one came from and that has one; a circle, which only a forged manifest makes, ends."""
    seen = {row}
    while True:
        parent = outline.facts[row][1]
        above = None if parent is None else outline.by_id.get(parent)
        if above is None or above in seen:
            return None
        if above in at:
            return at[above]
        seen.add(above)
        row = above


def row_of(record: Record, columns: Sequence[str], now: dt.datetime) -> dict[str, Any]:
    """A record as a row: its labels, and the cells of the columns."""
    return {
        "id": record.id,
        "short": record.id[:8],
        "name": texts.clean(record.name or record.id[:8]),
        "aliases": [texts.clean(alias) for alias in record.aliases],
        "tags": [texts.clean(tag) for tag in record.tags],
        "pinned": record.pinned,
        "status": record.status,
        "created": record.created_at.timestamp(),
        "bytes": record.nbytes_written,
        "cells": [_cell(record, name, now) for name in columns],
    }


def _cell(record: Record, column: str, now: dt.datetime) -> Any:
    """What stands in a column: a text, or seconds since 1970 for the time of the take, which the page makes an age of."""
    kind, _, name = column.partition(".")
    if column == "created":
        return record.created_at.timestamp()
    if kind == "metric":
        return texts.metric(record.metrics.get(name))
    if kind == "param":
        return texts.value(record.params[name]) if name in record.params else ""
    found = fields.FIELDS.get(column)
    if found is None:
        msg = f"there is no column {texts.clean(column)!r}"
        raise InvalidArgumentError(msg)
    value = found(record, now)
    return "" if value is None else texts.clean(str(value))


def _column(name: str) -> dict[str, Any]:
    kind, _, rest = name.partition(".")
    is_measured = kind in {"metric", "param"} and bool(rest)
    shown = rest if is_measured else _TITLES.get(name, name)
    numeric = kind == "metric" or name in {"step", "written", "size", "duration", "world_size"} or kind == "param"
    return {
        "name": name,
        "title": texts.clean(shown),
        "kind": kind if is_measured else "field",
        "numeric": numeric,
        "time": name == "created",
    }


def _sort_of(sort: str) -> str:
    """A sort by a column, as the catalog's grammar has it: names of metrics and params in quotes."""
    column, _, direction = sort.rpartition(":")
    kind, _, name = column.partition(".")
    if kind in {"metric", "param"} and name:
        escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
        column = f'{kind}."{escaped}"'
    return f"{column}:{direction}"
