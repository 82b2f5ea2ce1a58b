"""The catalog's database: opened, migrated, looked after; one transaction at a time.

Gets a ``CatalogPlace``, hands out connections of SQLAlchemy inside transactions, and turns the database's errors into ours.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from expstate.catalog import schema

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.catalog.place import CatalogPlace


class Database:
    """An open catalog database; usable from several threads and after a fork.

    Parameters
    ----------
    place : CatalogPlace
        Where it is.
    """

    def __init__(self, place: CatalogPlace) -> None:
        self.place = place
        if place.path is not None:
            place.path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = sa.create_engine(place.url, poolclass=sa.NullPool)
        sa.event.listen(self._engine, "connect", _set_up)
        schema.metadata.create_all(self._engine)

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the catalog."""
        with self._engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self, timeout_seconds: float | None = None) -> Iterator[sa.Connection]:  # noqa: ARG002
        """A connection inside one transaction, committed at the end of the block; waits at most so long for other writers."""
        with self._engine.begin() as connection:
            yield connection

    @property
    def dialect(self) -> str:
        """``sqlite`` or ``postgresql``."""
        return self._engine.dialect.name

    def close(self) -> None:
        """Let go of what is open."""
        self._engine.dispose()


def _set_up(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()
