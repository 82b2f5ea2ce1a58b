"""Records without snapshots, for the tests of how records are stored."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from expstate import Catalog
from expstate.catalog import rows, schema
from expstate.catalog.model import Body, Record, RecordData

HOUR = 3_600_000_000
"""In microseconds."""


def data(number: int = 0, **changes: Any) -> RecordData:
    """A record of a take in the hour of this number."""
    given = {
        "id": uuid.uuid4().hex,
        "digest": "0" * 64,
        "url": f"/runs/{number}",
        "host": "here",
        "project": "tests",
        "created_at": number * HOUR,
        "nbytes": 16,
        "written_bytes": 16,
        "world_size": 1,
        "body": Body(),
    }
    return RecordData(**(given | changes))


def put(catalog: Catalog, *records: RecordData, **options: Any) -> None:
    """Enter records, in one transaction."""
    with catalog.database.writing() as connection:
        for record in records:
            rows.put(connection, record, **options)


def all_of(catalog: Catalog) -> list[Record]:
    """All records, in the order in which they count as taken."""
    with catalog.database.reading() as connection:
        query = sa.select(schema.records.c.seq).order_by(schema.records.c.ordered_at)
        return rows.fetch(connection, list(connection.execute(query).scalars()))


def urls(catalog: Catalog) -> list[str]:
    """Where the snapshots of all records are, in the order in which they count as taken."""
    return [record.url for record in all_of(catalog)]


def count(catalog: Catalog, table: sa.Table = schema.records) -> int:
    """How many rows a table has."""
    with catalog.database.reading() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


def statements(catalog: Catalog, work: Callable[[], Any]) -> list[str]:
    """What a database is told while ``work`` runs."""
    found: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        found.append(statement)

    engine = catalog.database._engine
    sa.event.listen(engine, "before_cursor_execute", listen)
    try:
        work()
    finally:
        sa.event.remove(engine, "before_cursor_execute", listen)
    return found
