"""``search``: the query and sort of a person, to the records that they are true of.

Gets texts, hands on ``Records``. The first page is read at once; what comes after it when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import rows, schema
from expstate.catalog.provenance import current_project
from expstate.catalog.query.conditions import CONTAINS, Query, contains
from expstate.catalog.query.names import UnknownNamesError, find
from expstate.catalog.query.parse import parse, parse_sort
from expstate.catalog.query.plans import Search
from expstate.catalog.query.sort import Order
from expstate.catalog.query.tree import comparisons
from expstate.catalog.records import PAGE, Records
from expstate.errors import InvalidArgumentError

if TYPE_CHECKING:
    from expstate.catalog.catalog import Catalog
    from expstate.catalog.query.parse import Sort
    from expstate.catalog.query.tree import Node

_CACHE_KIB = 64 * 1024
"""Most of the database that a search keeps in memory, while it runs."""
_UNICODE = "und-x-icu"


def search(
    catalog: Catalog, query: str | None = None, *, project: str | None = None, sort: str | None = None, limit: int | None = None
) -> Records:
    """Records that fulfil a query: see ``Catalog.search``."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 0):
        msg = f"limit must be a whole number of records, got {limit!r}"
        raise InvalidArgumentError(msg)
    node = None if query is None or query == "" or str(query).isspace() else parse(query)
    order = None if sort is None else parse_sort(sort)
    project = rows.indexable(current_project() if project is None else _name_of(project))
    with catalog.database.reading() as connection:
        _prepare(connection)
        try:
            found = _understand(connection, node, query or "", order, sort or "", project)
        except UnknownNamesError:
            return Records(catalog, [], [])
        first = found.rows(connection, PAGE + 1 if limit is None else min(limit, PAGE + 1))
        page = first[:PAGE]
        loaded = rows.fetch(connection, page)

    def rest() -> list[int]:
        with catalog.database.reading() as connection:
            _prepare(connection)
            known = set(page)
            every = found.rows(connection, None)
        return [seq for seq in every if seq not in known][: None if limit is None else limit - len(page)]

    return Records(catalog, page, loaded, rest if len(first) > len(page) else None)


def _name_of(project: object) -> str:
    if not isinstance(project, str):
        msg = f'a project is a text, "*" for all of them, got {project!r}'
        raise InvalidArgumentError(msg)
    return project


def _prepare(connection: sa.Connection) -> None:
    """Give SQLite the function that looks into texts, and room."""
    if connection.dialect.name == "sqlite":
        raw: Any = connection.connection.driver_connection
        raw.create_function(CONTAINS, 2, contains, deterministic=True)
        raw.execute(f"PRAGMA cache_size=-{_CACHE_KIB}").close()


def _understand(connection: sa.Connection, node: Node | None, query: str, sort: Sort | None, sort_text: str, project: str) -> Search:
    """What the names mean, in this catalog and now."""
    found = [] if node is None else list(comparisons(node))
    targets = find(connection, [comparison.name for comparison in found], project, query)
    target = None
    if sort is not None:
        target = find(connection, [sort.name], project, sort_text, "sort")[sort.name]
    dialect = connection.dialect.name
    collation = None
    if dialect == "postgresql" and any(comparison.op == "~" for comparison in found):
        there = connection.execute(sa.text("SELECT 1 FROM pg_collation WHERE collname = :name"), {"name": _UNICODE}).first()
        collation = None if there is None else _UNICODE
    newest = connection.execute(sa.select(sa.func.max(schema.records.c.seq))).scalar() or 0
    order = Order(target, sort is not None and sort.descending, dialect)
    return Search(Query(query, targets, dialect, collation, rows.now()), node, order, project, newest)
