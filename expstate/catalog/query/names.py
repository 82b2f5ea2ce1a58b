"""What the names of a query mean: a field of records, else a metric, else a param of the projects that are searched.

Gets the tree's names and a connection; hands on a ``Target`` for each. A name that means nothing is an error with the nearest ones.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from expstate.catalog import schema
from expstate.catalog.query.fields import FIELDS, Field
from expstate.catalog.query.tree import error
from expstate.catalog.rows import indexable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from expstate.catalog.query.tree import Name

ALL_PROJECTS = "*"
_NEAREST = 3


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric or param: what ``names`` numbers it by, once for each project that has it."""

    table: sa.Table
    ids: tuple[int, ...]

    @property
    def is_metric(self) -> bool:
        """Whether it is a metric, all of whose values are numbers."""
        return self.table is schema.metrics


Target = Field | Measured


class UnknownNamesError(Exception):
    """A name is known as nothing because there are no records: nothing can be found, and nothing is wrong."""


def find(connection: sa.Connection, names: Iterable[Name], project: str, text: str, what: str = "query") -> Mapping[Name, Target]:
    """What each name means.

    Parameters
    ----------
    names : iterable of Name
        Those of the query or sort ``text``.
    project : str
        The project that is searched; ``"*"`` for all.

    Raises
    ------
    InvalidQueryError
        If a name is both a metric and a param, or nothing that records of the project have.
    UnknownNamesError
        If a name is nothing because the project has no records.
    """
    wanted = list(dict.fromkeys(names))
    found: dict[Name, Target] = {name: FIELDS[name.text] for name in wanted if not name.kind and name.text in FIELDS}
    rest = [name for name in wanted if name not in found]
    if not rest:
        return found
    table = schema.names.c
    query = sa.select(table.kind, table.name, table.id).where(table.name.in_({indexable(name.text) for name in rest})).order_by(table.id)
    if project != ALL_PROJECTS:
        query = query.where(table.project == project)
    ids: dict[tuple[str, str], list[int]] = {}
    for kind, name, number in connection.execute(query):
        ids.setdefault((kind, name), []).append(number)
    for name in rest:
        stored = indexable(name.text)
        kinds = [kind for kind in ("metric", "param") if (kind, stored) in ids]
        if name.kind:
            kinds = [name.kind]
        elif len(kinds) > 1:
            problem = f"{name.text!r} is a metric and a param: write metric.{name.text} or param.{name.text}"
            raise error(text, name.position, problem, what)
        elif not kinds:
            raise _unknown(connection, name, project, text, what)
        (kind,) = kinds
        found[name] = Measured(schema.metrics if kind == "metric" else schema.params, tuple(ids.get((kind, stored), ())))
    return found


def _unknown(connection: sa.Connection, name: Name, project: str, text: str, what: str) -> Exception:
    records, table = schema.records.c, schema.names.c
    some, known = sa.select(records.seq).limit(1), sa.select(table.name).distinct()
    if project != ALL_PROJECTS:
        some, known = some.where(records.project == project), known.where(table.project == project)
    if connection.execute(some).first() is None:
        return UnknownNamesError()
    # Names are many where code makes them up; the nearest of some thousands are near enough.
    possible = [*{field.name for field in FIELDS.values()}, *connection.execute(known.limit(5000)).scalars()]
    written = {other.casefold(): other for other in possible}
    near = [written[other] for other in difflib.get_close_matches(name.text.casefold(), written, n=_NEAREST, cutoff=0.5)]
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return error(text, name.position, f"{name.text!r} is no field, metric or param of these records{hint}", what)
